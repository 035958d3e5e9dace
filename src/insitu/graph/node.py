"""The recorded experiment as plain data: sites, nodes, references and the graph.

A graph is a list of nodes. A node names an operation and its arguments, in which a `Ref` stands
for the value of an earlier node. Nothing here knows how values are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, cast

from insitu.graph.context import Context, within
from insitu.graph.location import Location, Mark
from insitu.graph.operations import PUT, READ, SKIP, WRITE, Operation
from insitu.graph.structure import map_structure

Kind = Literal["output", "input", "inputs", "tokens", "choice"]

NO_KWARGS: Mapping[str, Any] = {}

SEPARATOR = ">"
"""Between the path of a module and the name of a function, in the path of a site inside."""

EVERY = -1
"""The step of a site that is read anew in every step of a generation."""


Address = tuple[int, str, Kind, int, int]
"""The content of a `Site`; a bare tuple takes a tenth of the time to make."""

Place = tuple[str, Kind, int]
"""A site of no particular invocation and step: a module's path, which of its values, which call."""


class Site(NamedTuple):
    """A place where a value passes while a model runs.

    Attributes:
        invocation: the number of the invocation in its block, from 0.
        path: the module's dotted path in the tree; "" is the whole model. Of a torch function
            that the module's forward calls, "path>function".
        kind: which of the module's values; of the whole model also "tokens", which a step of a
            generation has chosen, and "choice", what it is about to choose.
        call: which call of the module, or of the function, in the step, from 0.
        step: which step of a generation, or `EVERY`. A forward is step 0.
    """

    invocation: int
    path: str
    kind: Kind
    call: int = 0
    step: int = 0

    @property
    def owner(self) -> str:
        """The call of the module, as one would write it."""
        path, inside, function = self.path.partition(SEPARATOR)
        written = readable(path) if path else "model"
        if inside:
            return f"{written}.ops.{function}[{self.call}]"
        return f"{written}.call({self.call})" if self.call else written

    def __str__(self) -> str:
        written = f"{self.owner}.{self.kind}"
        if self.step:
            written += " of every step" if self.step == EVERY else f" of step {self.step}"
        return written


@dataclass(slots=True, unsafe_hash=True)
class Ref:
    """Stands, among the arguments of a node, for the value of the node with this index.

    Got from `ref`, which makes most of them only once.

    Attributes:
        index: the node's index.
        inputs: the index once more, as the `inputs` of a node that refers to nothing else.
    """

    index: int
    inputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModuleRef:
    """Stands, among the arguments of a node, for one of the model's modules.

    Attributes:
        path: its path in the tree.
    """

    path: str


@dataclass(frozen=True, slots=True)
class WeightRef:
    """Stands, among the arguments of a backward pass, for one of the model's weights.

    Attributes:
        path: its path in the tree, with its name.
    """

    path: str


@dataclass(frozen=True, slots=True, eq=False)
class Function:
    """Holds, among the arguments of a node, a function or another Python object of the user's.

    Attributes:
        function: the function.
        on_fakes: what can be called with fake tensors to find out what the function returns.
    """

    function: Callable[..., Any]
    on_fakes: Callable[..., Any] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Carried:
    """Stands, among the arguments of a node, for a value of an earlier block of the session.

    Attributes:
        cell: where the value is put; it has a `content`.
        fake: gives the value with fake tensors.
    """

    cell: Any
    fake: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Earlier:
    """Stands, among the arguments of a node, for a value that an earlier block of a job keeps.

    Attributes:
        block: the block's place in the job, from 0.
        node: the node that saves the value there.
    """

    block: int
    node: int


@dataclass(frozen=True, slots=True, eq=False)
class Subgraph:
    """Stands, among the arguments of a node, for a function that was recorded.

    Attributes:
        graph: its nodes; those of the operation "input" stand for what it is called with.
        output: what it returns: references to its nodes, constants, or containers of both.
    """

    graph: Graph
    output: Any


class _Refs(dict[int, Ref]):
    """References by index. The first thousands are kept, and found without a line of Python.

    Graphs share them: what a block makes anew for each node, the garbage collector looks at.
    """

    def __missing__(self, index: int) -> Ref:
        made = Ref(index, (index,))
        return self.setdefault(index, made) if index < _FEW else made


_FEW = 8192
ref: Callable[[int], Ref] = _Refs().__getitem__
"""Returns the reference to the node with an index."""


Row = tuple[Operation, tuple[Any, ...], Mapping[str, Any], tuple[int, ...], bool, Mark]
"""The content of a `Node`; a bare tuple takes a tenth of the time to make."""


class Node(NamedTuple):
    """One recorded operation.

    Attributes:
        operation: what to do.
        args: positional arguments: constants, containers of constants, and `Ref`s in either; of
            a read, the address of the site.
        kwargs: keyword arguments, of the same kinds.
        inputs: the indices of all nodes that the arguments refer to, one entry a reference.
        nested: whether a reference stands inside a container, or among the keyword arguments.
        mark: the user's line, as `location` shows it.
    """

    operation: Operation
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[int, ...]
    nested: bool
    mark: Mark

    @property
    def location(self) -> Location:
        """The user's line."""
        return Location(*self.mark)

    @property
    def site(self) -> Site | None:
        """The site that this node reads, or None for an operation on earlier values."""
        return Site(*self.args) if self.operation is READ else None


_HANDED_OVER = (PUT, SKIP, WRITE)


def table_of(thing: object, field: str, kind: type[Any] = dict) -> Any:
    """Returns what an object holds in a field, to add to.

    Most graphs have nothing in most of their fields, and share the empty tables of the class.

    Args:
        thing: a graph, or what records one.
        field: the name of the field.
        kind: the type that is made for it: a dictionary or a set.
    """
    return vars(thing).setdefault(field, kind())


class Graph:
    """The recorded experiment: nodes, and what the run hands over to the model.

    Attributes:
        rows: the nodes, in the order of the lines that recorded them. Arguments refer to earlier
            ones only.
        writes: what makes what each site that is written is given, by the index of the node that
            reads what arrives there: the last assignment, or the last write in place.
        skips: what stands for the output of modules that do not run: the node that makes it, by
            the index of the node that reads what the module is called with.
        stops: the line that ends the run, by the node that reads the output after which.
        optional: the saves whose values may be missing.
        repeats: from which node to which, without it, nodes were recorded for every step.
        differentiates: whether the run has to record autograd.
        after: the nodes that read a site in one step after it is written in every step, and the
            nodes that read it there.
        unfused: the nodes that read values which exist only if attention is not one fused function.
        contexts: what differs around a node from what the block runs in, by the node.
        scopes: the nodes that stand in the `with` of an invocation: its number, and from which
            node to which, without it. An inner one comes before the one around it.
    """

    rows: list[Row]
    writes: dict[int, int]
    # Most graphs have none of these, and nothing is made for them: see `table_of`.
    skips: Mapping[int, int] = MappingProxyType({})
    stops: Mapping[int, Mark] = MappingProxyType({})
    optional: Set[int] = frozenset()
    repeats: tuple[tuple[int, int], ...] = ()
    differentiates: bool = False
    after: Mapping[int, int] = MappingProxyType({})
    unfused: Set[int] = frozenset()
    contexts: Mapping[int, Context] = MappingProxyType({})
    scopes: Sequence[tuple[int, int, int]] = ()

    picture: ClassVar[Callable[[Graph], str]] = repr
    """What notebooks show of a graph, as HTML. Pictures are made above this folder."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.writes = {}

    def _repr_html_(self) -> str:
        return Graph.picture(self)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Node]:
        return map(Node._make, self.rows)

    def __getitem__(self, index: int) -> Node:
        return Node._make(self.rows[index])

    def repeats_node(self, index: int) -> bool:
        """Returns whether a node is recorded for every step, so that a save of it gives a list."""
        return any(start <= index < end for start, end in self.repeats)

    def original(self, index: int) -> int:
        """Returns the node that reads a site, from one that gives what stands there now."""
        while self.rows[index][0] in _HANDED_OVER:
            index = self.rows[index][3][0]
        return index

    def invocations(self) -> list[frozenset[int]]:
        """Returns, for each node, the invocations at whose sites its value is read."""
        found: list[frozenset[int]] = []
        for operation, args, _, inputs, _, _ in self.rows:
            if operation is READ:
                found.append(frozenset([Site(*args).invocation]))
            else:
                found.append(frozenset[int]().union(*(found[source] for source in inputs)))
        return found

    def needed_by(self, index: int, known: Container[int] = ()) -> set[int]:
        """Returns the nodes that a node is computed of, and itself.

        Args:
            index: the node.
            known: nodes that are left out, with all that only they are computed of.
        """
        found: set[int] = set()
        pending = [index]
        while pending:
            current = pending.pop()
            if current not in found and current not in known:
                found.add(current)
                pending.extend(self.rows[current][3])
        return found

    def add_like(self, index: int, row: Row) -> int:
        """Adds a node in the context of another, and returns its index.

        Args:
            index: the other.
            row: the row that is added.
        """
        made = len(self.rows)
        self.rows.append(row)
        if index in self.contexts:
            table_of(self, "contexts")[made] = self.contexts[index]
        return made

    def runnable(self) -> list[Row]:
        """Returns the nodes with operations that enter the contexts in which they are to run."""
        if not self.contexts:
            return self.rows
        rows = [*self.rows]
        for index, context in self.contexts.items():
            operation, *rest = rows[index]
            function = within(context, operation.function)
            rows[index] = cast(Row, (replace(operation, function=function), *rest))
        return rows


def rewired(row: Row, moved: Mapping[int, int]) -> Row:
    """Returns a node that refers to other nodes.

    Args:
        row: the node.
        moved: the nodes that it is to refer to, by those that it refers to. Others stay.
    """
    operation, args, kwargs, inputs, nested, mark = row

    def leaf(item: Any) -> Any:
        return ref(moved.get(item.index, item.index)) if type(item) is Ref else item

    if nested:
        args, kwargs = cast("tuple[Any, Any]", map_structure(leaf, (args, dict(kwargs))))
    else:
        args = tuple([leaf(arg) for arg in args])
    sources = tuple([moved.get(source, source) for source in inputs])
    return (operation, args, kwargs, sources, nested, mark)


def readable(path: str) -> str:
    """Returns a dotted path as one would write it: "h.3.attn" becomes "h[3].attn".

    Args:
        path: a path as `torch.nn.Module.named_modules` gives it.
    """
    written = ""
    for part in path.split("."):
        if part.isdigit():
            written += f"[{part}]"
        elif not part.isidentifier():
            written += f"[{part!r}]"
        else:
            written += f".{part}" if written else part
    return written
