"""Models whose config lacks an attribute run as they do without the library."""

import inspect
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    PretrainedConfig,
    XLNetConfig,
    XLNetLMHeadModel,
)

from insitu import LanguageModel, OptionError
from insitu.models.configuration import first_id, said, text_config
from tests.conftest import tiny_gpt2
from tests.models.kinds import bart, bert, llava, t5
from tests.thinning import sampled

IDS = torch.tensor([[3, 14, 15, 92, 65]])


def _attributes(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The attributes of a config and of the configs in it."""
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _attributes(value, (*path, name))
        yield (*path, name)


def _delete(config: Any, path: tuple[str, ...]) -> None:
    for name in path[:-1]:
        config = getattr(config, name)
    del vars(config)[path[-1]]


@pytest.mark.thorough
@pytest.mark.parametrize("make", sampled([tiny_gpt2, t5, llava], [tiny_gpt2]))
def test_any_attribute_of_a_config_may_be_missing(make: Callable[[], nn.Module]) -> None:
    _check_without_each(make, [slice(None)])


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_gpt2, bert, t5, bart, llava])
def test_batches_run_without_any_attribute(make: Callable[[], nn.Module]) -> None:
    _check_without_each(make, [slice(None), slice(2)])


def _check_without_each(make: Callable[[], nn.Module], cuts: list[slice]) -> None:
    """Compares traces of a model without each of its config's attributes with plain forwards."""
    whole: Any = make()
    before = deepcopy(whole.config)
    inputs = {"input_ids": IDS}
    if "decoder_input_ids" in inspect.signature(whole.forward).parameters:
        inputs["decoder_input_ids"] = IDS[:, :2]
    tried = 0
    for path in list(_attributes(before)):
        config = deepcopy(before)
        module = deepcopy(whole)
        for part in module.modules():  # all of a model's modules share its config
            if getattr(part, "config", None) is not None:
                part.config = _same(part.config, module.config, config)
        _delete(config, path)
        try:
            with torch.no_grad():
                expected = module(**inputs, use_cache=False).logits
        except (TypeError, AttributeError):  # the model itself needs it
            LanguageModel(module)
            continue
        tried += 1
        model = LanguageModel(module)
        with model.trace() as tracer:
            found: list[Any] = []
            for cut in cuts:
                with tracer.invoke({name: ids[:, cut] for name, ids in inputs.items()}):
                    found.append(
                        model.output.logits.save() if len(cuts) == 1 else model.logits.save()
                    )
        logits = found[0]
        torch.testing.assert_close(logits.value, expected, atol=1e-5, rtol=0, msg=str(path))
    assert tried > 20


def _same(own: Any, whole: Any, config: Any) -> Any:
    """The part of a copied config that stands where a module's own stands in the original."""
    if own is whole:
        return config
    for name, value in vars(whole).items():
        if value is own:
            return getattr(config, name)
    return own


@pytest.mark.parametrize("name", ["pad_token_id", "eos_token_id", "bos_token_id", "vocab_size"])
def test_a_model_generates_without_an_attribute(name: str) -> None:
    module = tiny_gpt2()
    with torch.no_grad():
        expected = module.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    vars(module.config).pop(name, None)
    with LanguageModel(module).generate(IDS, max_new_tokens=3, do_sample=False) as generator:
        pass
    assert torch.equal(generator.output, expected)


@pytest.mark.parametrize("context", [-1, 0, None, "none", {"a": 1}])
def test_a_context_that_is_no_number_of_positions_is_no_limit(context: Any) -> None:
    config = GPT2Config(vocab_size=100, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    module = GPT2LMHeadModel(config).eval()
    vars(config)["n_positions"] = context  # `max_position_embeddings` is another name for it
    with LanguageModel(module).trace(IDS) as tracer:
        logits = tracer.output.logits.save()
    with torch.no_grad():
        assert torch.equal(logits.value, module(IDS).logits)


def test_a_model_without_a_limit_runs() -> None:
    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=100, d_model=16, n_layer=2, n_head=4, d_inner=32)
    module = XLNetLMHeadModel(config).eval()
    with LanguageModel(module).trace(IDS) as tracer:
        logits = tracer.output.logits.save()
    with torch.no_grad():
        assert torch.equal(logits.value, module(IDS).logits)


def test_a_model_with_several_embeddings_is_refused() -> None:
    config = MusicgenDecoderConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32,
        max_position_embeddings=16, pad_token_id=0, bos_token_id=0,
    )  # fmt: skip
    with pytest.raises(OptionError, match=r"no one embedding.*`Model\(module\)`"):
        LanguageModel(MusicgenForCausalLM(config))


class _Broken:
    """A config that names parts that it does not have."""

    eos_token_id = None

    @property
    def pad_token_id(self) -> int:
        raise KeyError("pad")

    def get_text_config(self) -> Any:
        raise ValueError("several")


def test_what_a_config_cannot_tell_is_the_default() -> None:
    config = _Broken()
    assert text_config(config) is config
    assert said(config, "pad_token_id", "eos_token_id", default=7) == 7
    assert said(None, "pad_token_id") is None
    assert (first_id(None, [], [3, 4]), first_id(True, "a"), first_id(0, 1)) == (3, None, 0)
