"""Which memory the values of a graph have, and so which of them share it.

What arrives at a site has the memory that it had in a run on fake tensors. What an operation makes
of it has that memory too where torch returns a view, and memory of its own where it does not.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from insitu.graph.node import Graph, Node, Ref, Site
from insitu.graph.operations import ATTRIBUTE, GETITEM, REPLACE, SKIP, WRITE
from insitu.graph.structure import is_basic, map_structure, tensors_of
from insitu.graph.writing import replaced

if TYPE_CHECKING:
    from insitu.runtime.probe import Copies

_VIEWS = frozenset(
    (
        *("adjoint", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "broadcast_to"),
        *("chunk", "detach", "diagonal", "dsplit", "expand", "expand_as", "hsplit", "imag"),
        *("meshgrid", "moveaxis", "movedim", "narrow", "permute", "pos", "positive", "real"),
        *("select", "split", "split_with_sizes", "squeeze", "swapaxes", "swapdims", "t"),
        *("tensor_split", "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view"),
        *("view_as", "view_as_complex", "view_as_real", "vsplit"),
    )
)
# Views where the strides or the dtype allow it, else copies.
_SOMETIMES_VIEWS = frozenset(
    (
        *("apply", "bfloat16", "bool", "byte", "char", "cond", "contiguous", "cpu", "cuda", "fold"),
        *("alpha_dropout", "dropout", "dropout1d", "dropout2d", "dropout3d"),  # in eval mode
        *("feature_alpha_dropout", "feature_dropout"),
        *("double", "flatten", "float", "half", "int", "long", "ravel", "reshape", "reshape_as"),
        *("short", "to", "type_as"),
    )
)
HANDING_OVER = (WRITE, REPLACE, SKIP)
_VIEW_ATTRIBUTES = frozenset(["H", "T", "imag", "mH", "mT", "real"])


@dataclass(frozen=True, slots=True)
class Memory:
    """Which memory a tensor has at some moment of a run.

    Attributes:
        storage: its storage's identity.
        version: how often it has been written to.
        lasting: whether it may outlast the run: a parameter's, a buffer's or the user's.
    """

    storage: int
    version: int
    lasting: bool = field(default=True, compare=False)

    @classmethod
    def of(cls, tensor: torch.Tensor, own: Collection[int] | None = None) -> Memory:
        """Returns the memory that a tensor has now.

        Args:
            tensor: the tensor.
            own: the storages of the model's parameters and buffers, and of what it is called with,
                if they are known.
        """
        storage = storage_of(tensor)
        return cls(storage, tensor._version, own is None or storage in own)


def storage_of(tensor: torch.Tensor) -> int:
    """Returns the identity of a tensor's storage."""
    return cast(int, tensor.untyped_storage()._cdata)


def storages_of(value: Any) -> set[int]:
    """Returns the identities of the storages of the tensors in a value, with data or without."""
    return set(map(storage_of, tensors_of(value)))


Arriving = Callable[[Site, "Copies | None"], Any]
"""Gives the memory of what arrives at a site: a `Memory` in the place of each tensor, or None if
that is not known. It is that of a run in which the model goes on with copies from some places."""

Key = tuple[int, int]
"""A piece of memory: the first node that has it, and a number."""


class Piece:
    """The memory of a tensor, or of several that cannot be told apart."""

    __slots__ = ("keys",)

    def __init__(self, keys: frozenset[Key]) -> None:
        self.keys = keys


def pieces(value: Any) -> set[Memory]:
    """The memory in what arrives at a site."""
    found: set[Memory] = set()

    def leaf(item: Any) -> None:
        if isinstance(item, Memory):
            found.add(item)

    map_structure(leaf, value)
    return found


def held_memory(
    graph: Graph,
    of_site: Callable[[Site], Any],
    is_view: Callable[[int], bool],
    known: dict[tuple[int, Memory], Key],
) -> list[Any]:
    """The memory of each node's value: a piece for a tensor, and structures of them.

    Args:
        graph: what is to be done.
        of_site: gives the memory of what arrives at a site.
        is_view: whether the value of a node shares memory with the values that it is made of.
        known: is filled with the pieces that arrive at sites, by their invocation and memory.
    """
    memory: list[Any] = []
    for index, node in enumerate(graph):
        site = node.site
        if site is None:
            memory.append(_derived(node, index, memory, is_view))
            continue
        arrived = of_site(site)
        if arrived is None:
            memory.append(Piece(frozenset([(index, 0)])))
            continue

        def leaf(item: Any, index: int = index, invocation: int = site.invocation) -> Any:
            if not isinstance(item, Memory):
                return item
            key = known.setdefault((invocation, item), (index, len(known)))
            return Piece(frozenset([key]))

        memory.append(map_structure(leaf, arrived))
    return memory


def _derived(node: Node, index: int, memory: list[Any], is_view: Callable[[int], bool]) -> Any:
    """The memory of what an operation returns."""
    operation, args = node.operation, node.args
    own = Piece(frozenset([(index, 0)]))
    if operation.in_place:
        return memory[node.inputs[0]]
    if operation in HANDING_OVER:
        return _standing(node, memory, own)
    if operation in (GETITEM, ATTRIBUTE):
        held = memory[args[0].index] if type(args[0]) is Ref else own
        if isinstance(held, Piece):
            view = args[1] in _VIEW_ATTRIBUTES if operation is ATTRIBUTE else is_basic(args[1])
            return held if view else own
        try:
            return held[args[1]]
        except (TypeError, KeyError, IndexError):
            return own
    name = operation.short
    if name in _VIEWS or (name in _SOMETIMES_VIEWS and is_view(index)):
        return Piece(keys_of([memory[source] for source in node.inputs]))
    return own


def _standing(node: Node, memory: list[Any], own: Piece) -> Any:
    """The memory of what stands at a site after a write."""

    def leaf(item: Any) -> Any:
        if type(item) is Ref:
            return memory[item.index]
        return own if isinstance(item, torch.Tensor) else item

    arguments = [map_structure(leaf, arg) for arg in node.args]
    if node.operation is SKIP:
        return arguments[1]
    if node.operation is REPLACE:
        try:
            return replaced(*arguments)
        except (LookupError, TypeError, ValueError):  # the run will say so
            return own
    original, value, block = arguments
    if not block or not isinstance(original, tuple):
        return value
    parts = cast("tuple[Any, ...]", value) if isinstance(value, tuple) else (value,)
    return (*parts, *cast("tuple[Any, ...]", original)[len(parts) :])


def keys_of(held: Any) -> frozenset[Key]:
    """The pieces of memory in a structure."""
    found: set[Key] = set()

    def leaf(item: Any) -> None:
        if isinstance(item, Piece):
            found.update(item.keys)

    map_structure(leaf, held)
    return frozenset(found)
