"""Quantised linear layers, as far as they run on a CPU, against plain Transformers."""

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from insitu import ExecutionError, LanguageModel
from tests.models.kinds import outputs_of
from tests.thinning import sampled

IDS = torch.tensor([[3, 14, 15, 92, 65]])
PATH = "model.layers.0.mlp.up_proj"
OPTIONS = {"max_new_tokens": 4, "do_sample": False}

pytestmark = [pytest.mark.filterwarnings("default")]  # these packages warn of much


def four_bits() -> Any:
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def eight_bits() -> Any:
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


def torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig())


def quanto() -> Any:
    return transformers.QuantoConfig(weights="int8")


# It warns in every program that imports Transformers, so development goes without it: only
# `make test-matrix` has it, beside the oldest Transformers.
NEEDS_TORCHAO = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, max_position_embeddings=64, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(
    params=["torch", four_bits, eight_bits, pytest.param(torchao, marks=NEEDS_TORCHAO), quanto],
    ids=lambda kind: kind if isinstance(kind, str) else kind.__name__,
)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, LanguageModel]:
    """A quantised model, and the same as a `LanguageModel`, not loaded yet if it can be so."""
    if request.param == "torch":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantised = torch.ao.quantization.quantize_dynamic(
                small_llama(), {nn.Linear}, dtype=torch.qint8
            ).eval()
        return quantised, LanguageModel(copy.deepcopy(quantised))
    small_llama().save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=request.param(), device_map="cpu"
    )
    model = LanguageModel(tmp_path, quantization_config=request.param(), device_map="cpu")
    assert not model.loaded
    return plain, model


def run(module: Callable[..., Any], **kwargs: Any) -> Any:
    with torch.no_grad():
        return module(**kwargs)


def hooked(module: Any, change: Callable[[torch.Tensor], torch.Tensor], call: Any) -> Any:
    part = module.get_submodule(PATH)
    handle = part.register_forward_hook(lambda module, args, output: change(output))
    try:
        return call()
    finally:
        handle.remove()


def test_quantised_layers_are_in_the_tree_and_are_read(pair: tuple[Any, LanguageModel]) -> None:
    plain, model = pair
    for _ in range(2):  # before and after the weights are loaded
        with model.trace(IDS):
            read = model.model.layers[0].mlp.up_proj.output
            shape, dtype = read.shape, read.dtype
            read, logits = read.save(), model.lm_head.output.save()
        expected = outputs_of(plain, PATH, plain, input_ids=IDS, use_cache=False)[0]
        assert torch.equal(read.value, expected)
        assert (shape, dtype) == (expected.shape, expected.dtype)
        assert torch.equal(logits.value, run(plain, input_ids=IDS, use_cache=False).logits)
    layer = model.model.layers[0].mlp.up_proj.module
    assert type(layer) is type(plain.get_submodule(PATH))
    assert type(layer.weight) is not nn.Parameter or type(layer) is not nn.Linear


def test_they_are_written(pair: tuple[Any, LanguageModel]) -> None:
    plain, model = pair
    with model.trace(IDS):
        model.model.layers[0].mlp.up_proj.output[:, 2] *= 3
        logits = model.lm_head.output.save()

    def change(output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output[:, :2], output[:, 2:3] * 3, output[:, 3:]], 1)

    expected = hooked(plain, change, lambda: run(plain, input_ids=IDS, use_cache=False).logits)
    assert torch.equal(logits.value, expected)


def test_they_are_generated_through(pair: tuple[Any, LanguageModel]) -> None:
    plain, model = pair
    with model.generate(IDS, **OPTIONS) as generator, generator.every_step():
        model.model.layers[0].mlp.up_proj.output += 1
        logits = generator.logits().save()
    kwargs = {"input_ids": IDS, **OPTIONS}

    def change(output: torch.Tensor) -> torch.Tensor:
        return output + 1

    expected = hooked(plain, change, lambda: run(plain.generate, **kwargs))
    seen = hooked(plain, change, lambda: outputs_of(plain, "lm_head", plain.generate, **kwargs))
    assert torch.equal(generator.output, expected)
    for own, step in zip(logits.value, seen, strict=True):
        assert torch.equal(own, step[:, -1])


def test_prompts_are_as_if_each_ran_alone(pair: tuple[Any, LanguageModel]) -> None:
    plain, model = pair
    saved = []
    prompts = [IDS, IDS[:, :3], torch.tensor([[7, 8, 9, 10, 11, 12, 13]])]
    with model.trace() as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                saved.append(model.lm_head.output.save())
    for ids, logits in zip(prompts, saved, strict=True):
        expected = run(plain, input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(logits.value, expected, atol=1e-5, rtol=0)


def test_gradients_go_through_them(pair: tuple[Any, LanguageModel]) -> None:
    plain, model = pair
    seen: list[torch.Tensor] = []

    def keep(output: torch.Tensor) -> torch.Tensor:
        seen.append(output if output.requires_grad else output.requires_grad_())
        return seen[-1]

    logits = hooked(plain, keep, lambda: plain(input_ids=IDS, use_cache=False).logits)
    (expected,) = torch.autograd.grad(logits[0, -1].max(), seen, allow_unused=True)
    own = type(plain.get_submodule(PATH)).__module__.startswith("torch.ao")
    assert (expected is None) == own  # torch's own have none
    with pytest.raises(ExecutionError, match="does not depend on it") if own else nullcontext():
        with model.trace(IDS):
            gradient = model.model.layers[0].mlp.up_proj.output.grad.save()
            model.lm_head.output[0, -1].max().backward()
        torch.testing.assert_close(gradient.value, expected)


@pytest.mark.parametrize("config", sampled([four_bits, eight_bits], [four_bits]))
def test_a_folder_may_be_quantised_already(tmp_path: Path, config: Callable[[], Any]) -> None:
    small_llama().save_pretrained(tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", quantization_config=config(), device_map="cpu"
    ).save_pretrained(tmp_path / "quantised")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", device_map="cpu")
    model = LanguageModel(tmp_path / "quantised", device_map="cpu")
    for _ in range(2):
        with model.trace(IDS):
            read = model.model.layers[0].mlp.up_proj.output
            shape, dtype = read.shape, read.dtype
            logits = model.lm_head.output.save()
        expected = run(plain, input_ids=IDS, use_cache=False).logits
        assert torch.equal(logits.value, expected)
        assert shape == (1, 5, 128) and dtype == expected.dtype


@pytest.mark.thorough
def test_a_weight_that_is_a_method_leaves_the_names_of_its_block() -> None:
    """torch's own dynamic quantisation gives layers whose `weight` is called."""
    module = small_llama()
    layer = module.get_submodule("model.layers.0")
    torch.ao.quantization.quantize_dynamic(
        layer.get_submodule("mlp"),
        {"up_proj": torch.ao.quantization.default_dynamic_qconfig},
        inplace=True,
    )
    kept: list[torch.Tensor] = []
    handle = layer.get_submodule("self_attn.o_proj").register_forward_pre_hook(
        lambda _, args: kept.append(args[0])
    )
    with torch.no_grad():
        logits = module(IDS, use_cache=False).logits
    handle.remove()
    model = LanguageModel(module)
    with model.trace(IDS):
        z = model.blocks[0].attention.z.save()
        ours = model.logits.save()
    torch.testing.assert_close(z.value.transpose(1, 2).flatten(2), kept[0])
    torch.testing.assert_close(ours.value, logits)
