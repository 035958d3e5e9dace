"""Weights that files lack: an error that says how to have them drawn, or no matter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

from insitu import LanguageModel, LoadError, Model, VisionLanguageModel
from tests.conftest import tiny_gpt2
from tests.models.kinds import llava, t5, vit

IDS = torch.tensor([[3, 14, 15, 92, 65]])
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
BERT = BertConfig(vocab_size=100, num_attention_heads=4, **SIZES)


def without(folder: Path, end: str) -> str:
    """Takes a weight out of the file of a model, and returns its name."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    (name,) = [name for name in weights if name.endswith(end)]
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize(
    ("make", "end", "load"),
    [
        (tiny_gpt2, "h.1.mlp.c_fc.weight", LanguageModel),
        pytest.param(
            t5, "decoder.final_layer_norm.weight", LanguageModel, marks=pytest.mark.thorough
        ),
        (vit, "classifier.bias", Model.from_pretrained),
        pytest.param(
            llava,
            "multi_modal_projector.linear_1.weight",
            VisionLanguageModel,
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_a_weight_that_files_lack_is_an_error(
    tmp_path: Path, make: Callable[[], Any], end: str, load: Callable[..., Model]
) -> None:
    make().save_pretrained(tmp_path)
    assert load(tmp_path).load() is not None
    name = without(tmp_path, end)
    model = load(tmp_path)
    assert not model.loaded
    with pytest.raises(LoadError, match="`allow_new_weights=True`") as caught:
        model.load()
    assert name.rpartition(".")[0].rpartition(".")[2] in str(caught.value)
    assert not model.loaded
    assert load(tmp_path, allow_new_weights=True).load() is not None


def test_the_first_run_says_what_is_missing_and_where(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    without(tmp_path, "h.0.attn.c_attn.bias")
    model = LanguageModel(tmp_path)
    with pytest.raises(LoadError, match=r"lack a weight of GPT2LMHeadModel: .*c_attn.bias") as e:
        with model.trace(IDS):
            model.logits.save()
    assert __file__ in str(e.value)


def test_a_head_that_was_asked_for_and_that_no_file_has_is_an_error(tmp_path: Path) -> None:
    BertModel(BERT).save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="Leave out `task=`.*allow_new_weights"):
        LanguageModel(tmp_path, task="masked").load()
    model = LanguageModel(tmp_path, task="masked", allow_new_weights=True)
    assert type(model.load()) is BertForMaskedLM


def test_a_head_that_is_tied_to_the_embedding_is_not_new(tmp_path: Path) -> None:
    plain = GPT2Model(GPT2Config(vocab_size=100, n_embd=16, n_layer=1, n_head=2)).eval()
    plain.save_pretrained(tmp_path)
    model = LanguageModel(tmp_path, task="causal")
    with model.trace(IDS):
        logits = model.logits.save()
    with torch.no_grad():
        expected = plain(IDS).last_hidden_state @ plain.wte.weight.T
    torch.testing.assert_close(logits.value, expected, atol=1e-5, rtol=0)


def test_a_head_that_is_not_tied_is_new(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=100, num_attention_heads=4, tie_word_embeddings=False, **SIZES)
    LlamaForCausalLM(config).model.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="lm_head.weight"):
        LanguageModel(tmp_path, task="causal").load()


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin"])
def test_buffers_and_tied_weights_may_be_missing_in_any_form_of_file(
    tmp_path: Path, form: str
) -> None:
    torch.manual_seed(0)
    plain = BertForMaskedLM(BERT).eval()
    plain.register_buffer("extra", torch.ones(3))
    plain.save_pretrained(tmp_path, max_shard_size="8KB" if form == "shards" else "1GB")
    if form == "bin":
        (tmp_path / "model.safetensors").unlink()
        state = plain.state_dict()
        kept = {name: tensor for name, tensor in state.items() if "decoder" not in name}
        torch.save(kept, tmp_path / "pytorch_model.bin")
    model = LanguageModel(tmp_path)
    model.load()
    with model.trace(IDS):
        logits = model.logits.save()
    with torch.no_grad():
        torch.testing.assert_close(logits.value, plain(IDS).logits, atol=1e-5, rtol=0)


class _WithBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.register_buffer("positions", torch.arange(3))


def test_what_a_load_reports_is_told_apart() -> None:
    from insitu.models.loading.new_weights import new_weights

    module = _WithBuffer()
    report = {
        "missing_keys": ["positions", "second.weight", "first.bias"],
        "mismatched_keys": [("second.bias", (3,), (2,))],
    }
    assert new_weights(module, report) == ["first.bias", "second.bias"]
    both = {"missing_keys": {"first.weight", "second.weight"}}
    assert new_weights(module, both) == ["first.weight", "second.weight"]
    assert new_weights(module, {}) == []


def test_weights_of_another_size_are_new_where_that_is_allowed(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["n_positions"] //= 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError):
        LanguageModel(tmp_path).load()
    with pytest.raises(LoadError, match="wpe.*allow_new_weights"):
        LanguageModel(tmp_path, ignore_mismatched_sizes=True).load()
    options = {"ignore_mismatched_sizes": True, "allow_new_weights": True}
    assert type(LanguageModel(tmp_path, **options).load()) is GPT2LMHeadModel


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_an_adapter_that_lacks_a_weight_is_an_error(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_gpt2().save_pretrained(base)
    config = LoraConfig(
        target_modules=["c_attn"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        fan_in_fan_out=True,
    )
    module: Any = GPT2LMHeadModel.from_pretrained(base)
    get_peft_model(module, config).save_pretrained(adapter)
    whole: Any = LanguageModel(adapter).load()
    assert any("lora" in name for name, _ in whole.named_parameters())
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "h.1" in name and "lora_B" in name)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(LoadError, match="h.1.*lora_B.*allow_new_weights"):
        LanguageModel(adapter).load()
    assert LanguageModel(adapter, allow_new_weights=True).load() is not None


def test_a_model_in_memory_has_no_new_weights() -> None:
    from insitu import OptionError

    with pytest.raises(OptionError, match="'allow_new_weights'.*in memory already"):
        LanguageModel(tiny_gpt2(), allow_new_weights=True)
    with pytest.raises(OptionError, match="'allow_new_weights'.*in memory already"):
        VisionLanguageModel(llava(), allow_new_weights=True)
