import json
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from insitu import LanguageModel, LoadError, OptionError
from tests.conftest import tiny_gpt2
from tests.fidelity.zoo import module_of

IDS = torch.tensor([[3, 14, 15, 92, 65]])


@pytest.fixture
def folder(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    return tmp_path


def test_weights_load_with_the_first_run(folder) -> None:
    model = LanguageModel(str(folder), device_map="cpu")
    assert not model.loaded
    assert model.module.lm_head.weight.is_meta
    assert "weights not loaded yet" in repr(model)
    head = model.lm_head
    with model.trace(IDS):
        logits = head.output.save()
        assert not model.loaded
    assert model.loaded and head.module is model.module.lm_head
    with torch.no_grad():
        assert torch.equal(logits, tiny_gpt2()(IDS).logits)
    assert model.load() is model.module


def test_load_can_be_called_first(folder) -> None:
    model = LanguageModel(folder)
    module = model.load()
    assert model.loaded and not module.lm_head.weight.is_meta
    assert not module.training


def test_arguments_reach_from_pretrained(folder) -> None:
    model = LanguageModel(folder, dtype=torch.bfloat16, attn_implementation="eager")
    with model.trace(IDS):
        hidden = model.transformer.h[0].output[0]
        pattern = model.transformer.h[0].attn.output[1]
        assert hidden.dtype == torch.bfloat16 and pattern.shape == (1, 4, 5, 5)
        hidden, pattern = hidden.save(), pattern.save()
    assert hidden.dtype == torch.bfloat16 and pattern.shape == (1, 4, 5, 5)


@pytest.mark.parametrize(("name", "dtype"), [("t5", "float16"), ("deepseek-v3", "bfloat16")])
def test_dtypes_before_loading_are_those_that_loading_gives(
    tmp_path, name: str, dtype: str
) -> None:
    """Also of weights that Transformers keeps in `float32`, such as the last layer of T5's MLPs."""
    module_of(name).save_pretrained(tmp_path)
    model = LanguageModel(tmp_path, dtype=getattr(torch, dtype))
    before = {path: weight.dtype for path, weight in model.module.state_dict().items()}
    whole = type(model.module).from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    assert before == {path: weight.dtype for path, weight in whole.state_dict().items()}


def test_a_value_before_loading_has_the_dtype_of_the_run(tmp_path) -> None:
    module_of("t5").save_pretrained(tmp_path)
    model = LanguageModel(tmp_path, dtype=torch.float16)
    with model.trace(IDS):
        dtype = model.encoder.block[0].output[0].dtype
        value = model.encoder.block[0].output[0].save()
    assert value.dtype == dtype == torch.float32


def test_a_model_in_memory_is_taken_as_it_is() -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)
    assert model.loaded and model.module is module and model.config is module.config
    with pytest.raises(OptionError, match="'dtype'"):
        LanguageModel(module, dtype=torch.float16)


def test_a_repo_that_is_nowhere_is_a_clear_error() -> None:
    with pytest.raises(LoadError, match="no-such/model.*insitu/eiffel") as caught:
        LanguageModel("no-such/model")
    assert __file__ in str(caught.value) and isinstance(caught.value, OSError)


def test_broken_weights_are_a_clear_error_and_can_be_mended(folder) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    model = LanguageModel(folder)
    with pytest.raises(LoadError, match="weights") as caught, model.trace(IDS):
        saved = model.lm_head.output.save()
    assert "weights of" in str(caught.value)
    assert not model.loaded
    with pytest.raises(ValueError, match="its run raised LoadError"):
        _ = saved.value
    weights.write_bytes(whole)
    with model.trace(IDS):
        saved = model.lm_head.output.save()
    assert saved.shape == (1, 5, 100)


def test_a_missing_tokenizer_is_an_error_only_when_it_is_needed(folder) -> None:
    model = LanguageModel(folder)
    with pytest.raises(ValueError, match="no tokenizer"), model.trace("text"):
        pass
    with pytest.raises(LoadError):
        _ = model.tokenizer
    with model.trace([1, 2]):
        model.lm_head.output.save()


def test_a_tokenizer_can_be_given(folder, eiffel: LanguageModel) -> None:
    model = LanguageModel(folder, tokenizer=eiffel.tokenizer)
    assert model.tokenizer is eiffel.tokenizer


@pytest.mark.slow
def test_seventy_billion_parameters_take_seconds_and_no_memory(tmp_path) -> None:
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    config.save_pretrained(tmp_path)
    code = (
        "import time, resource, torch, transformers, json; from insitu import LanguageModel\n"
        "import transformers.models.llama.modeling_llama\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; start = time.time()\n"
        f"model = LanguageModel({str(tmp_path)!r})\n"
        "seconds = time.time() - start\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "count = sum(p.numel() for p in model.module.parameters())\n"
        "print(json.dumps([seconds, grown / 2**20, count]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, gigabytes, parameters = json.loads(done.stdout)
    assert parameters > 70e9
    assert seconds < 5 and gigabytes < 1


@pytest.mark.thorough
def test_importing_insitu_takes_little_more_than_importing_torch(tmp_path: Path) -> None:
    code = (
        "import time; start = time.process_time(); import torch; middle = time.process_time(); "
        "import insitu; print(middle - start, time.process_time() - middle)"
    )

    # Compiled once, as it is wherever Python may write beside a package or to its cache.
    env = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)

    def seconds() -> tuple[float, float]:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
        )
        of_torch, of_insitu = map(float, done.stdout.split())
        return of_torch, of_insitu

    seconds()
    of_torch, of_insitu = map(min, zip(*(seconds() for _ in range(3)), strict=True))
    assert of_insitu < 0.2 * of_torch


@cache
def imported_with_insitu() -> set[str]:
    code = "import insitu, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {*done.stdout.split()}


def test_importing_insitu_does_not_import_transformers() -> None:
    assert "insitu" in imported_with_insitu()
    assert "transformers" not in imported_with_insitu()


def test_importing_insitu_imports_nothing_of_servers() -> None:
    names = {"starlette", "uvicorn", "httpx", "insitu.server", "insitu.remote"}
    assert not imported_with_insitu() & names


def test_making_a_model_of_a_config_is_quick(tmp_path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    LanguageModel(tmp_path)
    start = time.perf_counter()
    LanguageModel(tmp_path)
    assert time.perf_counter() - start < 2
