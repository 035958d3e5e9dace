"""Weights by their standard names are read: what is written into them is refused at its line."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from insitu import LanguageModel, OperationError
from insitu.graph.read_only import ReadOnly
from tests.conftest import tiny_gpt2, tiny_llama
from tests.thinning import thinned

IDS = torch.tensor([[5, 17, 42, 8, 23, 61]])
NAMES = ["W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "W_gate", "W_E", "W_U"]


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return LanguageModel({"gpt2": tiny_gpt2, "llama": tiny_llama}[request.param]())


def weight(model: LanguageModel, name: str) -> torch.Tensor:
    block = model.blocks[1]
    if name in ("W_E", "W_U"):
        return getattr(model, name)
    return getattr(block.mlp if name in ("W_in", "W_out", "W_gate") else block.attention, name)


def state(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def augmented(w: Any) -> None:
    w += 1


def item(w: Any) -> None:
    w[0] = 0


def part_of_a_part(w: Any) -> None:
    w[0][..., :2] *= 2


def of_iteration(w: Any) -> None:
    for row in w:
        row.zero_()


WRITES: list[Callable[[Any], Any]] = [
    item,
    augmented,
    part_of_a_part,
    of_iteration,
    lambda w: w.zero_(),
    lambda w: w.mT.mul_(2),
    lambda w: w.data.copy_(torch.zeros(())),
    lambda w: w.detach().add_(1),
    lambda w: torch.add(w, 1, out=w),
    lambda w: nn.init.zeros_(w),
    lambda w: nn.functional.relu(w, inplace=True),
    lambda w: w.unbind(0)[0].neg_(),
    lambda w: torch._foreach_mul_([w], 2.0),
    lambda w: setattr(w, "data", torch.zeros(2)),
    lambda w: nn.Parameter(w),
    lambda w: torch.vmap(lambda row: row.mul_(2))(w),
    lambda w: torch.vmap(lambda row: row[:1].zero_())(w),
    lambda w: torch.func.functionalize(lambda whole: whole.add_(1))(w),
]


@pytest.fixture(params=["gpt2", "llama"], scope="module")
def unchanged(request: pytest.FixtureRequest) -> LanguageModel:
    """A model that many tests share: each of them shows that its weights are as they were."""
    return LanguageModel({"gpt2": tiny_gpt2, "llama": tiny_llama}[request.param]())


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", thinned(NAMES, [*NAMES][:3]))
def test_a_write_is_refused_and_changes_nothing(
    unchanged: LanguageModel, name: str, write: Callable[[Any], Any]
) -> None:
    model = unchanged
    if name == "W_gate" and model.module.config.model_type == "gpt2":
        pytest.skip("its MLP has no gate")
    before = state(model)
    with pytest.raises(OperationError, match=rf"`{name}.clone\(\)`") as caught:
        write(weight(model, name))
    assert __file__ in str(caught.value)
    after = state(model)
    assert all(torch.equal(before[one], after[one]) for one in before)


@pytest.mark.parametrize("name", NAMES)
def test_in_a_block_too_whatever_is_written(unchanged: LanguageModel, name: str) -> None:
    model = unchanged
    if name == "W_gate" and model.module.config.model_type == "gpt2":
        pytest.skip("its MLP has no gate")
    with pytest.raises(OperationError, match="is there to be read"), model.trace(IDS):
        weight(model, name)[0] = model.blocks[0].residual_out[0, 0, 0]
    with pytest.raises(OperationError, match="is there to be read"), model.trace(IDS):
        value = weight(model, name)
        value += model.blocks[0].residual_out[0, 0, 0]


def test_a_lookup_does_not_normalise_them_in_place(model: LanguageModel) -> None:
    with pytest.raises(OperationError, match="is there to be read"), model.trace(IDS):
        nn.functional.embedding(model.logits.argmax(-1), model.W_E, max_norm=0.01).save()


def test_the_parameter_that_the_error_names_changes_the_model(model: LanguageModel) -> None:
    for name in NAMES:
        if name == "W_gate" and model.module.config.model_type == "gpt2":
            continue
        with pytest.raises(OperationError) as caught:
            weight(model, name)[:] = 0
        line = str(caught.value).rpartition("`torch.no_grad()`: `")[2].partition("`")[0]
        parameter = eval(line, {"model": model})
        with torch.no_grad():
            parameter.zero_()
        assert not weight(model, name).any()


def test_transforms_of_functions_compute_with_them(model: LanguageModel) -> None:
    w = model.blocks[1].attention.W_O
    plain = w.clone()
    for transformed in (
        torch.vmap(lambda head: (head[0] ** 2).sum()),
        torch.func.grad(lambda whole: (whole**3).sum()),
        torch.func.jacrev(lambda whole: whole.sum((0, 1))),
    ):
        found = transformed(w)
        assert type(found) is torch.Tensor
        torch.testing.assert_close(found, transformed(plain))


def test_what_is_computed_with_them_is_a_plain_tensor(model: LanguageModel) -> None:
    attention = model.blocks[1].attention
    w = attention.W_O
    x = torch.randn(4, 3, 4)
    for value in (x @ w, w + 1, w.clone(), w.float() * 2, torch.stack([w, w]), w.sum(), w[[0, 1]]):
        assert type(value) is torch.Tensor
    assert type(w[0]) is type(w.mT) is type(w.detach()) is ReadOnly
    copied = w.clone()
    copied[0] = 0
    parameter = nn.Parameter(w.clone())
    assert parameter.requires_grad and w[0].any()
    target = torch.empty_like(w)
    target.copy_(w)
    target[0] = w[1]
    assert type(target) is torch.Tensor and torch.equal(target[0], w[1])


def test_they_are_copied_kept_and_read_elsewhere_as_plain_tensors(
    model: LanguageModel, tmp_path: Path
) -> None:
    w = model.W_U
    plain = model.module.lm_head.weight.detach().T
    buffer = io.BytesIO()
    torch.save(w, buffer)
    buffer.seek(0)
    save_file({"w": w.contiguous()}, tmp_path / "w.safetensors")
    for other in (
        copy.deepcopy(w),
        pickle.loads(pickle.dumps(w)),
        torch.load(buffer),
        load_file(tmp_path / "w.safetensors")["w"],
        torch.as_tensor(np.asarray(w)).clone(),
        torch.tensor(w.tolist()),
    ):
        assert type(other) is torch.Tensor and torch.equal(other, plain)
        other[0] = 0  # is nobody else's
    assert torch.equal(model.module.lm_head.weight.T, plain) and plain[0].any()
    assert repr(w) == repr(plain)


def test_a_block_computes_with_them(model: LanguageModel) -> None:
    w = model.W_U
    plain = model.module.lm_head.weight.detach().T
    with model.trace(IDS) as tracer:
        stream = model.blocks[1].residual_out
        right = (stream @ w).save()
        function = nn.functional.linear(stream, w.T).save()
        left = torch.matmul(w.T, stream.mT).save()
        model.blocks[2].residual_out = stream + w[:, 7]
        model.blocks[2].residual_out[:, -1] = w[:, 5]
        written = model.blocks[2].residual_out.save()
        hidden = stream.save()
    assert torch.equal(right.value, hidden.value @ plain)
    assert torch.equal(function.value, nn.functional.linear(hidden.value, plain.T))
    assert torch.equal(left.value, plain.T @ hidden.value.mT)
    assert torch.equal(written.value[0, -1], plain[:, 5])
    assert torch.equal(written.value[0, 0], hidden.value[0, 0] + plain[:, 7])
    assert tracer.job is not None


def test_a_prompt_of_embeddings_may_be_a_part_of_one(model: LanguageModel) -> None:
    with model.trace(inputs_embeds=model.W_E[5:9][None]):
        logits = model.logits.save()
    with model.trace([[5, 6, 7, 8]]):
        expected = model.logits.save()
    assert torch.allclose(logits.value, expected.value, atol=1e-6)


def test_sums_have_gradients_for_what_the_user_trains(model: LanguageModel) -> None:
    vector = torch.zeros(16, requires_grad=True)
    (vector @ model.W_U).logsumexp(-1).backward()
    plain = model.module.lm_head.weight.detach().T
    expected = torch.autograd.grad((vector @ plain).logsumexp(-1), vector)[0]
    assert torch.equal(vector.grad, expected)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC) tensor support:UserWarning")
def test_a_sparse_weight_is_read_as_what_its_layer_computes_with(layout: torch.layout) -> None:
    module = tiny_llama()
    layer = module.model.layers[1].mlp.down_proj
    dense = torch.where(layer.weight.detach() > 0, layer.weight.detach(), 0.0)
    layer.weight = nn.Parameter(dense.to_sparse(layout=layout), requires_grad=False)
    model = LanguageModel(module)
    found = model.blocks[1].mlp.W_out
    torch.testing.assert_close(found.clone(), dense.T, rtol=0, atol=0)
    with pytest.raises(OperationError, match="there to be read"):
        found[0] = 0
