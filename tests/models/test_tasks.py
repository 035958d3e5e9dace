"""Which class a language model is loaded with, by its config or by the user's word."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    ElectraModel,
    GPT2Model,
    T5Config,
    T5EncoderModel,
)

from insitu import LanguageModel, Model, OptionError, PathError, VisionLanguageModel
from tests.conftest import tiny_gpt2
from tests.models.kinds import bart, bert, clip, llava, t5, vit, whisper
from tests.thinning import sampled

IDS = torch.tensor([[3, 14, 15, 92, 65]])
BERT = BertConfig(
    vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
)
ELECTRA = ElectraConfig(**{**BERT.to_dict(), "embedding_size": 16, "model_type": "electra"})
T5 = T5Config(vocab_size=100, d_model=16, d_kv=4, num_heads=4, d_ff=32, num_layers=2)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (tiny_gpt2, "GPT2LMHeadModel"),
        (bert, "BertForMaskedLM"),
        (t5, "T5ForConditionalGeneration"),
        (bart, "BartForConditionalGeneration"),
        (lambda: BertModel(BERT), "BertModel"),
        (lambda: GPT2Model(tiny_gpt2().config), "GPT2Model"),
        (lambda: T5EncoderModel(T5), "T5EncoderModel"),
        (lambda: BertForSequenceClassification(BERT), "BertForSequenceClassification"),
        (lambda: BertForTokenClassification(BERT), "BertForTokenClassification"),
        (lambda: ElectraForPreTraining(ELECTRA), "ElectraForPreTraining"),
        (lambda: BertForPreTraining(BERT), "BertForMaskedLM"),  # it has this head among others
    ],
)
def test_the_class_is_that_of_the_weights(
    tmp_path: Path, make: Callable[[], nn.Module], expected: str
) -> None:
    make().save_pretrained(tmp_path)
    model = LanguageModel(tmp_path)
    assert not model.loaded and type(model.module).__name__ == expected
    assert type(model.load()).__name__ == expected


@pytest.mark.parametrize("form", sampled(["safetensors", "shards", "bin"], ["safetensors"]))
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: BertModel(BERT), "BertModel"),
        (bert, "BertForMaskedLM"),
        (lambda: ElectraModel(ELECTRA), "ElectraModel"),
        (lambda: ElectraForMaskedLM(ELECTRA), "ElectraForMaskedLM"),
    ],
)
def test_the_class_is_known_from_the_names_of_weights_where_a_config_names_none(
    tmp_path: Path, make: Callable[[], nn.Module], expected: str, form: str
) -> None:
    module: Any = make()
    module.save_pretrained(tmp_path, max_shard_size="8KB" if form == "shards" else "1GB")
    if form == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = LanguageModel(tmp_path)
    assert not model.loaded and type(model.module).__name__ == expected
    assert type(model.load()).__name__ == expected


def test_a_config_without_weights_is_of_the_likeliest_class(tmp_path: Path) -> None:
    T5Config(d_model=16, d_kv=4, num_heads=4, d_ff=32, num_layers=1).save_pretrained(tmp_path)
    assert type(LanguageModel(tmp_path).module).__name__ == "T5ForConditionalGeneration"
    BertConfig().save_pretrained(tmp_path)
    assert type(LanguageModel(tmp_path).module).__name__ == "BertForMaskedLM"


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("causal", "BertLMHeadModel"),
        ("text-generation", "BertLMHeadModel"),
        ("masked", "BertForMaskedLM"),
        ("fill-mask", "BertForMaskedLM"),
    ],
)
def test_a_task_can_be_given(tmp_path: Path, task: str, expected: str) -> None:
    bert().save_pretrained(tmp_path)
    assert type(LanguageModel(tmp_path, task=task).module).__name__ == expected


@pytest.mark.parametrize("task", ["encoder-decoder", "text2text-generation", "seq2seq"])
def test_an_encoder_and_decoder_has_names_of_several_kinds(tmp_path: Path, task: str) -> None:
    t5().save_pretrained(tmp_path)
    model = LanguageModel(tmp_path, task=task)
    assert type(model.module).__name__ == "T5ForConditionalGeneration"


def test_an_unknown_task_is_an_error_that_lists_them(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    with pytest.raises(OptionError) as caught:
        LanguageModel(tmp_path, task="image-classification")
    for name in ("'causal'", "'masked'", "'encoder-decoder'", "'fill-mask'", __file__):
        assert name in str(caught.value)


def test_a_task_that_the_type_has_no_model_for_is_an_error(tmp_path: Path) -> None:
    t5().save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="no causal language model of the type 't5'"):
        LanguageModel(tmp_path, task="causal")


def test_a_task_of_a_model_in_memory_is_an_error() -> None:
    with pytest.raises(OptionError, match="'task'.*in memory already"):
        LanguageModel(bert(), task="masked")


@pytest.mark.parametrize("make", [vit, clip, whisper])
def test_what_is_no_language_model_is_an_error_that_says_what_to_write(
    tmp_path: Path, make: Callable[[], nn.Module]
) -> None:
    module = make()
    module.save_pretrained(tmp_path)
    name = type(module).__name__
    with pytest.raises(OptionError, match=rf"{name} is no language model.*Model.from_pretrained"):
        LanguageModel(tmp_path)
    with pytest.raises(OptionError, match=rf"{name} is no language model.*Model\(module\)"):
        LanguageModel(module)
    with pytest.raises(OptionError, match=f"{name} is no vision-language model"):
        VisionLanguageModel(tmp_path)
    assert type(Model.from_pretrained(tmp_path).module) is type(module)


def test_a_model_with_images_is_an_error_that_says_what_to_write(tmp_path: Path) -> None:
    llava().save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="load it with `VisionLanguageModel`"):
        LanguageModel(tmp_path)


def test_what_has_no_head_says_that_it_has_no_logits(tmp_path: Path) -> None:
    plain = BertModel(BERT).eval()
    plain.save_pretrained(tmp_path)
    model = LanguageModel(tmp_path)
    model.load()
    with model.trace(IDS) as tracer:
        with pytest.raises(PathError, match=r"BertModel .*logits"):
            model.logits.save()
        hidden = tracer.output.last_hidden_state.save()
        last = model.encoder.layer[-1].output[0].save()
    with torch.no_grad():
        expected = plain(IDS).last_hidden_state
    torch.testing.assert_close(hidden.value, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(last.value, expected, atol=1e-5, rtol=0)


def test_a_masked_model_is_read_and_written_as_by_hooks(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    plain = AutoModelForMaskedLM.from_pretrained(tmp_path)
    model = LanguageModel(tmp_path)
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            model.bert.encoder.layer[0].output[0][:, 1] = 0
            changed = model.output.logits.save()
        with tracer.invoke(IDS[:, :3]):
            shorter = model.output.logits.save()
    assert shorter.shape == (1, 3, 100)

    def zero(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.clone()
        hidden[:, 1] = 0
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with torch.no_grad():
        torch.testing.assert_close(shorter.value, plain(IDS[:, :3]).logits, atol=1e-5, rtol=0)
        handle = plain.bert.encoder.layer[0].register_forward_hook(zero)
        torch.testing.assert_close(changed.value, plain(IDS).logits, atol=1e-5, rtol=0)
        handle.remove()


def test_a_masked_model_does_not_generate(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    model = LanguageModel(tmp_path)
    with pytest.raises(OptionError, match="BertForMaskedLM does not generate: use `trace`") as e:
        model.generate(IDS, max_new_tokens=2)
    assert __file__ in str(e.value)


def test_token_types_in_lists_reach_the_model() -> None:
    module = bert()
    model = LanguageModel(module)
    types = [0, 0, 1, 1, 1]
    with model.trace({"input_ids": IDS[0].tolist(), "token_type_ids": types}):
        logits = model.output.logits.save()
    with torch.no_grad():
        expected = module(IDS, token_type_ids=torch.tensor([types])).logits
        assert not torch.allclose(expected, module(IDS).logits)
    assert torch.equal(logits.value, expected)
