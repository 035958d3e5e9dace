"""What operations take, counted while they run on tensors without data: arithmetic and memory.

Matrix products, convolutions and fused attention are counted by PyTorch's own formulas, and
decompositions, sorts and distances by their textbook orders. Any other operation counts as one for
each number that it reads or makes.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from insitu.engine.counts import Counts
from insitu.graph.structure import tensors_of

_CUBIC = 10.0
"""Operations for each m * n * min(m, n) of a decomposition: the order of an SVD with vectors."""

_DECOMPOSITIONS = ("linalg_", "cholesky_", "lu_", "geqrf", "ormqr", "triangular_solve")
_NO_DECOMPOSITIONS = ("linalg_vector_norm", "linalg_cross", "linalg_vecdot")
_SORTS = ("sort", "topk", "kthvalue", "median", "mode", "unique", "quantile", "searchsorted")


class Counting(TorchDispatchMode):
    """Counts the operations in its block, which run on tensors without data."""

    def __init__(self) -> None:
        super().__init__()
        self._flops = 0.0
        self._live = self._peak = self._made = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    @property
    def counts(self) -> Counts:
        """What was counted so far."""
        return Counts(self._flops, self._peak, self._made, self._live)

    def restart(self) -> None:
        """Lets `peak` be of what is made from now on, and of what is there now."""
        self._peak = self._live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        given = tensors_of((args, dict(kwargs)))
        self._flops += _flops(packet, args, kwargs, given, result)
        storages = {id(one.untyped_storage()) for one in given}
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            if id(storage) not in storages and id(storage) not in self._known:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        """Counts the memory of a new value, until it is gone."""
        number, size = id(storage), int(storage.nbytes())

        def gone(_: object) -> None:
            if self._known.pop(number, None) is not None:
                self._live -= size

        self._known[number] = weakref.ref(storage, gone)
        self._live += size
        self._made += size
        self._peak = max(self._peak, self._live)


def _flops(
    packet: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: list[Any], result: Any
) -> float:
    if packet in flop_registry:
        return float(cast(Any, flop_registry)[packet](*args, **kwargs, out_val=result))
    name = str(packet.__name__)
    made = tensors_of(result)
    if not made or name in _FREE:
        return 0.0
    largest = max(tensor.numel() for tensor in (*given, *made))
    decomposes = name.lstrip("_").startswith(_DECOMPOSITIONS) and name not in _NO_DECOMPOSITIONS
    if decomposes and given and given[0].ndim > 1:
        rows, columns = given[0].shape[-2:]
        return _CUBIC * given[0].numel() * min(rows, columns)
    if any(word in name for word in _SORTS):
        return largest * math.log2(max(largest, 2))
    if "cdist" in name:
        return 3.0 * made[0].numel() * given[0].shape[-1]
    return float(largest)


_FREE = frozenset(
    (
        *("view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "slice"),
        *("select", "squeeze", "unsqueeze", "detach", "alias", "as_strided", "split", "unbind"),
        *("empty", "empty_like", "empty_strided", "split_with_sizes", "diagonal", "unfold"),
        *("lift_fresh", "_reshape_alias", "chunk", "narrow", "movedim"),
    )
)
"""Operations that compute nothing."""
