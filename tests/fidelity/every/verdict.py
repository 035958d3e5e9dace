"""What came of a standard name, and the comparisons that decide it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Tensor = torch.Tensor
State = Literal["right", "refused", "wrong", "crash"]
_MASKED = -1e4  # what a mask makes of scores


@dataclass(frozen=True)
class Verdict:
    """What came of a name, or of a group of them.

    Attributes:
        state: whether it is right, refused with a reason, wrong, or fails without one.
        reason: of which name, and why.
    """

    state: State
    reason: str = ""


class WrongError(Exception):
    """A name stands for something else."""


def demand(right: bool, reason: str) -> None:
    """Raises `WrongError` where something does not hold."""
    if not right:
        raise WrongError(reason)


def same(found: Tensor, expected: Tensor, limit: float = 1e-4) -> bool:
    """Whether two tensors are the same up to rounding; what a mask hides is not compared."""
    if found.shape != expected.shape:
        return False
    masked = (found < _MASKED) & (expected < _MASKED)
    found, expected = found.masked_fill(masked, 0), expected.masked_fill(masked, 0)
    scale = max(float(expected.abs().max()), 1e-3) if expected.numel() else 1.0
    return not found.numel() or float((found - expected).abs().max()) <= limit * scale


def close(found: Tensor, expected: Tensor, what: str, limit: float = 1e-4) -> None:
    """Raises `WrongError` where two tensors differ by more than rounding."""
    demand(same(found.float(), expected.float(), limit), what)


def constant(value: Tensor) -> bool:
    """Whether something is the same at all positions: a bias."""
    flat = value.flatten(0, -2)
    scale = max(float(flat.abs().max()), 1.0)
    return float((flat - flat[:1]).abs().max()) <= 1e-4 * scale


def worst(found: list[Verdict]) -> Verdict:
    """The verdict of several names: right where one is, and none is wrong."""
    for state in ("crash", "wrong"):
        bad = [one for one in found if one.state == state]
        if bad:
            return bad[0]
    refused = [one for one in found if one.state == "refused"]
    if any(one.state == "right" for one in found):
        return Verdict("right", refused[0].reason if refused else "")
    return refused[0]
