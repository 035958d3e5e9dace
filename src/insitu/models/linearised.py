"""Linearised ways: with what norms divide by held as it was in a run, most ways are affine.

So the result is a sum over the terms that the value at the beginning is a sum of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from insitu.models.norms import Norm, norm_of
from insitu.models.ways import Way, called

Function = Callable[[torch.Tensor], torch.Tensor]


def linearised(way: Way, modules: Mapping[str, nn.Module], at: torch.Tensor) -> Function | None:
    """Returns a way with its norms' divisors held, None if that is not affine.

    Args:
        way: the way.
        modules: the model's tree, by path.
        at: the value with which the divisors are what they are held at, `(..., size)`.

    Returns:
        A function of values that broadcast against `at`.
    """
    norms: dict[str, tuple[Norm, torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def meet(path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        made = called(modules, path, args, kwargs)
        norm = _norm(modules[path], path, args)
        if norm is not None:
            (given,) = args
            own: Function = modules[path]
            divisor = norm.scale(norm.centre(given))
            norms[path] = (norm, divisor, norm.weight(given, own), norm.bias(given, own))
        return made

    def hold(path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if path not in norms:
            return called(modules, path, args, kwargs)
        norm, divisor, weight, bias = norms[path]
        (given,) = args
        return (norm.centre(given) / divisor * weight + bias).type_as(given)

    with torch.no_grad():
        way.apply(at, meet)
        function = partial(way.apply, call=hold)
        return function if _is_affine(function, at) else None


def _norm(module: nn.Module, path: str, args: tuple[Any, ...]) -> Norm | None:
    """What a module divides by, None if it is no norm."""
    if len(args) != 1 or "Linear" in type(module).__name__:
        return None
    if any(part.ndim != 1 for part in module.parameters()):
        return None
    return norm_of(module, path, args[0].shape[-1])


def _is_affine(function: Function, at: torch.Tensor) -> bool:
    """Whether a function of sums is the sum, tried as far from where it was as the dtype allows."""
    for far in (300, 30, 3):
        one, other = far * at, -far / 3 * at.roll(1, -1)
        values = (torch.zeros_like(at), one, other, one + other)
        none, *parts, whole = (function(value).double() for value in values)
        if all(bool(value.isfinite().all()) for value in (none, *parts, whole)):
            missed = sum(parts) - none - whole
            size = max(float(whole.abs().max()), float(none.abs().max()), 1e-30)
            # What is held of norms is in single precision, whatever the model is in.
            rounding = max(torch.finfo(at.dtype).eps, torch.finfo(torch.float32).eps)
            return float(missed.abs().max()) <= 64 * rounding * size
    return False
