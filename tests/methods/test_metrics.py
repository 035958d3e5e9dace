from typing import Any

import numpy as np
import pytest
import torch

from insitu import LanguageModel, OptionError, PromptError, ShapeError
from insitu.methods import (
    Metric,
    ablate,
    attribution_patching,
    edge_attribution,
    gradient_times_input,
    integrated_gradients,
    kl_divergence,
    log_probability,
    logit_difference,
    probability,
)
from insitu.methods.metrics import as_metric


@pytest.fixture
def logits() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 100) * 3


def measured(metric, model: LanguageModel, logits: torch.Tensor, clean=None, count: int = 1):
    return [float(measure(logits, clean)) for measure in metric.of(model, count)]


def test_each_measures_the_last_position(gpt2: LanguageModel, logits: torch.Tensor) -> None:
    last = logits[-1].double()
    chance = last.exp() / last.exp().sum()
    found = measured(logit_difference(7, 9), gpt2, logits)
    assert found == pytest.approx([float(last[7] - last[9])], rel=1e-5)
    found = measured(probability(7), gpt2, logits)
    assert found == pytest.approx([float(chance[7])], rel=1e-5)
    found = measured(log_probability(7), gpt2, logits)
    assert found == pytest.approx([float(chance[7].log())], rel=1e-5)


def test_the_divergence_is_from_the_clean_run(gpt2: LanguageModel, logits: torch.Tensor) -> None:
    clean = torch.randn(5, 100)
    p = clean[-1].double().softmax(-1)
    q = logits[-1].double().softmax(-1)
    wanted = sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True))
    assert measured(kl_divergence(), gpt2, logits, clean) == pytest.approx([wanted], rel=1e-5)
    assert measured(kl_divergence(), gpt2, clean, clean) == pytest.approx([0], abs=1e-6)


def test_each_prompt_may_have_an_answer_of_its_own(gpt2: LanguageModel, logits) -> None:
    found = measured(logit_difference([1, 2, 3], 9), gpt2, logits, count=3)
    wanted = [float(logits[-1, token] - logits[-1, 9]) for token in (1, 2, 3)]
    assert found == pytest.approx(wanted, rel=1e-5)
    assert measured(probability(torch.tensor([4, 5])), gpt2, logits, count=2) == pytest.approx(
        logits[-1].softmax(-1)[[4, 5]].tolist(), rel=1e-5
    )
    with pytest.raises(OptionError, match="2 answers for 3 prompts"):
        probability([1, 2]).of(gpt2, 3)
    with pytest.raises(PromptError, match="no token 100"):
        probability(100).of(gpt2, 1)


def test_a_function_of_logits_is_a_metric_with_its_name(gpt2: LanguageModel, logits) -> None:
    def largest_logit(logits: torch.Tensor) -> torch.Tensor:
        return logits[-1].max()

    metric = as_metric(largest_logit)
    assert metric.name == "largest logit"
    assert measured(metric, gpt2, logits, count=2) == [float(logits[-1].max())] * 2
    assert as_metric(metric).name == metric.name
    with pytest.raises(OptionError, match="not 'loss'"):
        as_metric("loss")  # pyright: ignore[reportArgumentType]


def test_it_is_recorded_in_the_run_itself(gpt2: LanguageModel) -> None:
    metric = logit_difference(3, 4)
    (measure,) = metric.of(gpt2, 1)
    with gpt2.trace([5, 6, 7]):
        value = measure(gpt2.logits[0], None).save()
    with torch.no_grad():
        row = gpt2.load()(torch.tensor([[5, 6, 7]])).logits[0, -1]
    assert value.value.item() == pytest.approx(float(row[3] - row[4]), abs=1e-5)


NO_NUMBERS: dict[str, Any] = {
    "a logit for each token": (lambda logits: logits[-1], r"This one gives shape \(100,\)"),
    "an axis too many": (lambda logits: logits[-1, 3:4], r"This one gives shape \(1,\)"),
    "a constant": (lambda logits: 3.0, "This one gives a float"),
    "a constant tensor": (lambda logits: torch.tensor(3.0), "is made of nothing in the run"),
    "nothing": (lambda logits: None, "This one gives a NoneType"),
    "a Python number": (lambda logits: logits[-1, 3].item(), r"`\.item\(\)`"),
    "a complex number": (
        lambda logits: torch.complex(logits[-1, 3], logits[-1, 4]),
        r"torch\.complex64, of two: take `\.real`",
    ),
    "of a metric": (Metric("own", lambda model, n: [lambda logits, _: logits[-1]] * n), "shape"),
}


@pytest.mark.parametrize(
    "metric",
    [
        lambda logits: logits[0, -1].max(),
        lambda logits: logits[:, -1].softmax(-1).max(),
        lambda logits: logits[0, -1, 5],
        lambda logits: logits[:, -1, :].max(),
        lambda logits: logits[0, np.int64(-1)].max(),
        lambda logits: logits[:, -1:].max(),
        lambda logits: logits[0][-1],
        lambda logits: logits[np.int64(0)][-1:].max(),
    ],
)
def test_a_key_for_logits_with_an_axis_of_prompts_is_refused(
    metric: Any, gpt2: LanguageModel
) -> None:
    with pytest.raises(OptionError, match=r"write `logits\[-1, token\]`, or `run.logits\[0, -1"):
        ablate(gpt2, [1, 2, 3], metric, layers=1)


def test_the_short_form_takes_the_keys_of_positions_and_tokens(gpt2: LanguageModel) -> None:
    with torch.no_grad():
        logits = gpt2.module(torch.tensor([[1, 2, 3]])).logits[0]
    for metric, expected in (
        (lambda run: run[-1, 5], logits[-1, 5]),
        (lambda run: run[..., -1, 5], logits[-1, 5]),
        (lambda run: run[-1][5], logits[-1, 5]),
        (lambda run: run[-1][[5, 7]].sum() * run[0][5], logits[-1, [5, 7]].sum() * logits[0, 5]),
        (lambda run: run[0, [5, 7]].sum(), logits[0, [5, 7]].sum()),
        (lambda run: run[None][0, -1].max(), logits[-1].max()),
        (lambda run: run.logits[0, -1].max(), logits[-1].max()),
    ):
        found = ablate(gpt2, [1, 2, 3], metric, layers=1).details["clean"]
        torch.testing.assert_close(found.squeeze(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NO_NUMBERS)
@pytest.mark.parametrize("method", [ablate, integrated_gradients, gradient_times_input])
def test_what_is_no_number_is_refused_and_not_summed(
    gpt2: LanguageModel, method: Any, name: str
) -> None:
    metric, said = NO_NUMBERS[name]
    with pytest.raises(ShapeError, match=said) as caught:
        method(gpt2, [5, 17, 3], metric)
    assert "test_metrics.py" in str(caught.value)


@pytest.mark.parametrize(
    "metric",
    [
        lambda logits: logits[-1].argmax(),
        lambda logits: (logits[-1, 3] > logits[-1, 4]).float(),
        lambda logits: logits[-1, 3].detach(),
    ],
)
@pytest.mark.parametrize(
    "method", [attribution_patching, edge_attribution, integrated_gradients, gradient_times_input]
)
def test_a_metric_without_a_gradient_is_refused_where_one_is_taken(
    gpt2: LanguageModel, method: Any, metric: Any
) -> None:
    pairs = method in (attribution_patching, edge_attribution)
    prompts = ([5, 17, 3], [5, 18, 3]) if pairs else ([5, 17, 3],)
    with pytest.raises(OptionError, match="has no gradient.*`activation_patching`") as caught:
        method(gpt2, *prompts, metric)
    assert "test_metrics.py" in str(caught.value)


def test_a_difference_in_half_precision_is_taken_in_float32(gpt2: LanguageModel) -> None:
    logits = torch.zeros(2, 100, dtype=torch.bfloat16)
    logits[-1, 7], logits[-1, 9] = 257.0, 0.5  # 256 and 0.5: the difference has no bfloat16
    assert measured(logit_difference(7, 9), gpt2, logits) == [float(logits[-1, 7]) - 0.5]


def test_answers_may_be_numbers_of_other_libraries(gpt2: LanguageModel, logits) -> None:
    wanted = measured(probability(7), gpt2, logits)
    for token in (np.int64(7), torch.tensor(7)):
        assert measured(probability(token), gpt2, logits) == wanted
    for tokens in (np.array([7, 7]), torch.tensor([7, 7]), iter([7, 7])):
        assert measured(probability(tokens), gpt2, logits, count=2) == wanted * 2
    for token in (True, 1.5, None):
        with pytest.raises(OptionError, match="as text or as its id, not as"):
            measured(probability(token), gpt2, logits)


def test_a_function_of_two_arguments_is_refused_with_what_to_write() -> None:
    def apart(logits: Any, answer: int) -> Any:
        return logits[-1, answer]

    with pytest.raises(OptionError, match=r"one argument.* apart\(logits.*lambda logits: metric"):
        as_metric(apart)
    with pytest.raises(OptionError, match="one argument"):
        as_metric(lambda: 3)
    with pytest.raises(OptionError, match="one argument"):
        as_metric(lambda *, logits: logits)
    for fitting in (lambda logits, answer=2: logits[-1, answer], lambda *all_: all_[0][-1, 2]):
        (measure,) = as_metric(fitting).of(None, 1)  # pyright: ignore[reportArgumentType]
        assert measure(torch.eye(3), None).item() == 1


def test_a_function_without_a_name_is_a_metric() -> None:
    assert as_metric(lambda logits: logits[-1, 3]).name == "metric"


def test_what_makes_a_metric_is_to_be_called() -> None:
    with pytest.raises(OptionError, match=r"write `logit_difference\(answer, instead\)`"):
        as_metric(logit_difference)
    with pytest.raises(OptionError, match=r"write `kl_divergence\(\)`"):
        as_metric(kl_divergence)
