"""Attributions of tokens, beside gradients of plain PyTorch and closed forms of a linear model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from insitu import LanguageModel, OptionError, PromptError, ShapeError
from insitu.methods import (
    Result,
    gradient_times_input,
    integrated_gradients,
    kl_divergence,
    logit_difference,
    probability,
)
from tests.fidelity.architectures import make
from tests.thinning import sampled

pytestmark = pytest.mark.no_wire  # the methods write nothing that other tests do not send

ARCHITECTURES = ["gpt2", "llama", "mixtral", "bert", "t5"]
FIRST = [5, 17, 42, 8, 23]
SECOND = [31, 7, 60]


@cache
def kept(name: str) -> LanguageModel:
    return make(name)


def logits_at(model: LanguageModel, embeddings: torch.Tensor) -> torch.Tensor:
    """Logits `(row, position, vocabulary)` of embeddings, without Insitu."""
    module = model.load()
    options = {}
    if model.traits.is_encoder_decoder:
        options["decoder_input_ids"] = torch.zeros(len(embeddings), 1, dtype=torch.long)
    return module(inputs_embeds=embeddings, **options).logits


def embedded(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    return model.load().get_input_embeddings()(torch.tensor([ids])).detach()


def slope(
    model: LanguageModel, embeddings: torch.Tensor, score: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    embeddings = embeddings.clone().requires_grad_()
    score(logits_at(model, embeddings)[0]).backward()
    model.load().zero_grad()
    return embeddings.grad


def integral(
    model: LanguageModel,
    ids: list[int],
    score: Callable[[torch.Tensor], torch.Tensor],
    begin: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """Integrated gradients with Gauss and Legendre's points, one step after another."""
    end = embedded(model, ids)
    total = torch.zeros_like(end)
    for point, weight in zip(*np.polynomial.legendre.leggauss(steps), strict=True):
        there = begin + (end - begin) * (1 + float(point)) / 2
        total += slope(model, there, score) * float(weight) / 2
    return ((end - begin) * total).sum(-1)[0]


def difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[-1, 3] - logits[-1, 9]


@pytest.mark.parametrize("name", sampled(ARCHITECTURES, ["gpt2"]))
def test_integrated_gradients_are_those_of_plain_torch(name: str) -> None:
    model = kept(name)
    result = integrated_gradients(model, FIRST, logit_difference(3, 9), steps=7)
    expected = integral(model, FIRST, difference, torch.zeros(1), 7)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(result.values, expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        ends = [difference(logits_at(model, embedded(model, FIRST) * x)[0]) for x in (1, 0)]
    torch.testing.assert_close(result.details["input"], ends[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.details["baseline"], ends[1], rtol=1e-4, atol=1e-5)
    gap = ends[0] - ends[1] - expected.sum()
    torch.testing.assert_close(result.details["difference"], gap, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", sampled(ARCHITECTURES, ["gpt2", "llama", "bert"]))
def test_gradient_times_input_is_that_of_plain_torch(name: str) -> None:
    model = kept(name)
    result = gradient_times_input(model, [FIRST, SECOND], logit_difference(3, 9))
    for row, ids in enumerate([FIRST, SECOND]):
        end = embedded(model, ids)
        expected = (end * slope(model, end, difference)).sum(-1)[0]
        torch.testing.assert_close(result.values[row, : len(ids)], expected, rtol=1e-4, atol=1e-6)
        score = difference(logits_at(model, end)[0])
        torch.testing.assert_close(result.details["input"][row], score, rtol=1e-4, atol=1e-5)
    assert result.values[1, len(SECOND) :].isnan().all()


@pytest.mark.parametrize("name", sampled(["gpt2", "llama"], ["llama"]))
@pytest.mark.parametrize("limit", [1, 11])
def test_prompts_of_any_length_and_passes_of_any_size(name: str, limit: int) -> None:
    model = kept(name)
    metric = logit_difference([3, 4], [9, 8])
    result = integrated_gradients(
        model, [FIRST, SECOND], metric, steps=5, max_tokens_per_pass=limit
    )
    assert [axis.name for axis in result.axes] == ["prompt", "position"]
    assert result.values[1, len(SECOND) :].isnan().all()
    first = integral(model, FIRST, difference, torch.zeros(1), 5)
    second = integral(model, SECOND, lambda x: x[-1, 4] - x[-1, 8], torch.zeros(1), 5)
    torch.testing.assert_close(result.values[0], first, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.values[1, : len(SECOND)], second, rtol=1e-4, atol=1e-6)
    assert result.details["difference"].shape == (2,)


@pytest.mark.parametrize("kind", ["token", "vector", "embeddings"])
def test_the_path_begins_at_the_baseline(kind: str) -> None:
    model = kept("llama")
    given = {
        "token": 11,
        "vector": torch.linspace(-1, 1, 16),
        "embeddings": torch.linspace(-1, 1, 80).reshape(5, 16),
    }[kind]
    begin = embedded(model, [11] * 5) if kind == "token" else given
    result = integrated_gradients(model, FIRST, logit_difference(3, 9), baseline=given, steps=4)
    expected = integral(model, FIRST, difference, begin, 4)
    torch.testing.assert_close(result.values, expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        start = difference(logits_at(model, begin.expand(1, 5, 16))[0])
    torch.testing.assert_close(result.details["baseline"], start, rtol=1e-4, atol=1e-5)


def test_padding_is_a_baseline_like_any_token() -> None:
    model = kept("bloom")
    metric = logit_difference(3, 9)
    padding = integrated_gradients(model, FIRST, metric, baseline="pad token", steps=3)
    begin = embedded(model, [model.config.pad_token_id] * 5)
    with torch.no_grad():
        start = difference(logits_at(model, begin)[0])
    torch.testing.assert_close(padding.details["baseline"], start, rtol=1e-4, atol=1e-5)


def linear() -> LanguageModel:
    """Logits are a linear function of each position's embedding."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=6, n_layer=0, n_head=1, vocab_size=100, n_positions=8, tie_word_embeddings=False
    )
    module = GPT2LMHeadModel(config).double().eval()
    module.transformer.ln_f = torch.nn.Identity()
    torch.nn.init.normal_(module.lm_head.weight)
    torch.nn.init.normal_(module.transformer.wpe.weight)
    torch.nn.init.normal_(module.transformer.wte.weight)
    return LanguageModel(module)


@pytest.mark.parametrize("baseline", ["zero", 12])
def test_attributions_of_a_linear_function_are_its_terms(baseline: Any) -> None:
    model = linear()
    weight = model.load().lm_head.weight[3].detach()
    scale = torch.tensor([1.0, -2.0, 3.0, 0.5, 4.0]).double()
    result = integrated_gradients(
        model, FIRST, lambda logits: (logits[:, 3] * scale).sum(), baseline=baseline, steps=1
    )
    begin = 0 if baseline == "zero" else embedded(model, [baseline])[0]
    terms = (embedded(model, FIRST)[0] - begin) @ weight * scale
    torch.testing.assert_close(result.values.double(), terms, rtol=1e-5, atol=1e-7)
    assert result.details["difference"].abs() < 1e-5


@pytest.mark.parametrize(
    ("method", "steps", "power", "exact"),
    [
        ("gauss-legendre", 1, 2, True),
        ("gauss-legendre", 1, 3, False),
        ("gauss-legendre", 2, 4, True),
        ("gauss-legendre", 2, 5, False),
        ("trapezoid", 2, 2, True),
        ("trapezoid", 3, 3, False),
    ],
)
def test_rules_are_exact_for_the_powers_that_they_are_exact_for(
    method: Any, steps: int, power: int, exact: bool
) -> None:
    model = linear()

    def score(logits: Any) -> Any:
        return logits[-1, 3] ** power

    result = integrated_gradients(model, [5], score, method=method, steps=steps)
    with torch.no_grad():
        ends = [score(logits_at(model, embedded(model, [5]) * x)[0]) for x in (1, 0)]
    whole = float(ends[0] - ends[1])
    assert abs(whole) > 1e-3
    error = abs(float(result.values.sum()) - whole) / abs(whole)
    assert error < 1e-5 if exact else error > 1e-4
    gap = float(result.details["difference"])
    assert gap == pytest.approx(whole - float(result.values.sum()), abs=1e-5 * abs(whole))


def test_trapezoid_is_that_of_torch() -> None:
    model, steps = kept("gpt2"), 6
    result = integrated_gradients(
        model, FIRST, logit_difference(3, 9), method="trapezoid", steps=steps
    )
    end = embedded(model, FIRST)
    points = torch.linspace(0, 1, steps)
    slopes = torch.stack([slope(model, end * point, difference) for point in points])
    expected = (torch.trapezoid(slopes, points, dim=0) * end).sum(-1)[0]
    torch.testing.assert_close(result.values, expected, rtol=1e-4, atol=1e-6)


def test_attributions_add_up_to_the_difference() -> None:
    model = kept("gpt2")
    result = integrated_gradients(model, FIRST, probability(3), baseline=11, steps=60)
    whole = result.details["input"] - result.details["baseline"]
    assert abs(result.values.sum() - whole) < 1e-4 < abs(whole)


def test_a_metric_may_look_at_the_clean_run() -> None:
    model = kept("gpt2")
    result = integrated_gradients(model, FIRST, kl_divergence(), steps=40)
    with torch.no_grad():
        end = embedded(model, FIRST)
        clean, begin = (logits_at(model, end * x)[0, -1].log_softmax(-1) for x in (1, 0))
    expected = (clean.exp() * (clean - begin)).sum()
    torch.testing.assert_close(result.details["baseline"], expected, rtol=1e-4, atol=1e-6)
    assert abs(result.details["input"]) < 1e-6
    assert result.values.sum() == pytest.approx(-float(expected), rel=1e-2)


@pytest.mark.thorough
def test_results_say_what_they_are_and_are_kept(eiffel: LanguageModel, tmp_path: Path) -> None:
    result = integrated_gradients(
        eiffel, "The Eiffel Tower", logit_difference(" Paris", " Rome"), steps=2
    )
    assert result.sizes == {"position": 3}
    assert result.axes[0].labels == ("The", " Eiffel", " Tower")
    assert result.quantity == "attribution to logit difference"
    result.save(tmp_path / "attributions")
    again = Result.load(tmp_path / "attributions")
    assert torch.equal(again.values, result.values)
    assert torch.equal(again.details["difference"], result.details["difference"])
    assert again.axes == result.axes


def test_parameters_and_leaves_stay_untouched() -> None:
    model = kept("llama")
    given = torch.zeros(16, requires_grad=True)
    integrated_gradients(model, FIRST, logit_difference(3, 9), baseline=given, steps=2)
    gradient_times_input(model, FIRST, logit_difference(3, 9))
    assert given.grad is None
    assert all(parameter.grad is None for parameter in model.load().parameters())


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"steps": 0}, OptionError, "from 1 on"),
        ({"steps": 1, "method": "trapezoid"}, OptionError, "from 2 on"),
        ({"method": "simpson"}, OptionError, "gauss-legendre"),
        ({"baseline": "mean"}, OptionError, "pad token"),
        ({"baseline": torch.tensor([1])}, OptionError, "tensor of embeddings"),
        ({"baseline": "pad token"}, OptionError, "no padding token"),
        ({"baseline": 1000}, PromptError, "no token 1000"),
        ({"baseline": torch.zeros(3, 16)}, ShapeError, r"\(5, 16\)"),
        ({"max_tokens_per_pass": 0}, OptionError, "max_tokens_per_pass"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    gpt2 = kept("gpt2")
    with pytest.raises(error, match=says) as raised:
        integrated_gradients(gpt2, FIRST, logit_difference(3, 9), **options)
    assert Path(__file__).name in str(raised.value)
    with gpt2.trace(FIRST):
        gpt2.logits.save()
