"""What has to hold between values of a run: plain torch on tensors, and nothing of the library's.

Both sides are known up to rounding, so they are compared in proportion to the terms that they are
sums of. How much rounding may change depends on the dtype in which the model computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

Tensor = torch.Tensor
_SINGLE = torch.finfo(torch.float32)


class Difference(NamedTuple):
    """How far two tensors are apart.

    Attributes:
        largest: the largest difference of two numbers, in proportion to what they are made of;
            infinite if the shapes differ or if there are numbers that are none.
        allowed: what rounding may make of it.
        note: what else there is to say.
    """

    largest: float
    allowed: float = 0.0
    note: str = ""

    @property
    def is_rounding(self) -> bool:
        """Whether rounding explains it."""
        return self.largest <= self.allowed


def summed(terms: Sequence[Tensor], total: Tensor) -> Difference:
    """Returns how far a sum is from what it is said to be, number by number.

    Args:
        terms: `(batch, position, d_model)` each.
        total: their sum.
    """
    if any(term.shape != total.shape for term in terms):
        shapes = " + ".join(str(tuple(term.shape)) for term in terms)
        return Difference(math.inf, note=f"{shapes} cannot be {tuple(total.shape)}")
    wide = torch.stack([term.double() for term in terms])
    return compared(wide.sum(0), total, wide.abs().sum(0), (*terms, total))


def combined(terms: Sequence[Tensor], total: Tensor, beside: Tensor | None = None) -> Difference:
    """Returns how far a value is from a sum of others with factors, channel by channel.

    The factors, and a bias beside them, are those that fit best. They are the same at all
    positions. There are many more positions than factors, so that only a true sum fits.

    Args:
        terms: `(batch, position, d_model)` each.
        total: what they make together.
        beside: a further term of it, without a factor; None for none.
    """
    if any(term.shape != total.shape for term in terms):
        shapes = " + ".join(str(tuple(term.shape)) for term in terms)
        return Difference(math.inf, note=f"{shapes} cannot be {tuple(total.shape)}")
    channels = [_by_channel(term) for term in (*terms, torch.ones_like(total))]
    given, made = torch.stack(channels, -1), _by_channel(total)[..., None]
    rest = torch.zeros_like(made[..., 0]) if beside is None else _by_channel(beside)
    made = made - rest[..., None]
    if given.shape[1] < 2 * given.shape[2]:
        return Difference(math.inf, note=f"{given.shape[1]} positions are too few to tell")
    if not (given.isfinite().all() and made.isfinite().all()):
        return Difference(math.inf, note="there are numbers that are none")
    factors = torch.linalg.lstsq(given, made, driver="gelsd").solution
    parts = given * factors.mT
    size = float(made.abs().max() + rest.abs().max())
    for term in (parts[..., number] for number in range(len(terms))):
        if not float((term - term[:, :1]).abs().max()) > 1e-4 * size:
            return Difference(math.inf, note="one of them has no part in it")
    summands = parts.abs().sum(-1) + rest.abs()
    # Terms may be sums in double precision: `total` has the dtype of the model.
    return compared(parts.sum(-1), made[..., 0], summands, (total,))


def _by_channel(value: Tensor) -> Tensor:
    return value.detach().cpu().double().flatten(0, -2).T


def reassembled(result: Tensor, bias: Tensor, output: Tensor) -> Difference:
    """Returns how far what all heads make together is from what the layer behind them returns.

    Args:
        result: `(batch, head, position, d_model)`.
        bias: `(d_model,)`, what the layer makes of nothing.
        output: `(batch, position, d_model)`.
    """
    heads, shift = result.double(), bias.double()
    size = heads.abs().sum(1).amax(-1, keepdim=True) + shift.abs()
    return compared(heads.sum(1) + shift, output, size, (result, output))


def attended(pattern: Tensor, v: Tensor, z: Tensor, gate: Tensor | None = None) -> Difference:
    """Returns how far `z` is from the values, weighted with the attention pattern.

    Args:
        pattern: `(batch, head, query, key)`.
        v: `(batch, key's head, key, d_head)`: several heads may share keys and values.
        z: `(batch, head, query, d_head)`.
        gate: of the form of `z`: what the heads are multiplied with, if they are.
    """
    if pattern.shape[1] % v.shape[1] or pattern.shape[-1] != v.shape[2]:
        shapes = f"{tuple(pattern.shape)} cannot weight {tuple(v.shape)}"
        return Difference(math.inf, note=shapes)
    values = v.double().repeat_interleave(pattern.shape[1] // v.shape[1], dim=1)
    made = pattern.double() @ values
    size = (pattern.double().abs() @ values.abs()).amax(-1, keepdim=True)
    if gate is not None:
        made, size = made * gate.double(), size * gate.double().abs().amax(-1, keepdim=True)
    return compared(made, z, size, (pattern, v, z))


def normalised(pattern: Tensor, sinks: bool) -> Difference:
    """Returns how far the weights of a query are from 1 in sum.

    Args:
        pattern: `(batch, head, query, key)`, without negative numbers.
        sinks: whether a part of the weights goes to something that is no position: then it may be
            less.
    """
    if bool((pattern < 0).any()):
        return Difference(math.inf, note="there are negative weights")
    sums, one = pattern.double().sum(-1), torch.ones((), device=pattern.device)
    if sinks:
        sums = sums.clamp_min(1)
    return compared(sums, one.expand_as(sums), one, (pattern,))


def softmaxed(scores: Tensor, pattern: Tensor) -> Difference:
    """Returns how far weights are from the softmax of scores.

    Args:
        scores: `(..., query, key)`.
        pattern: of that shape.
    """
    if scores.shape != pattern.shape:
        shapes = f"{tuple(scores.shape)} is not {tuple(pattern.shape)}"
        return Difference(math.inf, note=shapes)
    made = scores.double().softmax(-1)
    return compared(made, pattern, torch.ones_like(made), (scores, pattern))


def projected(given: Tensor, weight: Tensor, made: Tensor) -> Difference:
    """Returns how far heads are from what weights make of a value, but for a bias.

    Args:
        given: `(batch, position, d_in)`.
        weight: `(head, d_in, d_head)`.
        made: `(batch, head, position, d_head)`.
    """
    if given.shape[-1] != weight.shape[1]:
        return Difference(math.inf, note=f"{tuple(weight.shape)} is not for {tuple(given.shape)}")
    own = torch.einsum("btm,hmd->bhtd", given.double(), weight.double())
    if own.shape != made.shape:
        return Difference(math.inf, note=f"{tuple(own.shape)} is not {tuple(made.shape)}")
    size = torch.einsum("btm,hmd->bhtd", given.double().abs(), weight.double().abs())
    left = made.double() - own
    bias = left[:1, :, :1].expand_as(left)
    return compared(left, bias, size + bias.abs(), (given, weight, made))


def scored(
    added: Tensor, products: Tensor, visible: Tensor, cap: float | None, stored: Sequence[Tensor]
) -> Difference:
    """Returns how far scores are from a multiple of products, but for a shift of each query's.

    Args:
        added: `(batch, head, query, key)`, what queries make of the scores.
        products: of that form, those of queries and keys.
        visible: which of them are not masked.
        cap: what a tanh keeps the scores below, None if none does.
        stored: as of `compared`.
    """
    if added.shape != products.shape:
        return Difference(math.inf, note=f"{tuple(added.shape)} is not {tuple(products.shape)}")
    count = visible.sum(-1, keepdim=True).clamp_min(1)
    wide = added.double() if cap is None else cap * (added.double() / cap).atanh()

    def centred(value: Tensor) -> Tensor:
        value = value.double().masked_fill(~visible, 0)
        return (value - value.sum(-1, keepdim=True) / count).masked_fill(~visible, 0)

    found, expected = centred(wide), centred(products)
    if not bool(found.any()):
        return Difference(math.inf, note="scores do not depend on queries")
    scale = (found * expected).sum() / (expected * expected).sum().clamp_min(_SINGLE.tiny)
    size = wide.masked_fill(~visible, 0).abs().amax()
    return compared(found, scale * expected, size, stored)


def rising(logits: Tensor, made: Tensor) -> Difference:
    """Returns how far numbers are from rising with others: what a scale or a cap makes of them.

    Args:
        logits: `(batch, position, vocabulary)`.
        made: what they are made of, of that shape.
    """
    ordered = logits.double().gather(-1, made.double().argsort(-1))
    highest = ordered.cummax(-1).values
    size = ordered.abs().amax(-1, keepdim=True)
    return compared(ordered, highest, size, (logits, made))


def proportion(found: Tensor, expected: Tensor) -> float:
    """Returns which multiple of a tensor another one is, if it is one.

    Args:
        found: a tensor.
        expected: another of that shape.
    """
    wide = expected.double()
    return float((found.double() * wide).sum() / (wide * wide).sum())


def compared(found: Tensor, expected: Tensor, size: Tensor, stored: Sequence[Tensor]) -> Difference:
    """Returns how far two tensors are apart.

    Args:
        found: what was found.
        expected: what it has to be.
        size: how large the numbers are that both are summed up of, of a shape that broadcasts.
        stored: the values that both were computed from, in the dtypes that the model has them in.
    """
    if found.shape != expected.shape:
        shapes = f"{tuple(found.shape)} is not {tuple(expected.shape)}"
        return Difference(math.inf, note=shapes)
    if not found.numel():
        return Difference(math.inf, note=f"there is nothing in {tuple(found.shape)}")
    kinds = [value.dtype for value in stored if value.is_floating_point()]
    rounding = max((torch.finfo(kind).eps for kind in kinds), default=0.0)
    apart = (found.double() - expected.double()).abs() / size.double().clamp_min(_SINGLE.tiny)
    largest = float(apart.max())
    # Matrix products add up in single precision at best, whatever they return.
    allowed = 4 * rounding + 64 * _SINGLE.eps
    return Difference(math.inf if math.isnan(largest) else largest, allowed)
