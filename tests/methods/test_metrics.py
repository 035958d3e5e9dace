import pytest
import torch

from insitu import LanguageModel, OptionError, PromptError
from insitu.methods import kl_divergence, log_probability, logit_difference, probability
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
    assert as_metric(metric) is metric
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
