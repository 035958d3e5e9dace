"""Gradients go back to the residual stream for all receivers at once, and come to the same."""

import functools
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from insitu import LanguageModel
from insitu.methods import edge_attribution
from tests.fidelity.zoo import ZOO, module_of
from tests.methods.edges_by_hand import CLEAN, CORRUPTED
from tests.methods.edges_by_hooks import PATHS, scores
from tests.thinning import sampled, thinned

THERE = [name for name in PATHS if name in ZOO]
BY_AUTOGRAD = {"olmo2": ["a0", "a1"]}  # norms of all heads together stand behind its projections


def difference(logits: Tensor) -> Tensor:
    return logits[-1, 3] - logits[-1, 50]


def assert_same(result: Any, expected: dict[tuple[str, str], float]) -> None:
    found = {(c.labels["sender"], c.labels["receiver"]): c.value for c in result.cells()}
    assert found.keys() == expected.keys()
    values = torch.tensor([[found[edge], expected[edge]] for edge in expected])
    assert values[:, 1].abs().max() > 1e-3
    scale = float(values.abs().max())
    torch.testing.assert_close(values[:, 0], values[:, 1], rtol=1e-3, atol=1e-4 * scale)


@contextmanager
def counted_backwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts backward passes through runs of the model, and those through a single norm."""
    count: Counter[str] = Counter()
    own = torch.autograd.grad

    def grad(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        count["norm" if isinstance(outputs, Tensor) else "run"] += 1
        return own(outputs, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", grad)
        yield count


@contextmanager
def counted_forwards(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The rows of each forward of a model. A hook of one's own would see each prompt alone."""
    rows: list[int] = []
    own = type(module).forward

    @functools.wraps(own)
    def forward(self: nn.Module, input_ids: Any = None, **kwargs: Any) -> Any:
        rows.append(len(input_ids))
        return own(self, input_ids, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(module), "forward", forward)
        yield rows


def gone_back_by_autograd(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The parts whose gradients went back by autograd, as the log has it."""
    said = [r.getMessage() for r in caplog.records if "for each receiver" in r.getMessage()]
    return [part for line in said for part in line.split(" by a backward")[0].split(" ")[4:]]


@pytest.mark.parametrize("name", sampled(THERE, ["gpt2"]))
def test_scores_are_those_of_plain_hooks(name: str, caplog: pytest.LogCaptureFixture) -> None:
    module = module_of(name)
    expected = scores(module, PATHS[name], CLEAN, CORRUPTED, difference)
    with caplog.at_level(logging.INFO, "insitu"):
        result = edge_attribution(LanguageModel(module), CLEAN, CORRUPTED, difference)
    assert_same(result, expected)
    left = [part.rstrip(",") for part in gone_back_by_autograd(caplog)]
    assert left == BY_AUTOGRAD.get(name, [])


@pytest.mark.thorough
def test_in_half_precision_scores_are_as_close_as_its_numbers_allow() -> None:
    module = module_of("gpt2")
    expected = scores(module, PATHS["gpt2"], CLEAN, CORRUPTED, difference)
    result = edge_attribution(LanguageModel(module.bfloat16()), CLEAN, CORRUPTED, difference)
    found = {(c.labels["sender"], c.labels["receiver"]): c.value for c in result.cells()}
    values = torch.tensor([[found[edge], expected[edge]] for edge in expected])
    off = (values[:, 0] - values[:, 1]).norm() / values[:, 1].norm()
    assert off < 0.1


@pytest.mark.no_wire
@pytest.mark.parametrize(
    "name",
    sampled(thinned(["gpt2", "llama", "gpt-neox", "gemma2", "phi3"], ["gpt2", "gemma2"]), ["gpt2"]),
)
@pytest.mark.parametrize("steps", sampled([0, 2], [0]))
def test_pairs_take_a_forward_for_each_kind_of_run_and_one_backward(
    name: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of(name)
    model = LanguageModel(module)
    clean, corrupted = [CLEAN.tolist()] * 16, [[5, 31, 42, 77, 60 + n] for n in range(16)]
    for _ in range(2):  # what is tried once for batches of a form is not counted
        with counted_forwards(module, monkeypatch) as rows, counted_backwards(monkeypatch) as count:
            result = edge_attribution(model, clean, corrupted, difference, steps=steps)
    parts = len({label.partition(".")[0] for label in result.axis("receiver").labels}) - 1
    # One for each in the trial of a few tokens, and one of all pairs.
    assert count["run"] == parts + max(steps, 1)
    assert count["norm"] == parts * (1 + 16 * max(steps, 1))
    assert [n for n in rows if n >= 16] == ([64] if steps else [16, 16])


@pytest.mark.thorough
@pytest.mark.no_wire
def test_where_autograd_goes_back_receivers_take_a_pass_each_for_all_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = LanguageModel(module_of("olmo2"))
    found = []
    for pairs in (1, 8):
        with counted_backwards(monkeypatch) as count:
            edge_attribution(
                model, [CLEAN.tolist()] * pairs, [CORRUPTED.tolist()] * pairs, difference
            )
        found.append(count["run"])
    assert found[0] == found[1]
    assert found[0] > 16  # each of the 8 heads of either block


class Scaled(nn.Module):
    """A layer whose output grows with what it is given, so that no matrix makes it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, given: Tensor) -> Tensor:
        return self.layer(given) * given.norm(dim=-1, keepdim=True)


@pytest.mark.thorough
def test_what_no_matrix_makes_goes_back_by_autograd(caplog: pytest.LogCaptureFixture) -> None:
    module: Any = module_of("llama")
    attention = module.model.layers[1].self_attn
    attention.q_proj = Scaled(attention.q_proj).eval()
    expected = scores(module, PATHS["llama"], CLEAN, CORRUPTED, difference)
    with caplog.at_level(logging.INFO, "insitu"):
        result = edge_attribution(LanguageModel(module), CLEAN, CORRUPTED, difference)
    assert_same(result, expected)
    assert gone_back_by_autograd(caplog) == ["a1"]


def attributed(model: LanguageModel) -> Any:
    return edge_attribution(model, CLEAN, CORRUPTED, difference)


def assert_as_plain(name: str, model: LanguageModel, module: nn.Module) -> None:
    assert_same(attributed(model), scores(module, PATHS[name], CLEAN, CORRUPTED, difference))


@pytest.mark.thorough
@pytest.mark.parametrize("how", sampled(["in place", "data"], ["in place"]))
def test_norms_that_are_equal_at_first_are_told_apart(how: str) -> None:
    module: Any = module_of("llama")
    for block in module.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            nn.init.ones_(norm.weight)
    model = LanguageModel(module)
    assert_as_plain("llama", model, module)
    for block in module.model.layers:
        with torch.no_grad():
            weight = block.post_attention_layernorm.weight
            (weight.data if how == "data" else weight).copy_(torch.linspace(-1, 2, len(weight)))
    assert_as_plain("llama", model, module)


@pytest.mark.thorough
def test_norms_side_by_side_are_told_apart_once_they_differ() -> None:
    module: Any = module_of("gpt-neox")
    for block in module.gpt_neox.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            nn.init.ones_(norm.weight)
            nn.init.zeros_(norm.bias)
    model = LanguageModel(module)
    assert_as_plain("gpt-neox", model, module)
    with torch.no_grad():
        for block in module.gpt_neox.layers:
            weight = block.post_attention_layernorm.weight
            weight.copy_(torch.linspace(-1, 2, len(weight)))
    assert_as_plain("gpt-neox", model, module)


@pytest.mark.thorough
def test_a_layer_that_is_replaced_after_the_trial_goes_back_by_autograd() -> None:
    module: Any = module_of("llama")
    model = LanguageModel(module)
    assert_as_plain("llama", model, module)
    attention = module.model.layers[1].self_attn
    attention.q_proj = Scaled(attention.q_proj).eval()
    assert_as_plain("llama", model, module)


class Doubled(nn.Module):
    """A layer whose output is twice what it was."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, given: Tensor) -> Tensor:
        return 2 * self.layer(given)


def doubled_scores() -> dict[tuple[str, str], float]:
    module: Any = module_of("llama")
    attention = module.model.layers[1].self_attn
    attention.q_proj = Doubled(attention.q_proj).eval()
    return scores(module, PATHS["llama"], CLEAN, CORRUPTED, difference)


@pytest.mark.thorough
def test_a_hook_that_is_hung_on_a_layer_after_the_trial_counts() -> None:
    module: Any = module_of("llama")
    model = LanguageModel(module)
    assert_as_plain("llama", model, module)
    layer = module.model.layers[1].self_attn.q_proj
    layer.register_forward_hook(lambda layer, args, output: output * 2)
    assert_same(attributed(model), doubled_scores())


@pytest.mark.thorough
def test_an_edit_that_is_made_after_the_trial_counts() -> None:
    module: Any = module_of("llama")
    model = LanguageModel(module)
    assert_as_plain("llama", model, module)
    with model.edit() as edited:
        layer = edited.model.layers[1].self_attn.q_proj
        layer.output = layer.output * 2
    assert_same(attributed(edited), doubled_scores())
    assert_as_plain("llama", model, module)
