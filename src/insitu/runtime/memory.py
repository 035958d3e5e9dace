"""Writes in place: which values share memory, and what follows for the order of a graph.

Lines mean what they would mean in order on torch tensors, whatever the order in which the model
makes the values. So what stands after a write in place waits for it, if it looks at the same
memory; and what stands before it and is computed later gets a copy of what was there.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from insitu.graph.node import EVERY, Graph, Node, Ref, Site
from insitu.graph.operations import ATTRIBUTE, GETITEM, GRAD, READ, REPLACE, SKIP, WRITE
from insitu.graph.structure import is_basic, map_structure
from insitu.graph.writing import replaced
from insitu.runtime.plan import Mutations, Plan, regroup

if TYPE_CHECKING:
    from insitu.runtime.hooks import Place
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
        *("double", "flatten", "float", "half", "int", "long", "ravel", "reshape", "reshape_as"),
        *("short", "to", "type_as"),
    )
)
_HANDING_OVER = (WRITE, REPLACE, SKIP)
_VIEW_ATTRIBUTES = frozenset(["H", "T", "imag", "mH", "mT", "real"])


def order_mutations(
    graph: Graph,
    plan: Plan,
    arriving: Arriving,
    is_view: Callable[[int], bool],
) -> None:
    """Lets what stands after a write in place wait for it. The plan is changed.

    Args:
        graph: what is to be done.
        plan: its plan.
        arriving: gives the memory of what arrives at a site.
        is_view: whether the value of a node shares memory with the values that it is made of.
    """
    known: dict[tuple[int, Memory], Key] = {}
    copies: dict[int, Copies] = {}

    def of_site(site: Site) -> Any:
        return arriving(site, copies.get(site.invocation))

    held = _memory(graph, of_site, is_view, known)
    memory = list(map(_keys, held))
    changed = {key for index in graph.mutations for key in memory[graph.rows[index][3][0]]}
    # What is assigned is handed over as a copy. Where else that memory would be seen, another
    # run on fake tensors finds out.
    if any(not changed.isdisjoint(memory[read]) for read in graph.writes):
        copies.update(_copies(graph))
        known.clear()
        held = _memory(graph, of_site, is_view, known)
        memory = list(map(_keys, held))
    needs = plan.needs
    mutations = set(graph.mutations)
    written: dict[Key, int] = {}  # what the writes so far to a piece of memory need
    users: dict[Key, list[tuple[int, int]]] = {}  # who has looked at it so far, and through what
    before: dict[int, list[tuple[int, int]]] = {}
    for index, node in enumerate(graph):
        if node.operation in (READ, GRAD):
            continue
        # What runs once does not wait for what runs in every step: that comes first.
        repeated = plan.repeated
        ignored = repeated.sites if repeated is not None and index not in repeated.nodes else 0
        for place, source in enumerate(node.inputs):
            needs[index] |= needs[source]
            if node.operation in _HANDING_OVER and not place:
                continue  # what something else is to stand for is not looked at
            if node.operation is WRITE and graph.rows[source][0] is REPLACE:
                continue  # of this only the new part, which the node itself has looked at
            for key in _looked_at(node, index, source, memory):
                needs[index] |= written.get(key, 0) & ~ignored
        if index in mutations:
            keys = memory[node.inputs[0]]
            early = [user for key in keys for user in users.get(key, ())]
            before[index] = [u for u in dict.fromkeys(early) if needs[u[0]] & ~needs[index]]
            for key in keys:
                written[key] = written.get(key, 0) | needs[index]
        if node.operation in _HANDING_OVER:  # these take the memory, with all that is written to it
            continue
        for source in node.inputs:
            for key in _looked_at(node, index, source, memory):
                users.setdefault(key, []).append((index, source))
    if _breaks_aliases(graph, known, of_site, written):
        plan.apart = True
    live = {index for index, keys in enumerate(memory) if not keys.isdisjoint(written)}
    regroup(graph, plan)
    deadlines = {index: _deadlines(graph, index, memory, held) for index in graph.mutations}
    lent = _lent(graph, plan, memory)
    copied = {index for index, node in enumerate(graph) if _holds_constants(node)}
    lasting = {
        index
        for address, index in plan.reads.items()
        if index in live and _may_last(of_site(Site(*address)))
    }
    special = any(before.values()) or lent or copied or lasting or graph.differentiates
    plain = not special and all(
        any(plan.bits[read] == needs[index] for read in reads)
        for index, sets in deadlines.items()
        for reads in sets
    )
    reads = {index for index in live if index in plan.bits}
    plan.mutations = Mutations(reads, deadlines, live, before, lent, copied, lasting, plain)
    plan.special = plan.special or not plain


def _may_last(arriving: Any) -> bool:
    """Whether what arrives at a site may be memory that outlasts the run."""
    found: list[bool] = [arriving is None]
    map_structure(lambda leaf: found.append(isinstance(leaf, Memory) and leaf.lasting), arriving)
    return any(found)


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


Arriving = Callable[[Site, "Copies | None"], Any]
"""Gives the memory of what arrives at a site: a `Memory` in the place of each tensor, or None if
that is not known. It is that of a run in which the model goes on with copies from some places."""

Key = tuple[int, int]
"""A piece of memory: the first node that has it, and a number."""


def as_single_views(
    name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Computes an operation; of those that return several views, each becomes one of its own.

    Autograd forbids writes in place to the views that `split` and `unbind` return together.
    """
    result = function(*args, **kwargs)
    if name not in _SEVERAL_VIEWS:
        return result
    tensor = args[0]
    dim = kwargs.get("dim", args[-1] if len(args) > _SEVERAL_VIEWS[name] else 0)
    if name == "unbind":
        return tuple(tensor.select(dim, place) for place in range(len(result)))
    parts: list[torch.Tensor] = []
    start = 0
    for part in result:
        parts.append(tensor.narrow(dim, start, part.shape[dim]))
        start += part.shape[dim]
    return tuple(parts)


# With how many arguments the dimension is not given by position.
_SEVERAL_VIEWS = {"chunk": 2, "split": 2, "split_with_sizes": 2, "tensor_split": 2, "unbind": 1}


def _looked_at(node: Node, index: int, source: int, memory: list[frozenset[Key]]) -> frozenset[Key]:
    """The memory of an input that a node has to do with: of a tuple only the part that it takes."""
    part = memory[source] & memory[index] if node.operation is GETITEM else _NOTHING
    return part or memory[source]


_NOTHING: frozenset[Key] = frozenset()


class _Piece:
    """The memory of a tensor, or of several that cannot be told apart."""

    __slots__ = ("keys",)

    def __init__(self, keys: frozenset[Key]) -> None:
        self.keys = keys


def _deadlines(
    graph: Graph, mutation: int, memory: list[frozenset[Key]], held: list[Any]
) -> list[set[int]]:
    """The reads of the sites through which a write in place reaches the model."""
    target = graph.rows[mutation][3][0]
    reads: set[int] = set()
    pending = [target]
    while pending:
        index = pending.pop()
        node = graph[index]
        pending.extend(s for s in node.inputs if memory[s] & memory[target])
        if node.operation in (READ, GRAD):
            reads.add(index)
    handed_over = (*graph.writes.items(), *graph.skips.items())
    sites = [
        {read} for read, node in handed_over if _given(held[read], held[node]) & memory[target]
    ]
    return [reads, *sites] if reads else sites


def _given(before: Any, after: Any) -> frozenset[Key]:
    """The memory in what stands at a site that is not, at the same place, in what arrived there."""
    if isinstance(before, tuple | list) and isinstance(after, tuple | list):
        pairs = zip(cast("list[Any]", before), cast("list[Any]", after), strict=False)
        return _NOTHING.union(*[_given(one, other) for one, other in pairs])
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        entries = cast("Mapping[Any, Any]", before)
        changed = cast("Mapping[Any, Any]", after)
        return _NOTHING.union(*[_given(entries.get(key), changed[key]) for key in changed])
    return _keys(after) - _keys(before)


def _lent(
    graph: Graph, plan: Plan, memory: list[frozenset[Key]]
) -> list[tuple[int, int, frozenset[int]]]:
    """Who waits for other sites with memory of the model's, and which writes to it it is to see."""
    writes: dict[Key, list[int]] = {}
    for mutation in graph.mutations:
        for key in memory[graph.rows[mutation][3][0]]:
            writes.setdefault(key, []).append(mutation)
    found: list[tuple[int, int, frozenset[int]]] = []
    for index, (operation, _, _, inputs, _, _) in enumerate(graph.rows):
        for place, source in enumerate(inputs):
            if operation.in_place and not place:
                continue  # that is written to, and a copy would be in its stead
            seen = {write for key in memory[source] for write in writes.get(key, ())}
            of_model = any(graph.rows[first][0] is READ for first, _ in memory[source])
            if seen and of_model and plan.needs[source] != plan.needs[index]:
                if operation not in _HANDING_OVER:
                    seen = {write for write in seen if write < index}
                found.append((index, source, frozenset(seen)))
    return found


def _copies(graph: Graph) -> Mapping[int, Copies]:
    """The places of each invocation from which the model goes on with what is assigned there."""
    copies: dict[int, dict[Place, tuple[Any, ...] | None]] = {}
    for read, write in graph.writes.items():
        site = graph[read].site
        if site is None or site.step not in (0, EVERY):
            continue
        parts: list[Any] = []
        value = graph.rows[write][1][1]
        while type(value) is Ref and graph.rows[value.index][0] in (REPLACE, WRITE):
            operation, args, *_ = graph.rows[value.index]
            if operation is REPLACE:
                parts.append(args[1])
            value = args[1] if operation is WRITE else args[0]
        place = (site.path, site.kind, site.call)
        alone = type(value) is Ref and value.index == read and parts
        copies.setdefault(site.invocation, {})[place] = tuple(parts) if alone else None
    return copies


def _breaks_aliases(
    graph: Graph,
    known: Mapping[tuple[int, Memory], Key],
    of_site: Callable[[Site], Any],
    written: Collection[Key],
) -> bool:
    """Whether a write to a site of one invocation would show in the aliases of another.

    Where one invocation replaces its part of a batch the model goes on with a copy for all, and
    what another has written in place before or writes later is no longer in the same memory.
    """
    invocations = {node.args[0] for node in graph if node.operation is READ}
    for read in graph.writes:
        site = graph[read].site
        for other in invocations if site is not None else ():
            if site is not None and other != site.invocation:
                there = _pieces(of_site(site._replace(invocation=other)))
                if any(known.get((other, piece)) in written for piece in there):
                    return True
    return False


def _pieces(value: Any) -> set[Memory]:
    """The memory in what arrives at a site."""
    found: set[Memory] = set()

    def leaf(item: Any) -> None:
        if isinstance(item, Memory):
            found.add(item)

    map_structure(leaf, value)
    return found


def _memory(
    graph: Graph,
    of_site: Callable[[Site], Any],
    is_view: Callable[[int], bool],
    known: dict[tuple[int, Memory], Key],
) -> list[Any]:
    """The memory of each node's value: a piece for a tensor, and structures of them.

    Args:
        graph: what is to be done.
        of_site: gives the memory of what arrives at a site.
        is_view: as of `order_mutations`.
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
            memory.append(_Piece(frozenset([(index, 0)])))
            continue

        def leaf(item: Any, index: int = index, invocation: int = site.invocation) -> Any:
            if not isinstance(item, Memory):
                return item
            key = known.setdefault((invocation, item), (index, len(known)))
            return _Piece(frozenset([key]))

        memory.append(map_structure(leaf, arrived))
    return memory


def _derived(node: Node, index: int, memory: list[Any], is_view: Callable[[int], bool]) -> Any:
    """The memory of what an operation returns."""
    operation, args = node.operation, node.args
    own = _Piece(frozenset([(index, 0)]))
    if operation.in_place:
        return memory[node.inputs[0]]
    if operation in _HANDING_OVER:
        return _standing(node, memory, own)
    if operation in (GETITEM, ATTRIBUTE):
        held = memory[args[0].index] if type(args[0]) is Ref else own
        if isinstance(held, _Piece):
            view = args[1] in _VIEW_ATTRIBUTES if operation is ATTRIBUTE else is_basic(args[1])
            return held if view else own
        try:
            return held[args[1]]
        except (TypeError, KeyError, IndexError):
            return own
    name = operation.short
    if name in _VIEWS or (name in _SOMETIMES_VIEWS and is_view(index)):
        return _Piece(_keys([memory[source] for source in node.inputs]))
    return own


def _standing(node: Node, memory: list[Any], own: _Piece) -> Any:
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
        except Exception:  # the run will say so
            return own
    original, value, block = arguments
    if not block or not isinstance(original, tuple):
        return value
    parts = cast("tuple[Any, ...]", value) if isinstance(value, tuple) else (value,)
    return (*parts, *cast("tuple[Any, ...]", original)[len(parts) :])


def _keys(held: Any) -> frozenset[Key]:
    """The pieces of memory in a structure."""
    found: set[Key] = set()

    def leaf(item: Any) -> None:
        if isinstance(item, _Piece):
            found.update(item.keys)

    map_structure(leaf, held)
    return frozenset(found)


def _holds_constants(node: Node) -> bool:
    """Whether a node puts tensors of the user's where they may be written in place."""
    if node.operation not in _HANDING_OVER:
        return False
    found: list[torch.Tensor] = []

    def leaf(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            found.append(item)

    map_structure(leaf, node.args)
    return bool(found)
