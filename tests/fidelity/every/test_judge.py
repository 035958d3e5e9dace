"""That the judge of standard names finds names that stand for something else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from insitu import LanguageModel
from tests.fidelity.every.judge import judge
from tests.fidelity.every.models import inputs_for, small_model
from tests.fidelity.every.verdict import Verdict
from tests.fidelity.named import eager_is_expected  # noqa: F401
from tests.fidelity.zoo import ZOO, module_of
from tests.thinning import sampled, thinned

SWAPS: Mapping[str, tuple[Mapping[str, str], str]] = {
    "keys for queries": ({"q": "k"}, "W_Q"),
    "values for what heads give": ({"z": "v"}, "heads"),
    "scores for the pattern": ({"pattern": "scores"}, "pattern"),
    "what goes in for what comes out": ({"post": "pre"}, "MLP"),
    "the other layer's weights": ({"W_in": "W_gate", "W_gate": "W_in"}, "MLP"),
    "the middle for the end": ({"residual_out": "residual_mid"}, "residual"),
    "attention for the MLP": ({"mlp_out": "attention_out", "attention_out": "mlp_out"}, "heads"),
    "the unembedding": ({"W_E": "W_U"}, "embedding"),
    "queries made by keys' weights": ({"W_Q": "W_K"}, "W_Q"),
}


def judged(name: str) -> Mapping[str, Verdict]:
    return judge(module_of(name), ZOO[name].inputs(12, 6))


@pytest.mark.parametrize("name", thinned(["gpt2", "llama", "bart"], ["gpt2"]))
def test_what_is_right_is_found_right(name: str) -> None:
    found = judged(name)
    assert {one.state for one in found.values()} <= {"right", "refused"}, found
    assert found["heads"].state == found["pattern"].state == found["MLP"].state == "right"


@pytest.mark.thorough
@pytest.mark.parametrize("swap", sampled(thinned(SWAPS, [*SWAPS][:2]), [*SWAPS][:1]))
def test_a_name_that_stands_for_something_else_is_found(
    swap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    others, column = SWAPS[swap]
    planted(monkeypatch, lambda path, name: (path, others.get(name, name)))
    assert judged("llama")[column].state == "wrong"


SCALED: Mapping[str, tuple[str, Mapping[str, str], str]] = {
    "what leaves a block of normalised sums": ("bert", {"attention_out": "block_out"}, "residual"),
    "what another part adds": ("bert", {"mlp_out": "attention_out"}, "residual"),
    "attention for the MLP": (
        "bert", {"mlp_out": "attention_out", "attention_out": "mlp_out"}, "residual",
    ),
    "what is added twice, with factors": ("minimax", {"mlp_out": "mixer_out"}, "residual"),
    "the stream for what is added": ("doge", {"attention_out": "residual_mid"}, "residual"),
    "what enters for the middle": ("doge", {"residual_mid": "residual_in"}, "residual"),
    "attention for the MLP, with factors": (
        "doge", {"mlp_out": "attention_out", "attention_out": "mlp_out"}, "residual",
    ),
}  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("name", thinned(["doge", "minimax"], ["doge"]))
def test_what_is_right_with_factors_is_found_right(name: str) -> None:
    module = small_model("causal", name)
    assert judge(module, inputs_for(module))["residual"].state == "right"


@pytest.mark.thorough
@pytest.mark.parametrize("swap", thinned(SCALED, [*SCALED][:1]))
def test_a_wrong_name_beside_factors_and_norms_is_found(
    swap: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kind, others, column = SCALED[swap]
    module = small_model("causal", kind)
    monkeypatch.setenv("INSITU_PROOFS", str(tmp_path))  # what is planted must not be proven too
    for block in LanguageModel(module).blocks:
        assert "mlp_out" in list(block.role)
    planted(monkeypatch, lambda path, name: (path, others.get(name, name)))
    assert judge(module, inputs_for(module))[column].state == "wrong"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "column"),
    [pytest.param("pattern", "pattern", marks=pytest.mark.thorough), ("z", "heads")],
)
def test_another_layers_value_is_found(
    name: str, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def next_layer(path: str, asked: str) -> tuple[str, str]:
        return (path.replace("layers.0", "layers.1") if asked == name else path), asked

    planted(monkeypatch, next_layer)
    assert judged("llama")[column].state == "wrong"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "weight", "column"),
    [
        ("gpt2", "W_O", "heads"),
        pytest.param("llama", "W_Q", "W_Q", marks=pytest.mark.thorough),
        pytest.param("llama", "W_V", "W_Q", marks=pytest.mark.thorough),
    ],
)
def test_heads_in_another_order_are_found(
    name: str, weight: str, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of(name)
    names = type(LanguageModel(module).vocabulary)
    given = names.entry

    def permuted(self: Any, path: str, part: str, asked: str) -> Any:
        found = given(self, path, part, asked)
        if asked == weight:
            return type(found)(torch.roll(found.value, 1, 0))
        return found

    monkeypatch.setattr(names, "entry", permuted)
    assert judged(name)[column].state == "wrong"


def test_an_error_that_is_no_refusal_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: str, name: str) -> tuple[str, str]:
        if name == "pattern":
            raise RuntimeError("no")
        return path, name

    planted(monkeypatch, broken)
    assert judged("llama")["pattern"].state == "crash"


def planted(monkeypatch: pytest.MonkeyPatch, change: Callable[[str, str], tuple[str, str]]) -> None:
    """Has names looked up at another module, or by another name."""
    names = type(LanguageModel(module_of("llama")).vocabulary)
    given = names.entry

    def entry(self: Any, path: str, part: str, name: str) -> Any:
        other, asked = change(path, name)
        return given(self, other, part, asked)

    monkeypatch.setattr(names, "entry", entry)
