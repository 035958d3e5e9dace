"""What a user of nnsight types by habit: the error names a line, and that line works."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import insitu
from insitu import (
    BlockError,
    InsituError,
    LanguageModel,
    Model,
    NeverRanError,
    OperationError,
    OptionError,
    PathError,
    PromptTypeError,
    UnknownNameError,
)
from insitu.models.model import OF_LANGUAGE_MODELS
from tests.conftest import hooked, hooked_hidden

TEXT = "The Louvre is in the city of"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel("insitu/eiffel")


def lines_of(error: BaseException) -> list[str]:
    """The code in a message."""
    return re.findall(r"`([^`]*)`", str(error).partition("\n")[0])


def refused(kind: type[InsituError], use: Callable[[], object]) -> InsituError:
    """The error that a use raises, which names a line of this file."""
    with pytest.raises(kind) as caught:
        use()
    location = caught.value.location
    assert location is not None and location.file == __file__
    return caught.value


def test_softmax_of_attention_is_named_where_one_function_is_all_of_it(
    model: LanguageModel,
) -> None:
    def use() -> None:
        with model.trace(TEXT):
            model.transformer.h[2].attn.ops.softmax[0].output.save()

    words = str(refused(PathError, use))
    assert "block.attention.pattern" in words and 'attn_implementation="eager"' in words
    eager = LanguageModel("insitu/eiffel", attn_implementation="eager")
    with eager.trace(TEXT):
        ours = eager.transformer.h[2].attn.ops.softmax[0].output.save()
        named = eager.transformer.h[2].attention.pattern.save()
    ids = eager.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    plain = hooked(eager.module, "transformer.h.2.attn", ids)[1]
    torch.testing.assert_close(ours.value, plain)
    torch.testing.assert_close(named.value, plain)


def test_functions_are_listed_by_the_line_that_is_named(
    model: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(BlockError, lambda: model.transformer.h[2].attn.ops)
    line = lines_of(error)[1]
    exec(line, {"model": model, "prompt": TEXT})
    assert "scaled_dot_product_attention[0]: torch.Size([1, " in capsys.readouterr().out


def test_all_modules_are_kept_in_a_block_by_the_line_that_is_named(model: LanguageModel) -> None:
    def use() -> None:
        with model.trace(TEXT) as tracer:
            tracer.cache()

    line = lines_of(refused(PathError, use))[1]
    scope: dict[str, Any] = {"model": model}
    with model.trace(TEXT):
        model.transformer.h[1].mlp.output[:] = 0
        exec(line, scope)
    values = scope["values"]
    module, seen = model.module, dict[str, Any]()
    ids = model.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    handles = [
        module.get_submodule("transformer.h.1.mlp").register_forward_hook(
            lambda _, args, output: output * 0
        )
    ]
    for path, part in module.named_modules():
        handles.append(
            part.register_forward_hook(lambda _, args, out, path=path: seen.setdefault(path, out))
        )
    with torch.no_grad():
        module(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    assert {path for path, one in values.items() if one.value is not None} == seen.keys() - {""}
    for path in seen.keys() - {""}:
        ours, plain = values[path].value, seen[path]
        ours = ours[0] if isinstance(ours, tuple) else ours
        torch.testing.assert_close(ours, plain[0] if isinstance(plain, tuple) else plain)


def test_a_cache_has_the_outputs_of_modules_by_path(model: LanguageModel) -> None:
    ids = model.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    cache = model.run_with_cache(
        TEXT, ["transformer.h.*.mlp.c_fc", "transformer.h.2", "transformer.h.3.attn"]
    )
    assert len(cache) == 8
    for layer in range(6):
        path = f"transformer.h.{layer}.mlp.c_fc"
        torch.testing.assert_close(cache[path], hooked(model.module, path, ids))
    hidden = hooked_hidden(model.module, "transformer.h.2", ids)
    torch.testing.assert_close(cache["transformer.h.2"], hidden)
    attended = hooked(model.module, "transformer.h.3.attn", ids)[0]
    torch.testing.assert_close(cache["transformer.h.3.attn"], attended)
    half = model.run_with_cache(TEXT, "transformer.h.2", dtype=torch.float16)
    assert half["transformer.h.2"].dtype is torch.float16
    with pytest.raises(OptionError, match="No value"):
        model.run_with_cache(TEXT, "transformer.g.*")


def test_a_generation_that_ends_early_names_every_step(model: LanguageModel) -> None:
    def use() -> None:
        with model.generate(TEXT, max_new_tokens=8) as generator:
            for _ in generator.steps:
                model.lm_head.output[0, -1].argmax().save()

    error = refused(NeverRanError, use)
    assert "with generator.every_step():" in lines_of(error)
    with model.generate(TEXT, max_new_tokens=8) as generator:
        with generator.every_step():
            tokens = model.lm_head.output[0, -1].argmax().save()
    ids = model.tokenizer(TEXT, return_tensors="pt")
    plain = model.module.generate(**ids, max_new_tokens=8, do_sample=False)
    new = plain[0, ids["input_ids"].shape[1] :].tolist()
    assert [int(one) for one in tokens] == new and len(new) < 8


def test_a_plain_wrapper_of_a_language_model_names_the_other() -> None:
    module = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32)).eval()
    plain = Model(module)
    for name in ("generate", "run_with_cache", "tokenizer"):
        error = refused(PathError, lambda name=name: getattr(plain, name))
        assert f"LanguageModel(module, tokenizer=tokenizer).{name}" in str(error)
    with LanguageModel(module).generate([1, 2, 3], max_new_tokens=2) as generator:
        pass
    ids = torch.tensor([[1, 2, 3]])
    mask = torch.ones_like(ids)
    expected = module.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
    assert generator.output.tolist() == expected.tolist()
    own = {name for name in set(dir(LanguageModel)) - set(dir(Model)) if name[0] != "_"}
    assert own - LanguageModel._internal - {"device"} == OF_LANGUAGE_MODELS  # modules have it
    other = Model(torch.nn.Linear(2, 2))
    with pytest.raises(PathError) as caught:
        _ = other.generate
    assert "LanguageModel" not in str(caught.value)


def test_the_next_call_of_a_module_is_named() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x))

    model, x = Model(Twice()), torch.ones(1, 2)

    def use() -> None:
        with model.trace(x):
            model.layer.next().output.save()

    line = lines_of(refused(PathError, use))[2]
    with model.trace(x):
        second = eval(line, {"module": model.layer}).save()
    torch.testing.assert_close(second.value, model.module(x).detach())


def test_a_decision_is_no_context(model: LanguageModel) -> None:
    def with_cond() -> None:
        with model.trace(TEXT):
            with insitu.cond(model.transformer.h[2].output[0].sum() > 0):
                pass

    def one_function() -> None:
        with model.trace(TEXT):
            insitu.cond(model.transformer.h[2].output[0].sum() > 0, lambda x: x)

    for use in (with_cond, one_function):
        line = lines_of(refused(OperationError, use))[1]
    scope: dict[str, Any] = {"insitu": insitu}
    with model.trace(TEXT):
        scope["x"] = model.transformer.h[2].output[0]
        scope["pred"] = scope["x"].sum() > 0
        exec(line, scope)
        value = scope["y"].save()
    ids = model.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    x = hooked_hidden(model.module, "transformer.h.2", ids)
    torch.testing.assert_close(value.value, x * 2 if x.sum() > 0 else x)


def test_requires_grad_is_left_out(model: LanguageModel) -> None:
    def use() -> None:
        with model.trace(TEXT):
            model.transformer.h[2].output[0].requires_grad = True

    assert "leave it out" in str(refused(OperationError, use))


def test_a_prompt_of_an_edit_and_an_invocation_without_one(model: LanguageModel) -> None:
    assert "edited.trace(prompt)" in str(refused(OptionError, lambda: model.edit(TEXT)))

    def use() -> None:
        with model.trace() as tracer:
            with tracer.invoke(TEXT):
                pass
            with tracer.invoke():
                pass

    assert "tracer.invoke([first, second])" in lines_of(refused(PromptTypeError, use))
    with model.trace() as tracer:
        with tracer.invoke([TEXT, "The Kremlin is in the"]):
            both = model.lm_head.output[:, -1].save()
    assert both.shape == (2, 1336)


NAMES = {
    "clear_edits": "as it is",
    "export_edits": "model.save_edits(path)",
    "import_edits": "model.load_edits(path)",
    "rename": "attention = model.transformer.h[3].attn",
    "ping": "Connection(url).models()",
    "get": 'model["transformer.h.3"]',
    "source": 'attn_implementation="eager"',
}


@pytest.mark.parametrize(("name", "line"), NAMES.items())
def test_methods_of_models(model: LanguageModel, name: str, line: str) -> None:
    with model.edit() as edited:
        edited.transformer.h[1].output[0][:] = 0
    for one in (model, edited):
        assert line in str(refused(PathError, lambda one=one: getattr(one, name)))


def test_names_of_blocks_and_sessions(model: LanguageModel) -> None:
    with model.trace(TEXT) as tracer:
        model.lm_head.output.save()
        assert "insitu.cond(pred" in str(refused(PathError, lambda: tracer.cond))
    for name, line in {
        "iter": "a loop of Python's",
        "apply": "insitu.apply",
        "jobs": "'job'",
    }.items():
        with model.session() as session:
            error = refused(PathError, lambda name=name: getattr(session, name))
        assert line in str(error)
    for method in (model.trace, model.generate):
        error = refused(OptionError, lambda method=method: method(TEXT, blocking=False))
        assert "remote=url, wait=False" in lines_of(error)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("CONFIG", "INSITU_REMOTE and INSITU_KEY"),
        ("UnifiedTransformer", "LanguageModel(name)"),
        ("VLLM", "LanguageModel(name)"),
        ("DiffusionModel", "Model(pipeline.unet)"),
        ("dict", "values[name] = x.save()"),
    ],
)
def test_names_of_the_package(name: str, line: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        exec(f"from insitu import {name}")
    assert line in str(caught.value)
    assert line in str(refused(PathError, lambda: getattr(insitu, name)))


def test_the_package_lists_what_it_is_for() -> None:
    assert dir(insitu) == sorted([*insitu.__all__, "methods"])
    assert all(hasattr(insitu, name) for name in dir(insitu))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"devicemap": "cpu"}, "nearest: 'device_map'"),
        ({"quantisation_config": None}, "quantization_config"),
        ({"rename": {"a": "b"}}, "variable"),
        ({"attn_implementaton": "eager"}, "attn_implementation"),
    ],
)
def test_options_of_loading_are_looked_at_where_the_model_is_made(
    option: dict[str, Any], words: str
) -> None:
    for make in (LanguageModel, Model.from_pretrained):
        error = refused(OptionError, lambda make=make: make("insitu/eiffel", **option))
        assert words in str(error)


def test_options_that_loading_takes_are_taken() -> None:
    given = {
        "device_map": "cpu",
        "attn_implementation": "eager",
        "low_cpu_mem_usage": True,
        "use_safetensors": True,
        "output_attentions": True,
        "attn_pdrop": 0.25,
        "dtype": torch.float32,
        "local_files_only": True,
    }
    model = LanguageModel("insitu/eiffel", **given)
    assert model.load().config.attn_pdrop == 0.25


@pytest.mark.thorough
def test_the_package_is_a_program() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "insitu", "--version"], capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith("insitu ")
