"""Logits are computed where they are read, and are those of the prompt alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from insitu import LanguageModel
from insitu.graph.proxy import Proxy
from tests.thinning import sampled

Pick = Callable[[Any], Any]


def last(logits: Any) -> Any:
    return logits[0, -1]


def rows(count: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(1, 100, (count, length), generator=generator)


# What is read of each prompt, and how many positions of every row are unembedded for it.
CASES: dict[str, tuple[int, list[tuple[torch.Tensor, list[Pick]]]]] = {
    "the last": (1, [(rows(1, length), [last]) for length in (9, 12, 12, 14)]),
    "different ones": (
        3,
        [
            (rows(1, 12), [lambda x: x[0, 2:5]]),
            (rows(1, 13), [last, lambda x: x[:, 4]]),
            (rows(1, 11), []),
        ],
    ),
    "of several rows": (
        2,
        [(rows(3, 12), [lambda x: x[:, -1]]), (rows(1, 12), [lambda x: x[0, :2]])],
    ),
    "of one prompt": (2, [(rows(1, 12), [last]), (rows(1, 12), [lambda x: x[0, 6]])]),
}


@pytest.mark.parametrize("language_model", sampled(["gpt2", "llama"], ["gpt2"]), indirect=True)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("site", sampled(["head", "model"], ["head"]))
def test_only_positions_that_are_read_become_logits(
    language_model: LanguageModel, name: str, site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (count, case) = language_model, CASES[name]
    saved: list[tuple[Proxy, torch.Tensor]] = []
    seen: list[torch.Size] = []
    head, forward = model.module.lm_head, nn.Linear.forward

    def watched(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
        output = forward(self, input)
        if self is head:  # a hook on it would see each prompt alone
            seen.append(output.shape)
        return output

    with model.trace() as tracer:
        for ids, picks in case:
            expected = model.module(ids).logits
            with tracer.invoke(ids) as invoker:
                logits = model.lm_head.output if site == "head" else invoker.output.logits
                saved.extend((pick(logits).save(), pick(expected)) for pick in picks)
        monkeypatch.setattr(nn.Linear, "forward", watched)
    monkeypatch.undo()
    for found, expected in saved:
        torch.testing.assert_close(found.value, expected, atol=1e-5, rtol=1e-5)
    passes = seen[-len(tracer.plan.passes) :]  # what came before were trials
    assert [shape[1] for shape in passes] == [count] * len(passes)


@pytest.mark.parametrize("whole", ["read", "computed with", "written"])
def test_all_become_logits_where_all_may_be_looked_at(gpt2: LanguageModel, whole: str) -> None:
    first, second = rows(1, 12), rows(1, 12) + 0
    second[0, 0] = 7
    with gpt2.trace() as tracer:
        with tracer.invoke(first):
            logits = gpt2.lm_head.output
            if whole == "written":
                logits[0, 3] = 0
            found = (logits * 2 if whole == "computed with" else logits).save()
        with tracer.invoke(second):
            other = gpt2.lm_head.output[0, -1].save()
    expected = gpt2.module(first).logits
    if whole == "written":
        expected[0, 3] = 0
    expected = expected * 2 if whole == "computed with" else expected
    torch.testing.assert_close(found.value, expected, atol=1e-5, rtol=1e-5)
    alone = gpt2.module(second).logits[0, -1]
    torch.testing.assert_close(other.value, alone, atol=1e-5, rtol=1e-5)


def test_a_pass_that_fails_leaves_the_head_as_it_was(gpt2: LanguageModel) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("mine")

    handle = gpt2.module.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="mine"), gpt2.trace() as tracer:
        for length in (9, 12):
            with tracer.invoke(rows(1, length)):
                gpt2.lm_head.output[0, -1].save()
    handle.remove()
    assert not gpt2.module.lm_head._forward_pre_hooks
    assert gpt2.module(rows(1, 9)).logits.shape == (1, 9, 100)
