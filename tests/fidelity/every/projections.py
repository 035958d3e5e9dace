"""Whether queries, keys and values come from what a matrix makes: by plain arithmetic."""

from __future__ import annotations

import torch

Tensor = torch.Tensor
_LIMIT = 2e-3


def makes(made: Tensor, value: Tensor, name: str) -> bool:
    """Returns whether a projection leads to queries, keys or values.

    Values are the projection and a bias, or this normalised head by head. Of queries and keys the
    first position is compared, which rotary embeddings leave as it is: they are the projection,
    scaled, with a bias or normalised, element by element; or numbers of the same size, where the
    rotation moves the first position, or a scale of its own for each head.

    Args:
        made: `(batch, head, position, d_head)`, what the matrix makes.
        value: of the same shape, what has the name.
        name: "q", "k" or "v".
    """
    if name == "v":
        whole, all_found = (one.transpose(1, 2).flatten(0, 1) for one in (made, value))
        return _is_affine(whole, all_found) or any(
            _is_affine(_normalised(whole, False, epsilon), all_found) for epsilon in (1e-5, 1e-6)
        )
    first, found = made[:, :, 0], value[:, :, 0]
    if _is_affine(first, found) or _sizes(first, found):
        return True
    return any(
        _is_affine(_normalised(form, centred, epsilon).reshape(first.shape), found)
        for form in (first, first.flatten(1))
        for centred in (False, True)
        for epsilon in (1e-5, 1e-6, 1e-12)
    )


def leads_to_heads(made: Tensor, z: Tensor) -> bool:
    """Returns whether heads are the weighted values, or these normalised over all heads.

    Args:
        made: `(batch, head, query, d_head)`, the values weighted with the pattern.
        z: of the same shape, what the heads give.
    """
    if made.shape != z.shape:
        return False
    if float((made - z).abs().max()) <= _LIMIT * float(z.abs().max()):
        return True
    whole, found = (one.transpose(1, 2).flatten(2).flatten(0, 1) for one in (made, z))
    return any(
        _is_affine(_normalised(whole, centred, epsilon), found)
        for centred in (False, True)
        for epsilon in (1e-5, 1e-6)
    )


def _normalised(value: Tensor, centred: bool, epsilon: float) -> Tensor:
    if centred:
        value = value - value.mean(-1, keepdim=True)
    return value / value.pow(2).mean(-1, keepdim=True).add(epsilon).sqrt()


def _is_affine(made: Tensor, value: Tensor) -> bool:
    """Whether each number is a number of the other, times something, and something more.

    Args:
        made: `(sample, ...)`, at least four samples.
        value: of the same shape.
    """
    x, y = made.flatten(1).double(), value.flatten(1).double()
    x, y = x - x.mean(0), y - y.mean(0)
    slope = (x * y).sum(0) / (x * x).sum(0).clamp_min(1e-12)
    rest = (y - slope * x).abs().max()
    scale = y.abs().max()
    return float(scale) > 0 and float(rest) <= _LIMIT * float(scale)


def _sizes(made: Tensor, value: Tensor) -> bool:
    """Whether each head has the same length up to a factor, as rotations and scales leave it."""
    ratio = value.double().norm(dim=-1) / made.double().norm(dim=-1)
    return float((ratio / ratio.mean(0) - 1).abs().max()) <= _LIMIT
