"""Makes graphs of messages, and refuses every message that no recording could have made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import msgspec
import torch

from insitu.graph.context import Context, context_of
from insitu.graph.errors import LimitError, WireError
from insitu.graph.location import Location, Mark, SourceLine
from insitu.graph.node import (
    Graph,
    ModuleRef,
    Ref,
    Row,
    Subgraph,
)
from insitu.graph.operations import (
    BACKWARD,
    BY_NAME,
    COND,
    FOLD,
    GRAD,
    INPUT,
    KEEP,
    PUT,
    READ,
    SAVE,
    SKIP,
    WRITE,
    Operation,
)
from insitu.graph.wire_checks import FUNCTIONS, check_address, check_call, check_input
from insitu.graph.wire_message import (
    FieldName,
    Fields,
    LinePart,
    ModulePart,
    RowPart,
    SubgraphPart,
    Value,
    decoded_rows,
    file_name,
    printable,
    row_count,
)
from insitu.graph.wire_values import DEEPEST, ValueReader


class Field(NamedTuple):
    """How a field of a graph travels: as rows of numbers, with a check for each column."""

    kind: Callable[[Any], Any]
    columns: tuple[_Column, ...]


class Tables(Protocol):
    """What the graphs of a message refer to by number: see `Message`."""

    operations: list[str]
    files: list[str]
    lines: list[LinePart]


class Reader:
    """Makes graphs of a message.

    Args:
        tables: what the graphs refer to.
        tensors: the tensors that come with the message.
        most_nodes: how many nodes all graphs may have together, None for any number.
        most_sites: how many sites they may have together, None for any number.

    Attributes:
        marks: the user's lines.
        values: reads arguments.
    """

    def __init__(
        self,
        tables: Tables,
        tensors: Sequence[torch.Tensor],
        most_nodes: int | None = None,
        most_sites: int | None = None,
    ) -> None:
        self._most = {"nodes": most_nodes, "sites": most_sites}
        self._counts = {"nodes": 0, "sites": 0}
        self._tables, self._tensors = tables, tensors
        self._operations = list(map(_operation, tables.operations))
        self._depth = 0
        self.values = ValueReader(tensors)
        self.marks = list(map(self._mark, tables.lines))

    def graph(self, rows: msgspec.Raw, fields: Fields) -> Graph:
        """Returns a graph.

        Args:
            rows: its nodes.
            fields: its other fields.

        Raises:
            WireError: if there is anything that no recording makes.
            LimitError: if there are more nodes or sites than there may be.
        """
        return self._graph(rows, fields, None)

    def _count(self, what: str, more: int) -> None:
        """Counts nodes before they are read, or sites."""
        self._counts[what] += more
        found, most = self._counts[what], self._most[what]
        if most is not None and found > most:
            raise LimitError(
                f"The job has {found:,} {what} or more, and `Limits({what}=...)` is {most:,}.",
                limit=what,
                found=found,
                allowed=most,
            )

    def check_tensors(self) -> None:
        """Raises if the message comes with tensors that nothing read so far refers to.

        Raises:
            WireError: in that case.
        """
        if len(self.values.used) != len(self._tensors):
            raise WireError("it comes with tensors that it does not use")

    def _graph(self, rows: msgspec.Raw, fields: Fields, inputs: int | None) -> Graph:
        """A graph: of a function, if it is called with a number of inputs."""
        self._count("nodes", row_count(rows))
        parts = decoded_rows(rows)
        made = Graph([])
        addresses: set[Any] = set()
        for part in parts:
            if part.line >= len(self.marks) or part.operation >= len(self._operations):
                raise WireError(f"node {len(made)} has an operation or a line that is not there")
            try:
                made.rows.append(self._row(part, made, inputs, addresses))
            except WireError as error:
                if error.location is not None:
                    raise
                location = Location(*self.marks[part.line])
                raise WireError(f"The graph cannot be read: {error}.", location) from None
        for name, entries in fields.items():
            setattr(made, name, self._field(name, FIELDS[name], entries, made))
        _check_flags(made)
        return made

    def _row(self, part: RowPart, graph: Graph, inputs: int | None, addresses: set[Any]) -> Row:
        operation, index, values = self._operations[part.operation], len(graph), self.values
        if operation in (_INSIDE if inputs is None else _OUTSIDE):
            raise WireError(f"{operation.name} does not belong there")
        functions = {
            at: self._function(arg, len(part.args) - _OWN_ARGUMENTS.get(operation, 0))
            for at, arg in enumerate(part.args)
            if isinstance(arg, ModulePart | SubgraphPart)
        }
        if {at: type(function) for at, function in functions.items()} != FUNCTIONS.get(
            operation, {}
        ):
            raise WireError(f"{operation.name} is not given the functions that it takes")
        values.references, values.earlier, values.weights = [], 0, 0
        args = tuple(
            [
                functions[at] if at in functions else values.value(cast("Value", arg), index)
                for at, arg in enumerate(part.args)
            ]
        )
        kwargs = {key: values.value(arg, index) for key, arg in part.kwargs.items()}
        nested = len(values.references) > sum(type(arg) is Ref for arg in args) or bool(functions)
        nested = nested or values.earlier > 0
        if operation is READ:
            self._count("sites", 1)
            check_address(args, kwargs, addresses)
        elif operation is INPUT:
            check_input(args, kwargs, inputs or 0)
        else:
            check_call(graph, operation, args, kwargs)
            if inputs is None and not (values.references or values.earlier):  # it would never run
                raise WireError(f"{operation.name} is not done to a value of the run")
        if values.earlier and inputs is not None:
            raise WireError("a function uses a value of an earlier block")
        if values.weights and operation is not BACKWARD:
            raise WireError(f"{operation.name} is not given weights of the model")
        mark = self.marks[part.line]
        return (operation, args, kwargs, tuple(values.references), nested, mark)

    def _function(self, part: ModulePart | SubgraphPart, inputs: int) -> ModuleRef | Subgraph:
        """A module, or a recorded function that is called with a number of inputs."""
        if isinstance(part, ModulePart):
            return ModuleRef(part.path)
        self._depth += 1
        if self._depth > DEEPEST:
            raise WireError(f"functions are nested more than {DEEPEST} deep")
        graph = self._graph(part.rows, part.fields, inputs)
        self._depth -= 1
        values = self.values
        values.references, values.earlier, values.weights = [], 0, 0
        output = values.value(part.output, len(graph))
        if values.earlier:
            raise WireError("a function returns a value of an earlier block")
        if values.weights:
            raise WireError("a function returns weights of the model")
        return Subgraph(graph, output)

    def _field(self, name: str, field: Field, entries: list[list[int]], graph: Graph) -> Any:
        for entry in entries:
            if len(entry) != len(field.columns):
                raise WireError(f"an entry of {name} has {len(entry)} numbers")
        rows = [
            tuple(
                [
                    column(self, graph, number)
                    for number, column in zip(entry, field.columns, strict=True)
                ]
            )
            for entry in entries
        ]
        made = field.kind([row[0] for row in rows] if len(field.columns) == 1 else rows)
        if field.kind in (dict, set) and len(made) != len(entries):
            raise WireError(f"{name} has two entries for one node")
        return made

    def _mark(self, line: LinePart) -> Mark:
        if line.file >= len(self._tables.files):
            raise WireError(f"there is no file {line.file}")
        file = file_name(self._tables.files[line.file])
        return SourceLine(file, line.number, printable(line.text)), 0


_Column = Callable[[Reader, Graph, int], Any]


def _node(*operations: Operation) -> _Column:
    """A column of nodes that do one of some operations; without any, of all nodes."""

    def column(reader: Reader, graph: Graph, number: int) -> int:
        if number >= len(graph):
            raise WireError(f"there is no node {number}")
        found = graph.rows[number][0]
        if operations and found not in operations:
            raise WireError(f"node {number} does {found.name}, which does not belong there")
        return number

    return column


def _bound(reader: Reader, graph: Graph, number: int) -> int:
    """A column of places between nodes."""
    if number > len(graph):
        raise WireError(f"there is no node {number}")
    return number


def line_column(reader: Reader, graph: Graph, number: int) -> Mark:
    """A column of lines of the user's."""
    if number >= len(reader.marks):
        raise WireError(f"there is no line {number}")
    return reader.marks[number]


def _number(reader: Reader, graph: Graph, number: int) -> int:
    """A column of numbers that are no nodes."""
    return number


def _contexts(rows: list[tuple[int, int]]) -> dict[int, Context]:
    """The contexts of nodes, from a row for each thing that differs there."""
    found: dict[int, list[int]] = {}
    for node, setting in rows:
        found.setdefault(node, []).append(setting)
    try:
        return {node: context_of(numbers) for node, numbers in found.items()}
    except ValueError as error:
        raise WireError(f"no context around a line has the numbers {error}") from None


def _scopes(rows: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The nodes that stand in the `with` of invocations."""
    if any(first >= end for _, first, end in rows):
        raise WireError("no node stands in the `with` of an invocation that is named")
    return rows


# Every field of a graph but its rows: what holds the entries, and what their columns are.
FIELDS: Mapping[FieldName, Field] = {
    "writes": Field(dict, (_node(READ, GRAD), _node(WRITE, PUT))),
    "skips": Field(dict, (_node(READ), _node(SKIP, PUT))),
    "stops": Field(dict, (_node(READ), line_column)),
    "optional": Field(set, (_node(SAVE, KEEP),)),
    "repeats": Field(tuple, (_bound, _bound)),
    "differentiates": Field(bool, ()),
    "after": Field(dict, (_node(READ), _node(READ))),
    "unfused": Field(set, (_node(READ),)),
    "contexts": Field(_contexts, (_node(), _number)),
    "scopes": Field(_scopes, (_number, _bound, _bound)),
}

# How many more arguments an operation has than the inputs with which it calls its functions.
_OWN_ARGUMENTS = {COND: 3, FOLD: 1}
_INSIDE = (INPUT,)
_OUTSIDE = (READ, SAVE, KEEP, WRITE, SKIP, GRAD, BACKWARD)
_DIFFERENTIATED = (GRAD, BACKWARD, KEEP)


def _check_flags(graph: Graph) -> None:
    """Checks the fields that say of what kind some nodes are."""
    for read, made in (*graph.writes.items(), *graph.skips.items()):
        if graph.rows[made][0] is PUT and graph.original(made) != read:
            raise WireError(f"node {made} writes in place into another site than that of {read}")
    if not graph.differentiates and any(row[0] in _DIFFERENTIATED for row in graph.rows):
        raise WireError("it does not say that it needs gradients")


def _operation(name: str) -> Operation:
    if name not in BY_NAME:
        raise WireError(
            f"there is no operation {name!r:.200} in this version of Insitu and PyTorch: install "
            "the same ones in both places"
        )
    return BY_NAME[name]
