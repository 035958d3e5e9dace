"""einops on proxies: `rearrange`, `reduce`, `repeat` and `einsum` become recorded operations.

einops finds its backends among the subclasses of its base class, so importing this file is all
that it takes. It works with the actual shapes, so a proxy that it is given has its shape inferred.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUntypedBaseClass=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops._backends import AbstractBackend

from insitu.graph.proxy import AnyProxy, Proxy


class ProxyBackend(AbstractBackend):
    """Does einops' steps on proxies; what each does is said in einops' base class."""

    framework_name = "insitu"

    def is_appropriate_type(self, tensor: object) -> bool:  # noqa: D102
        return isinstance(tensor, AnyProxy)

    def reduce(self, x: Proxy, operation: str, axes: Sequence[int]) -> Proxy:  # noqa: D102
        axes = sorted(axes, reverse=True)
        if operation in ("min", "max"):
            return getattr(x, f"a{operation}")(dim=tuple(axes))
        if operation in ("sum", "mean"):
            return getattr(x, operation)(dim=tuple(axes))
        for axis in axes:  # torch takes one axis at a time for any, all and prod
            x = getattr(x, operation)(dim=axis)
        return x

    def transpose(self, x: Proxy, axes: Sequence[int]) -> Proxy:  # noqa: D102
        return x.permute(tuple(axes))

    def stack_on_zeroth_dimension(self, tensors: list[Proxy]) -> Any:  # noqa: D102
        return torch.stack(tensors)  # pyright: ignore[reportArgumentType]

    def add_axes(self, x: Proxy, n_axes: int, pos2len: Mapping[int, int]) -> Proxy:  # noqa: D102
        sizes = [-1] * n_axes
        for position, length in pos2len.items():
            x = x.unsqueeze(position)
            sizes[position] = length
        return x.expand(sizes)

    def add_axis(self, x: Proxy, new_position: int) -> Proxy:  # noqa: D102
        return x.unsqueeze(new_position)

    def tile(self, x: Proxy, repeats: Sequence[int]) -> Proxy:  # noqa: D102
        return x.repeat(tuple(repeats))

    def concat(self, tensors: list[Proxy], axis: int) -> Any:  # noqa: D102
        return torch.cat(tensors, dim=axis)  # pyright: ignore[reportArgumentType]

    def is_float_type(self, x: Proxy) -> bool:  # noqa: D102
        return x.dtype.is_floating_point

    def einsum(self, pattern: str, *x: Proxy) -> Any:  # noqa: D102
        return torch.einsum(pattern, *x)
