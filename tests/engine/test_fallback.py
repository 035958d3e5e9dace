"""Why something runs in the slower way: the reason is true, in the plan and in the log."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from insitu import LanguageModel
from insitu.engine.fallback import Fallback, is_own, tried
from insitu.graph.errors import ShapeError
from insitu.models import parted, resume_trial, separation
from tests.conftest import _Faults, tiny_gpt2

PROMPTS = ([5, 6, 7], [8, 9, 10, 11])


def plan_of(model: LanguageModel, prompts: Any = PROMPTS, **options: Any) -> str:
    """The plan of a read in each of some prompts."""
    with model.trace(**options) as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                model.transformer.h[1].output[0].save()
    return tracer.plan.explain()


def generated(model: LanguageModel, **options: Any) -> str:
    with model.generate(max_new_tokens=2, **options) as generator:
        for prompt in PROMPTS:
            generator.invoke(prompt).__enter__().__exit__(None, None, None)
    return generator.plan.explain()


def in_own_code(body: str, **names: Any) -> Callable[[], Any]:
    """A function that stands in a module of Insitu."""
    names["__name__"] = "insitu.models.resume_trial"
    exec(f"def function(*_, **__):\n    {body}", names)
    return names["function"]


broken = in_own_code("raise TypeError('a fault of our own')")


@contextmanager
def faults_taken(faults: _Faults) -> Iterator[None]:
    """Takes the faults that the code within was to be found with."""
    yield
    assert faults.records, "no fault was logged"
    faults.records.clear()


@pytest.mark.parametrize(
    ("place", "name", "prompts"),
    [
        (separation.Trial, "verified", PROMPTS),
        pytest.param(parted, "cut", PROMPTS, marks=pytest.mark.thorough),
        (resume_trial.ResumeTrial, "_looks_back_only", None),
        pytest.param(resume_trial, "cut", None, marks=pytest.mark.thorough),
    ],
    ids=["batch", "batch_inside", "chain", "chain_inside"],
)
def test_a_fault_of_our_own_is_logged_as_an_error_and_named_in_the_plan(
    place: Any,
    name: str,
    prompts: Any,
    monkeypatch: pytest.MonkeyPatch,
    no_fault_is_survived: _Faults,
) -> None:
    """The finding: a `TypeError` in a trial made a sweep slower, with a wrong reason."""
    monkeypatch.setattr(place, name, broken)
    model = LanguageModel(tiny_gpt2())
    with faults_taken(no_fault_is_survived):
        if prompts is not None:
            table = plan_of(model, prompts)
        else:
            with model.trace(share_prefixes=True) as tracer:
                for scale in (1, 2, 3):
                    with tracer.invoke(PROMPTS[1]):
                        h = model.transformer.h[2].output[0]
                        model.transformer.h[2].output = h * scale
                        model.lm_head.output.save()
            table = tracer.plan.explain()
    assert "TypeError: a fault of our own" in table
    assert "Insitu failed in" in table


class Refusing(nn.Module):
    """An MLP that does not take two prompts at a time."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        if value.shape[0] > 1:
            raise ValueError("one prompt at a time, please")
        return self.inner(value)


def test_what_the_model_raises_in_a_trial_is_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    module = tiny_gpt2()
    module.transformer.h[0].mlp = Refusing(module.transformer.h[0].mlp).eval()
    with caplog.at_level(logging.INFO, "insitu"):
        table = plan_of(LanguageModel(module))
    assert table.count("one prompt at a time, please") == len(PROMPTS)
    assert "2 prompts run one by one" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.filterwarnings("ignore:.*training mode")
@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (lambda: plan_of(LanguageModel(tiny_gpt2().train())), "in training mode"),
        (
            lambda: plan_of(LanguageModel(tiny_gpt2()), logits_to_keep=1),
            "`logits_to_keep` may mean something else for a batch",
        ),
        (
            lambda: generated(LanguageModel(tiny_gpt2()), num_beams=2),
            "with `num_beams`",
        ),
        (
            lambda: generated(LanguageModel(tiny_gpt2()), logits_processor=[lambda _, s: s]),
            "with `logits_processor`",
        ),
        (lambda: generated(LanguageModel(tiny_gpt2().train())), "in training mode"),
    ],
    ids=["training", "option", "beams", "own_processor", "training_generation"],
)
def test_the_plan_says_what_keeps_prompts_apart(plan: Callable[[], str], why: str) -> None:
    table = plan()
    assert len(table.splitlines()) > len(PROMPTS)
    assert table.count(why) == len(PROMPTS)


def test_own_hooks_are_why_equal_prompts_share_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = tiny_gpt2()
    module.transformer.h[0].register_forward_hook(lambda *_: None)
    model = LanguageModel(module)
    with caplog.at_level(logging.INFO, "insitu"), model.trace(share_prefixes=True) as tracer:
        for scale in (1, 2):
            with tracer.invoke(PROMPTS[0]):
                model.transformer.h[2].output = model.transformer.h[2].output[0] * scale
                model.lm_head.output.save()
    why = "your own hooks on its modules see each prompt alone"
    assert tracer.plan.explain().count(why) == 2
    assert why in caplog.text


def raised(function: Callable[[], Any]) -> Exception:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_whose_exception_it_is() -> None:
    linear = nn.Linear(2, 2)
    assert is_own(raised(in_own_code("None.x")))
    assert is_own(raised(in_own_code("torch.ones(2) @ torch.ones(3)", torch=torch)))
    assert is_own(raised(in_own_code("json.loads('{')", json=__import__("json"))))
    assert not is_own(raised(in_own_code("linear(x)", linear=linear, x=torch.ones(3))))
    assert not is_own(raised(in_own_code("Refusing(None)(x)", Refusing=Refusing, x=torch.ones(3))))
    assert not is_own(raised(in_own_code("raise ShapeError('x')", ShapeError=ShapeError)))
    # A hook of ours in a forward of the model.
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(in_own_code("None.x"))
    assert is_own(raised(in_own_code("hooked(x)", hooked=hooked, x=torch.ones(2))))


def test_a_reason_is_one_short_line() -> None:
    def fail() -> None:
        raise ValueError("first " + "x" * 500 + "\nsecond")

    module = Refusing(nn.Identity())
    module.forward = fail  # pyright: ignore[reportAttributeAccessIssue]
    found = tried(lambda: module(), "a batch")
    assert isinstance(found, Fallback)
    assert found.why.startswith("a batch raised ValueError: first x")
    assert len(found.why) < 160
    assert "\n" not in found.why
