"""Writes in place that go on with an earlier one's copy, against the same lines on plain lists."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from insitu import Model
from insitu.graph import put

X = torch.tensor([[1.0, 3.0], [2.0, 5.0], [4.0, 8.0]])


class _Parts(nn.Module):
    def __init__(self, nested: bool = False) -> None:
        super().__init__()
        self.nested = nested

    def forward(self, x: torch.Tensor) -> Any:
        parts = x * 1, x * 2, x * 3
        return (parts, x * 4) if self.nested else parts


class _Last(nn.Module):
    def forward(self, parts: Any) -> torch.Tensor:
        return parts[-1] * 1


def _model(nested: bool = False) -> Model:
    return Model(nn.Sequential(_Parts(nested), _Last()))


def test_an_assigned_tuple_keeps_the_copy_that_it_was_given() -> None:
    model = _model()
    with model.trace(X):
        taken = model[0].output[0]
        taken.mul_(2)
        model[0].output = (model[0].output[1], model[0].output[2], taken)
        model[0].output[0].add_(10)  # hands on the entry that was given
        kept = model[0].output[2].save()
        taken.mul_(5)  # for the lines that follow only
        result = model[0].output.save()
        after = taken.save()
    assert torch.equal(kept, X * 2) and torch.equal(after, X * 10)
    for found, right in zip(result.value, (X * 2 + 10, X * 3, X * 2), strict=True):
        assert torch.equal(found, right)


def test_a_line_that_waits_sees_a_copy_that_was_handed_on_as_it_was() -> None:
    model = _model()
    with model.trace(X):
        taken = model[0].output[0]
        taken.mul_(2)
        model[0].output = (model[0].output[1], taken, model[0].output[2])
        model[0].output[0].add_(10)
        waiting = (model[0].output[1] + 0 * model[1].output).save()
        taken.mul_(5)
    assert torch.equal(waiting, X * 2)


_WAYS: dict[str, Callable[[Any, int, Any], Any]] = {
    "a slice": lambda parts, entry, _: parts[0:2][entry],
    "two slices": lambda parts, entry, _: parts[entry : entry + 1][0],
    "a computed entry": lambda parts, entry, zero: parts[zero + entry],
    "the other end": lambda parts, entry, _: parts[entry - 3],
}


@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize("nested", [False, True])
def test_a_write_to_another_entry_leaves_that_as_it_was_for_earlier_lines(
    way: str, nested: bool
) -> None:
    model, taken = _model(nested), _WAYS[way]
    with model.trace(X):
        parts = model[0].output[0] if nested else model[0].output
        zero = parts[0].sum().long() * 0
        before = (parts[1] + 0 * model[1].output).save()  # runs after the writes
        taken(parts, 0, zero).mul_(5)
        taken(parts, 1, zero).mul_(7)
        result = model[0].output.save()
    right = [X * 5, X * 14, X * 3]
    found = result.value[0] if nested else result.value
    assert torch.equal(before, X * 2)
    assert all(torch.equal(*pair) for pair in zip(found, right, strict=True))


@pytest.mark.parametrize(
    "part",
    [
        lambda parts, number: parts[0],
        lambda parts, number: parts[0][:, number % 2],
        lambda parts, number: parts[0][number % 3],
        lambda parts, number: parts[0][number % 3 :],
        lambda parts, number: parts[0:2][0].T[number % 2],
        lambda parts, number: parts[-3].view(-1)[number % 6],
    ],
)
def test_many_writes_to_one_entry_copy_it_as_often_as_a_single_one(
    part: Callable[[Any, int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, copies = _model(), list[torch.Tensor]()
    copied = put._copied  # pyright: ignore[reportPrivateUsage]

    def counted(base: torch.Tensor) -> torch.Tensor:
        copies.append(base)
        return copied(base)

    def copies_of(writes: int) -> int:
        copies.clear()
        with model.trace(X):
            for number in range(writes):
                part(model[0].output, number).add_(1.0)
            result = model[0].output[0].save()
        right = X.clone()
        for number in range(writes):
            part((right, right, right), number).add_(1.0)
        assert torch.equal(result, right)
        return len(copies)

    monkeypatch.setattr(put, "_copied", counted)
    copies_of(1)
    assert 0 < copies_of(30) == copies_of(1)
