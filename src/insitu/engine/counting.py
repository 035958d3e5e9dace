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
from typing import Any, NamedTuple, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from insitu.graph.structure import storage_of, tensors_of

_CUBIC = 10.0
"""Operations for each m * n * min(m, n) of a decomposition: the order of an SVD with vectors."""

_DECOMPOSITIONS = ("linalg_", "cholesky_", "lu_", "geqrf", "ormqr", "triangular_solve")
_NO_DECOMPOSITIONS = ("linalg_vector_norm", "linalg_cross", "linalg_vecdot")
_GROUPED = "grouped_mm"
_SORTS = ("sort", "topk", "kthvalue", "median", "mode", "unique", "quantile", "searchsorted")


class Counts(NamedTuple):
    """What a computation takes.

    Attributes:
        flops: floating-point operations.
        peak: the most bytes of values that it made and that were there at once.
        made: the bytes of all values that it made. Autograd may keep all of them.
        left: the bytes of those that were there at the end.
        numbers: the operations that are one for each number that is read or made. They take as
            long as memory does, which is longer than those of a matrix product.
    """

    flops: float
    peak: int
    made: int
    left: int
    numbers: float = 0.0


class Held:
    """The memory of values, each storage once and for as long as it is there.

    Attributes:
        bytes: how much there is now.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def add(self, tensor: torch.Tensor) -> int:
        """Counts the memory of a tensor until it is gone.

        Returns:
            How much it is, 0 if it is counted already.
        """
        number = storage_of(tensor)
        if number in self._known:
            return 0
        storage = tensor.untyped_storage()
        size = int(storage.nbytes())

        def gone(_: object) -> None:
            if self._known.pop(number, None) is not None:
                self.bytes -= size

        self._known[number] = weakref.ref(storage, gone)
        self.bytes += size
        return size


class Counting(TorchDispatchMode):
    """Counts the operations in its block, which run on tensors without data."""

    def __init__(self) -> None:
        super().__init__()
        self._flops = self._numbers = 0.0
        self._held = Held()
        self._peak = self._made = 0

    @property
    def counts(self) -> Counts:
        """What was counted so far."""
        return Counts(self._flops, self._peak, self._made, self._held.bytes, self._numbers)

    def restart(self) -> None:
        """Lets `peak` be of values that are made from now on, and of those that are there now."""
        self._peak = self._held.bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        given = tensors_of((args, dict(kwargs)))
        flops = _flops(packet, args, kwargs, given, result)
        self._flops += flops
        self._numbers += 0.0 if _is_product(packet) else flops
        there = set(map(storage_of, given))
        for tensor in tensors_of(result):
            if storage_of(tensor) not in there:
                self._made += self._held.add(tensor)
        beside = 0
        if packet.__name__ == "mvlgamma":  # it makes them all at once, and adds them up
            beside = given[0].numel() * given[0].element_size() * cast(int, args[1])
        self._peak = max(self._peak, self._held.bytes + beside)
        return result


def _flops(
    packet: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: list[Any], result: Any
) -> float:
    from torch.utils.flop_counter import flop_registry  # it takes a while to import

    if packet in flop_registry:
        return float(cast(Any, flop_registry)[packet](*args, **kwargs, out_val=result))
    name = str(packet.__name__)
    made = tensors_of(result)
    if name in _FREE:
        return 0.0
    largest = max((tensor.numel() for tensor in (*given, *made)), default=0)
    if not made:  # a number, or a truth value
        return float(largest)
    if name.lstrip("_") == _GROUPED:  # each row meets one expert, or each expert its part of two
        groups = made[0].shape[0] if given[0].ndim == given[1].ndim == 2 else 1
        return 2.0 * made[0].numel() * given[0].shape[-1] / groups
    if "_pool" in name and "adaptive" not in name:
        return float(max(tensor.numel() for tensor in made)) * _window(name, args)
    if name.startswith("multilabel_margin_loss"):
        return float(largest) * given[0].shape[-1]
    if name == "mvlgamma":
        return float(largest) * cast(int, args[1])
    decomposes = name.lstrip("_").startswith(_DECOMPOSITIONS) and name not in _NO_DECOMPOSITIONS
    if decomposes and given and given[0].ndim > 1:
        rows, columns = given[0].shape[-2:]
        return _CUBIC * given[0].numel() * min(rows, columns)
    if any(word in name for word in _SORTS):
        return largest * math.log2(max(largest, 2))
    if "cdist" in name or "pdist" in name:
        return 3.0 * made[0].numel() * given[0].shape[-1]
    return float(largest)


def _is_product(packet: Any) -> bool:
    """Whether an operation computes much with each number that it reads."""
    from torch.utils.flop_counter import flop_registry

    name = str(packet.__name__).lstrip("_")
    decomposes = name.startswith(_DECOMPOSITIONS) and not name.startswith(_NO_DECOMPOSITIONS)
    return packet in flop_registry or decomposes or "cdist" in name or name == _GROUPED


def _window(name: str, args: tuple[Any, ...]) -> int:
    """How many numbers each of a pooling's results is made of."""
    sizes = next((arg for arg in args if isinstance(arg, int | list | tuple)), 1)
    if isinstance(sizes, int):
        sizes = [sizes]
    axes = int(next((letter for letter in name if letter.isdigit()), "1"))
    return math.prod(sizes) if len(sizes) == axes else cast(int, sizes[0]) ** axes


_FREE = frozenset(
    (
        *("view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "slice"),
        *("select", "squeeze", "unsqueeze", "detach", "alias", "as_strided", "split", "unbind"),
        *("empty", "empty_like", "empty_strided", "split_with_sizes", "diagonal", "unfold"),
        *("lift_fresh", "_reshape_alias", "chunk", "narrow", "movedim"),
    )
)
"""Operations that compute nothing."""
