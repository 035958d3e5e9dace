"""The recorded experiment as plain data: sites, nodes, references and the graph.

A graph is a list of nodes. A node names an operation and its arguments, in which a `Ref` stands
for the value of an earlier node. Nothing here knows how values are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from insitu.graph.location import Location, Mark
from insitu.graph.operations import READ, Operation

Kind = Literal["output", "input", "inputs"]


Address = tuple[int, str, Kind]
"""The content of a `Site`; a bare tuple takes a tenth of the time to make."""


class Site(NamedTuple):
    """A place where a value passes while a model runs.

    Attributes:
        invocation: the number of the invocation in its block, from 0.
        path: the module's dotted path in the tree; "" is the whole model.
        kind: which of the module's values.
    """

    invocation: int
    path: str
    kind: Kind

    def __str__(self) -> str:
        return f"{readable(self.path)}.{self.kind}" if self.path else f"model.{self.kind}"


@dataclass(slots=True, unsafe_hash=True)
class Ref:
    """Stands, among the arguments of a node, for the value of the node with this index.

    Made by `ref`, which makes each only once.

    Attributes:
        index: the node's index.
        inputs: the index once more, as the `inputs` of a node that refers to nothing else.
    """

    index: int
    inputs: tuple[int, ...]


_refs: list[Ref] = [Ref(index, (index,)) for index in range(1024)]


def ref(index: int) -> Ref:
    """Returns the reference to the node with an index."""
    return _refs[index] if index < 1024 else Ref(index, (index,))


Row = tuple[Operation, tuple[Any, ...], Mapping[str, Any], tuple[int, ...], bool, Mark]
"""The content of a `Node`; a bare tuple takes a tenth of the time to make."""


class Node(NamedTuple):
    """One recorded operation.

    Attributes:
        operation: what to do.
        args: positional arguments: constants, containers of constants, and `Ref`s in either; of
            a read, the address of the site.
        kwargs: keyword arguments, likewise.
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


@dataclass(slots=True, eq=False)
class Graph:
    """Nodes in the order of the lines that recorded them; arguments refer to earlier ones only."""

    rows: list[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Node]:
        return map(Node._make, self.rows)

    def __getitem__(self, index: int) -> Node:
        return Node._make(self.rows[index])


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
