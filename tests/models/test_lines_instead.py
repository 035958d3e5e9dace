"""Lines that errors say to write, run as they stand, against weights and plain PyTorch hooks."""

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaForCausalLM

from insitu import InsituError, LanguageModel
from tests.conftest import tiny_gpt2, tiny_llama
from tests.fidelity.architectures import spread_out
from tests.thinning import sampled

IDS = torch.tensor([[5, 17, 42, 8, 23, 61]])


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    module = {"gpt2": tiny_gpt2, "llama": tiny_llama}[request.param]()
    spread_out(module)
    module.set_attn_implementation("eager")
    return LanguageModel(module)


def message(use: Callable[[], object]) -> str:
    """The message of the error that something raises, in one line."""
    with pytest.raises(InsituError) as caught:
        use()
    return str(caught.value).splitlines()[0]


def lines(use: Callable[[], object]) -> list[str]:
    """The lines that the error says to write."""
    _, written, instead = message(use).partition(": write `")
    assert written, instead
    return re.findall(r"`([^`]+)`", "`" + instead)


def run(model: LanguageModel, line: str) -> Any:
    """What a line gives in a block."""
    with model.trace(IDS):
        value = eval(line, {"model": model, "torch": torch})
        if hasattr(value, "save"):
            value = value.save()
    return getattr(value, "value", value)


def seen(model: LanguageModel, path: str) -> torch.Tensor:
    """What a module gives, as a plain hook sees it."""
    found: list[Any] = []
    part = model.module.get_submodule(path)
    handle = part.register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        model.module(input_ids=IDS, use_cache=False)
    handle.remove()
    return found[0]


def projected(model: LanguageModel, letter: str, layer: int) -> torch.Tensor:
    """Queries, keys or values as their layer makes them, `(batch, position, head, d_head)`."""
    if model.module.config.model_type == "gpt2":
        three = seen(model, f"transformer.h.{layer}.attn.c_attn").chunk(3, -1)
        return three["qkv".index(letter)].unflatten(-1, (4, 4))
    made = seen(model, f"model.layers.{layer}.self_attn.{letter}_proj")
    return made.unflatten(-1, (-1, 4))


@pytest.mark.parametrize("model", sampled(["gpt2", "llama"], ["llama"]), indirect=True)
@pytest.mark.parametrize("letter", ["q", "k", "v"])
def test_the_line_for_a_hook_of_projections_reads_them_unrotated(
    model: LanguageModel, letter: str
) -> None:
    named = lines(lambda: getattr(model.blocks[1].attention, f"hook_{letter}"))
    expected = projected(model, letter, 1)
    for line in named:
        value = run(model, line)
        value = value if "hook(" in line else value.transpose(1, 2)
        assert torch.equal(value, expected), line
    rotates = model.module.config.model_type == "llama" and letter != "v"
    assert len(named) == (1 if rotates else 2)


def test_the_lines_for_a_hook_of_rotated_queries_can_be_run(model: LanguageModel) -> None:
    with_hooks = model.module.config.model_type == "llama"
    first, *others = lines(lambda: model.blocks[1].attention.hook_rot_q)
    assert len(others) == with_hooks
    value = run(model, first).transpose(1, 2)
    assert torch.equal(value, projected(model, "q", 1)) is not with_hooks
    for other in others:
        assert torch.equal(run(model, other), value)


def with_biases() -> LlamaForCausalLM:
    return tiny_llama(attention_bias=True, mlp_bias=True)


def interleaved() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        vocab_size=100, max_position_embeddings=40,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).eval()


@pytest.mark.parametrize("make", sampled([tiny_gpt2, with_biases, interleaved], [tiny_gpt2]))
def test_lines_for_biases_are_what_layers_add(make: Callable[[], Any]) -> None:
    module = make()
    spread_out(module)
    model = LanguageModel(module)
    without = copy.deepcopy(module)
    for name, weight in without.named_parameters():
        if name.endswith("bias") and "norm" not in name and "ln_" not in name:
            weight.data.zero_()
    other = LanguageModel(without)
    for name, hook in (("b_Q", "hook_q"), ("b_K", "hook_k"), ("b_V", "hook_v")):
        (line,) = lines(partial(getattr, model.blocks[1].attention, name))
        # The input of the projections is the same where nothing before them adds a bias.
        added = run_from_embeddings(model, hook) - run_from_embeddings(other, hook)
        assert torch.allclose(run(model, line).expand_as(added[0]), added[0], atol=1e-5), line
        every = run(model, *lines(partial(getattr, model, name)))
        assert torch.equal(every[1], run(model, line))


def run_from_embeddings(model: LanguageModel, hook: str) -> torch.Tensor:
    """A hook's value in block 1, given a fixed input of that block."""
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(1, 6, 16, generator=generator)
    with model.trace(IDS):
        model.blocks[1].residual_in = given
        value = model.hook(f"blocks.1.attn.{hook}").output.save()
    return value.value


LAYERS = {
    "gpt2": {"b_O": "attn.c_proj", "b_in": "mlp.c_fc", "b_out": "mlp.c_proj"},
    "llama": {
        "b_O": "self_attn.o_proj",
        "b_in": "mlp.up_proj",
        "b_gate": "mlp.gate_proj",
        "b_out": "mlp.down_proj",
    },
}


@pytest.mark.parametrize("make", [tiny_gpt2, with_biases])
def test_lines_for_biases_of_whole_layers_are_their_parameters(make: Callable[[], Any]) -> None:
    module = make()
    spread_out(module)
    model = LanguageModel(module)
    block = module.get_submodule(model.blocks[2].path)
    for name, path in LAYERS[module.config.model_type].items():
        (line,) = lines(partial(getattr, model.blocks[2], name))
        assert run(model, line) is block.get_submodule(path).bias, line


def test_a_model_without_biases_says_so(model: LanguageModel) -> None:
    assert "has no bias" in message(lambda: model.b_U)
    if model.module.config.model_type == "llama":
        for name in ("b_Q", "b_K", "b_V", "b_O"):
            said = message(partial(getattr, model.blocks[1].attention, name))
            assert "`model.model.layers[1].self_attn." in said and "has no bias" in said
        assert "`model.model.layers[0].mlp.up_proj`, has no bias" in message(
            lambda: model.blocks[0].mlp.b_in
        )
        assert "no embedding of positions" in message(lambda: model.W_pos)
    else:
        (line,) = lines(lambda: model.W_pos)
        assert run(model, line) is model.module.transformer.wpe.weight


def test_biases_that_are_not_loaded_are_not_loaded_by_an_error() -> None:
    eiffel = LanguageModel("insitu/eiffel")
    (line, *_) = lines(lambda: eiffel.blocks[1].attention.b_Q)
    assert line == "model.load()" and not eiffel.loaded
    (line,) = lines(lambda: eiffel.blocks[1].mlp.b_out)
    assert not eiffel.loaded
    assert run(eiffel, line) is eiffel.module.transformer.h[1].mlp.c_proj.bias
    (line,) = lines(lambda: eiffel.blocks[1].attention.b_K)
    bias = eiffel.module.transformer.h[1].attn.c_attn.bias
    assert torch.equal(run(eiffel, line), bias[128:256].view(8, 16))


def test_the_lines_for_circuits_multiply_each_head_with_its_keys_and_values(
    model: LanguageModel,
) -> None:
    attention = model.blocks[1].attention
    (ov,), (qk,) = lines(lambda: attention.OV), lines(lambda: attention.QK)
    w_q, w_k, w_v, w_o = attention.W_Q, attention.W_K, attention.W_V, attention.W_O
    shared = len(w_q) // len(w_k)
    found = run(model, ov), run(model, qk)
    for head in range(4):
        assert torch.allclose(found[0][head], w_v[head // shared] @ w_o[head], atol=1e-6)
        assert torch.allclose(found[1][head], w_q[head] @ w_k[head // shared].T, atol=1e-6)
    every = run(model, *lines(lambda: model.OV))
    assert every.shape == (model.n_layers, *found[0].shape) and torch.equal(every[1], found[0])
