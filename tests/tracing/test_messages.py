"""What the errors of interventions say, word for word: each names the user's line."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from insitu import (
    CausalityError,
    ExecutionError,
    IndexOutOfRangeError,
    InsituError,
    LanguageModel,
    NeverRanError,
    OperationError,
    ShapeError,
    WireError,
    apply,
)
from tests.fidelity.test_writing import IDS, SHORT


def wrong_shape(model: LanguageModel) -> None:
    with model.trace(IDS):
        model.transformer.h[1].output = torch.zeros(1, 5, 16)


def wrong_dtype(model: LanguageModel) -> None:
    with model.trace(IDS):
        model.lm_head.input = torch.zeros(1, 6, 16, dtype=torch.float64)


def too_late(model: LanguageModel) -> None:
    with model.trace(IDS):
        later = model.transformer.h[2].output[0]
        model.transformer.h[1].output = later * 2


def too_late_in_place(model: LanguageModel) -> None:
    with model.trace(IDS):
        model.transformer.h[0].output[0][:, 0] = model.lm_head.input[:, 0]


def other_length(model: LanguageModel) -> None:
    with model.trace() as tracer:
        with tracer.invoke(SHORT):
            short = model.transformer.h[1].output[0]
        with tracer.invoke(IDS):
            model.transformer.h[1].output = short


def no_such_call(model: LanguageModel) -> None:
    with model.trace(IDS):
        model.transformer.ln_f.call(1).output.save()


def step_never_came(model: LanguageModel) -> None:
    end = int(model.module.generate(IDS, max_new_tokens=1, eos_token_id=None)[0, -1])
    with model.generate(IDS, max_new_tokens=3, eos_token_id=end) as generator:
        with generator.step(2):
            model.lm_head.output.save()


def no_such_step(model: LanguageModel) -> None:
    with model.generate(IDS, max_new_tokens=3) as generator:
        generator.tokens[3].save()


def skipped(model: LanguageModel) -> None:
    with model.trace(IDS):
        model.transformer.h[1].skip(model.transformer.h[0].output)
        model.transformer.h[1].mlp.output.save()


def stopped(model: LanguageModel) -> None:
    with model.trace(IDS):
        model.transformer.h[1].stop()
        model.lm_head.output.save()


def no_backward(model: LanguageModel) -> None:
    with model.trace(IDS):
        model.transformer.h[1].output[0].grad.save()


def not_on_the_way(model: LanguageModel) -> None:
    with model.trace(IDS):
        model.transformer.h[1].output[0][:, -1].grad.save()
        model.lm_head.output.sum().backward()


def a_decision(model: LanguageModel) -> None:
    with model.trace(IDS):
        if model.lm_head.output.sum() > 0:
            pass


def a_function_on_the_wire(model: LanguageModel) -> None:
    with model.trace(IDS) as tracer:
        apply(len, model.lm_head.output).save()
    tracer.job.to_bytes()


CASES: list[tuple[Callable[[LanguageModel], None], type[InsituError], str, str]] = [
    (
        wrong_shape,
        ShapeError,
        "`transformer.h[1].output` cannot be given this value: the shape there is (1, 6, 16), and "
        "this is (1, 5, 16).",
        "model.transformer.h[1].output = torch.zeros(1, 5, 16)",
    ),
    (
        wrong_dtype,
        ShapeError,
        "`lm_head.input` cannot be given this value: the dtype there is torch.float32, and this is "
        "torch.float64: convert it with `.to(...)`.",
        "model.lm_head.input = torch.zeros(1, 6, 16, dtype=torch.float64)",
    ),
    (
        too_late,
        CausalityError,
        "`transformer.h[1].output` is given a value that depends on `transformer.h[2].output`, "
        "which comes later in the run and is read at\nLINE\n    later = "
        "model.transformer.h[2].output[0]\nA write can only use values that are there when "
        "the model passes the site; it stands at",
        "model.transformer.h[1].output = later * 2",
    ),
    (
        too_late_in_place,
        CausalityError,
        "`transformer.h[0].output` is given a value that depends on `lm_head.input`, which comes "
        "later in the run and is read at\nLINE\n    model.transformer.h[0].output[0][:, 0] = "
        "model.lm_head.input[:, 0]\nA write can only use values that are there when "
        "the model passes the site; it stands at",
        "model.transformer.h[0].output[0][:, 0] = model.lm_head.input[:, 0]",
    ),
    (
        other_length,
        ShapeError,
        "`transformer.h[1].output` cannot be given this value: the shape there is (1, 6, 16), and "
        "this is (1, 3, 16) (values of another prompt are as long as that prompt).",
        "model.transformer.h[1].output = short",
    ),
    (
        no_such_call,
        NeverRanError,
        "`transformer.ln_f` was called 1 time, so there is no `transformer.ln_f.call(1)`: they "
        "count from 0.",
        "model.transformer.ln_f.call(1).output.save()",
    ),
    (
        step_never_came,
        NeverRanError,
        "Step 2 never came, so `lm_head.output of step 2` has no value: the generation ended after "
        "1 step (an end token, a stopping criterion, or `stop`). `save(optional=True)` lets a "
        "value be missing. In the place of a loop over `generator.steps`, "
        "`with generator.every_step():` saves a list of the steps that there were.",
        "model.lm_head.output.save()",
    ),
    (
        no_such_step,
        IndexOutOfRangeError,
        "There is no step 3: `max_new_tokens=3` makes steps 0 to 2.",
        "generator.tokens[3].save()",
    ),
    (
        skipped,
        NeverRanError,
        "`transformer.h[1].mlp.output` has no value, because `skip` lets `transformer.h[1]` not "
        "run, at\nLINE\n    model.transformer.h[1].skip(model.transformer.h[0].output)\nIt is "
        "used at",
        "model.transformer.h[1].mlp.output.save()",
    ),
    (
        stopped,
        NeverRanError,
        "`lm_head.output` has no value, because the run ends after `transformer.h[1]`, by `stop` "
        "at\nLINE\n    model.transformer.h[1].stop()\nIt is used at",
        "model.lm_head.output.save()",
    ),
    (
        no_backward,
        OperationError,
        "`transformer.h[1].output[0].grad` is the gradient of a backward pass, and there is none: "
        "write `loss.backward()` in the block.",
        "model.transformer.h[1].output[0].grad.save()",
    ),
    (
        not_on_the_way,
        ExecutionError,
        "`transformer.h[1].output[0][:, -1].grad` does not exist: the loss does not depend on it. "
        "The gradient of a part of a site is that part of the site's gradient.",
        "model.transformer.h[1].output[0][:, -1].grad.save()",
    ),
    (
        a_decision,
        OperationError,
        "`(lm_head.output.sum() > 0)` has no value while the block is open, so `if`, `and`, `or`, "
        "`not` and `while` cannot be decided by it: use insitu.cond or torch.where, or save it and "
        "decide after the block.",
        "if model.lm_head.output.sum() > 0:",
    ),
    (
        a_function_on_the_wire,
        WireError,
        "`len(lm_head.output)` cannot be sent to another process: a Python function (len) stays "
        "in the process that it was written in: record its operations instead.",
        "apply(len, model.lm_head.output).save()",
    ),
]


@pytest.mark.parametrize(
    ("write", "kind", "message", "line"), CASES, ids=[case[0].__name__ for case in CASES]
)
def test_the_message_says_what_to_do_and_where(
    gpt2: LanguageModel,
    write: Callable[[LanguageModel], None],
    kind: type[InsituError],
    message: str,
    line: str,
) -> None:
    with pytest.raises(kind) as caught:
        write(gpt2)
    place = re.compile(rf'  File "[^"]*{re.escape(__file__.rpartition("/")[2])}", line \d+')
    found = place.sub("LINE", str(caught.value))
    assert found == f"{message}\nLINE\n    {line}"
    usable(gpt2)


def usable(model: LanguageModel) -> None:
    """The model is as it was, and the next run is fine."""
    with model.trace(IDS):
        value: Any = model.lm_head.output.save()
    with torch.no_grad():
        assert torch.equal(value, model.module(IDS, use_cache=False).logits)
