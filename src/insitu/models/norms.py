"""What a norm divides by, and what it makes before its weights are applied.

A norm's module computes both inside, so here they are computed beside it; writing one of them
writes the norm's output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from insitu.engine.fallback import Fallback, tried
from insitu.graph.control import call_module
from insitu.graph.errors import OperationError
from insitu.graph.location import Mark, here, mark
from insitu.graph.proxy import Proxy
from insitu.tracing.forms import Computed
from insitu.tracing.invocation import Invocation


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm over the last axis.

    Attributes:
        path: its module.
        centred: whether the mean is subtracted first.
        eps: the number added to the mean of the squares.
    """

    path: str
    centred: bool
    eps: float

    def centre(self, value: Any) -> Any:
        """Returns a value as it is divided, in float32."""
        value = value.float()
        return value - value.mean(-1, keepdim=True) if self.centred else value

    def scale(self, centred: Any) -> Any:
        """Returns what such a value is divided by."""
        return (centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def bias(self, like: Any, applied: Callable[[Any], Any]) -> Any:
        """Returns what the norm makes of zeros, `(1, d_model)`.

        Args:
            like: what it is given.
            applied: the norm itself, on values like these.
        """
        return applied(torch.zeros_like(like.flatten(0, -2)[:1]))

    def weight(self, like: Any, applied: Callable[[Any], Any]) -> Any:
        """Returns what the norm multiplies with, `(1, d_model)`, however it keeps it.

        Args:
            like: as of `bias`.
            applied: as of `bias`.
        """
        ones = torch.ones_like(like.flatten(0, -2)[:1])
        turns = 1 - 2 * (ones.float().cumsum(-1) % 2)  # -1, 1, -1, ...: well away from the mean
        made = applied(turns.type_as(like)) - self.bias(like, applied)
        centred = self.centre(turns)
        return made / (centred / self.scale(centred))

    def recorded(self, line: Mark) -> Callable[[Any], Any]:
        """Returns the norm itself, on values of an open block.

        Args:
            line: the user's line.
        """
        return lambda value: call_module(self.path, (value,), {}, line)


def norm_of(module: nn.Module, path: str, width: int) -> Norm | None:
    """Returns what a norm does, None if it does something else than to divide.

    Args:
        module: the norm, with weights or without.
        path: its path.
        width: the length of the last axis.
    """
    names = ("eps", "variance_epsilon", "epsilon")
    eps = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    if eps is None:  # some keep it to themselves
        eps = _measured_eps(module, width)
    if not isinstance(eps, float):
        return None
    candidates = (Norm(path, False, eps), Norm(path, True, eps))
    return next((norm for norm in candidates if _does(module, norm, width)), None)


def _measured_eps(module: nn.Module, width: int) -> float | None:
    """What a norm adds to the mean of the squares, to two digits; None if it is none."""
    size = 1e-3
    turns = 1.0 - 2.0 * (torch.arange(width) % 2)
    found = _on_ones(module, size * turns[None])
    if found is None:
        return None
    made = float(found[0, 0])
    return float(f"{size**2 * (1 / made**2 - 1):.1e}") if 0 < made < 1 else None


def _on_ones(module: nn.Module, value: torch.Tensor) -> torch.Tensor | None:
    """What a module makes of a value with weights of ones; None if that has another shape."""

    def made() -> list[Any]:
        copied = copy.deepcopy(module).to_empty(device="cpu").float()
        for parameter in copied.parameters():
            nn.init.ones_(parameter)
        with torch.no_grad():
            return [copied(value), copied(torch.zeros_like(value))]

    found = tried(made, "a norm")
    if isinstance(found, Fallback):
        return None
    if any(not isinstance(one, torch.Tensor) or one.shape != value.shape for one in found):
        return None  # it gives more than one tensor, or is no norm
    return found[0] - found[1]


def _does(module: nn.Module, norm: Norm, width: int) -> bool:
    """Whether a module does what a norm would do, tried on a copy whose weights are ones."""
    turns = 1.0 - 2.0 * (torch.arange(width) % 2)
    rows = torch.tensor([[0.1, 0.0], [1.0, 0.3], [5.0, -2.0]])  # of different size and mean
    given = rows[:, :1] * turns + rows[:, 1:]
    made = _on_ones(module, given)
    if made is None:
        return False
    centred = norm.centre(given)
    weight = made / (centred / norm.scale(centred))
    return bool(torch.isclose(weight, weight[:1], rtol=1e-3).all())


@dataclass(frozen=True, slots=True)
class Scale(Computed):
    """What a norm divides by, `(batch, position, 1)`. The site is its output.

    Attributes:
        norm: the norm.
    """

    unwritable = "it is computed beside the norm. Write that of the norm's `.output`."

    norm: Norm

    def shown(self, value: Proxy, invocation: Invocation, line: Mark) -> Proxy:
        """Returns the value as it is shown."""
        given = invocation.read(self.norm.path, "input", line)
        return self.norm.scale(self.norm.centre(given)).type_as(given)

    def restored(self, value: Any, site: Proxy, invocation: Invocation, line: Mark) -> Any:
        """Returns the value that is to stand at the site."""
        bias = self.norm.bias(site, self.norm.recorded(line))
        own = self.shown(site, invocation, line)
        return ((site - bias) * (own / value) + bias).type_as(site)

    def gradient(self, value: Proxy) -> Proxy:
        """Raises: it is no sum of what the gradient of the output says."""
        raise OperationError(
            "What a norm divides by has no gradient here: it is computed beside the norm. Take "
            "that of the norm's `.output`.",
            here(),
        )


@dataclass(frozen=True, slots=True)
class Normalised(Computed):
    """What a norm makes before its weights are applied, `(batch, position, d_model)`.

    Attributes:
        norm: the norm.
    """

    unwritable = "it is computed beside the norm. Write that of the norm's `.output`."

    norm: Norm

    def shown(self, value: Proxy, invocation: Invocation, line: Mark) -> Proxy:
        """Returns the value as it is shown."""
        given = invocation.read(self.norm.path, "input", line)
        centred = self.norm.centre(given)
        return (centred / self.norm.scale(centred)).type_as(given)

    def restored(self, value: Any, site: Proxy, invocation: Invocation, line: Mark) -> Any:
        """Returns the value that is to stand at the site."""
        applied = self.norm.recorded(line)
        weight, bias = self.norm.weight(site, applied), self.norm.bias(site, applied)
        return (value * weight + bias).type_as(site)

    def gradient(self, value: Proxy) -> Proxy:
        """Returns the gradient of the shown value."""
        return value * self.norm.weight(value, self.norm.recorded(mark()))
