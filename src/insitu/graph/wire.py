"""Graphs as bytes: what edits are stored as, and what the blocks of a job are written with.

A frame with a version and a checksum holds a msgpack message, and the tensors that the graph
refers to. What a message may look like is declared as types, and msgspec reads nothing else.
Reading is safe for any bytes: nothing is evaluated or imported, operations are looked up in the
registry, and every number is checked.

The user's lines travel too, so that an error in another process names them: of each the text, the
line number and the last part of the file's name. Folders stay at home, since they tell who and
where the user is.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Generator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import msgspec

from insitu.graph.context import settings
from insitu.graph.errors import WireError
from insitu.graph.expression import expression
from insitu.graph.location import Location, Mark
from insitu.graph.node import Graph, ModuleRef, Row, Subgraph
from insitu.graph.operations import BY_NAME, KEEP
from insitu.graph.wire_message import (
    MOST_TEXT,
    Fields,
    LinePart,
    Message,
    ModulePart,
    RowPart,
    SubgraphPart,
    Value,
    encoded_rows,
    file_name,
    printable,
)
from insitu.graph.wire_reader import FIELDS, Field, Reader, line_column
from insitu.graph.wire_tensors import restored, stored
from insitu.graph.wire_values import ValueWriter, text
from insitu.graph.written_arguments import written_arguments

_REST = struct.Struct("<BI")  # the version, and a checksum of all that follows
_LENGTH = struct.Struct("<Q")  # of the message; behind it are the tensors


@dataclass(frozen=True, slots=True)
class Frame:
    """A kind of frame.

    Attributes:
        magic: what its bytes begin with.
        version: the version of the format. Another one cannot be read.
        what: the name of its content, for errors: "graph".
    """

    magic: bytes
    version: int
    what: str

    def around(self, message: bytes, tensors: bytes) -> bytes:
        """Returns a message and the tensors that it refers to as one piece of bytes."""
        body = b"".join((_LENGTH.pack(len(message)), message, tensors))
        return self.magic + _REST.pack(self.version, zlib.crc32(body)) + body

    def opened(self, data: bytes) -> tuple[memoryview, bytes]:
        """Returns the message and the tensors in a frame.

        Raises:
            WireError: if it is no such frame, of another version, or damaged.
        """
        whole, what = memoryview(data), self.what
        head = len(self.magic)
        if bytes(whole[:head]) != self.magic:
            raise WireError(f"The bytes are no {what} of Insitu: they do not begin as one.")
        start = head + _REST.size + _LENGTH.size
        if len(whole) < start:
            raise WireError(f"The bytes of the {what} end too early.")
        version, checksum = _REST.unpack_from(whole, head)
        if version != self.version:
            raise WireError(
                f"The {what} is in version {version} of the format, and this Insitu reads version "
                f"{self.version}: install the same Insitu in both places."
            )
        if zlib.crc32(whole[head + _REST.size :]) != checksum:
            raise WireError(
                f"The bytes of the {what} are not complete, or were changed on their way."
            )
        end = start + _LENGTH.unpack_from(whole, head + _REST.size)[0]
        if end > len(whole):
            raise WireError(f"The bytes of the {what} end too early.")
        return whole[start:end], bytes(whole[end:])


FRAME = Frame(b"insitu", 1, "graph")
"""What a graph that travels by itself stands in. A job has a frame of its own."""


def to_bytes(graph: Graph) -> bytes:
    """Returns a graph as bytes, for `from_bytes` in another process.

    The tensors in it are copied.

    Args:
        graph: the graph.

    Raises:
        WireError: if it holds what cannot travel, such as a function or a tensor that requires
            grad, naming the line.
    """
    writer = Writer()
    rows, fields = writer.rows(graph), writer.fields(graph)
    described, tensors = stored(writer.values.tensors)
    tables = (list(writer.operations), list(writer.files), writer.line_parts)
    message = Message(*tables, described, rows, fields)
    return FRAME.around(msgspec.msgpack.encode(message), tensors)


def from_bytes(data: bytes) -> Graph:
    """Returns the graph that `to_bytes` made bytes of.

    It is safe to read bytes from anybody. A tensor is put on the device that it was on, or on the
    CPU where there is no such device.

    Args:
        data: the bytes.

    Raises:
        WireError: if they are no graph, or one of another version of Insitu.
    """
    encoded, tensors = FRAME.opened(data)
    message = decoded(_DECODER, encoded, "graph")
    with said_of("graph"):
        reader = Reader(message, restored(message.tensors, tensors))
        made = reader.graph(message.rows, message.fields)
        reader.check_tensors()
        return made


Read = TypeVar("Read")


def decoded(decoder: msgspec.msgpack.Decoder[Read], encoded: memoryview, what: str) -> Read:
    """Returns a message.

    Args:
        decoder: reads it as what it is declared to be.
        encoded: its bytes.
        what: the name of its content, for errors: "graph".

    Raises:
        WireError: if it is anything else.
    """
    try:
        return decoder.decode(encoded)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"The bytes of the {what} cannot be read: {error}.") from None


@contextmanager
def said_of(what: str) -> Generator[None, None, None]:
    """Makes sentences of the errors of a reader that name no line.

    Args:
        what: the name of the message, for errors: "graph".
    """
    try:
        yield
    except WireError as error:
        if error.location is not None:
            raise
        raise WireError(f"The {what} cannot be read: {error}.") from None


class Writer:
    """Collects what makes a message; what occurs several times is written once.

    Args:
        values: writes arguments.

    Attributes:
        operations: the names of the operations, with their numbers.
        files: the names of the files that the user's lines are in, with theirs.
        lines: the user's lines, with theirs.
        values: writes arguments.
    """

    def __init__(self, values: ValueWriter | None = None) -> None:
        self.operations: dict[str, int] = {}
        self.files: dict[str, int] = {}
        self.lines: dict[tuple[int, int, str], int] = {}
        self.values = values or ValueWriter()
        self._marks: dict[tuple[int, int], int] = {}

    @property
    def line_parts(self) -> list[LinePart]:
        """The user's lines."""
        return [LinePart(*line) for line in self.lines]

    def rows(self, graph: Graph) -> msgspec.Raw:
        """Returns the nodes of a graph, encoded.

        Raises:
            WireError: if one of them cannot travel, with its line.
        """
        parts: list[RowPart] = []
        for index, row in enumerate(graph.rows):
            try:
                parts.append(self._row(row))
            except WireError as error:
                if error.location is not None:
                    raise
                raise WireError(
                    f"`{expression(graph, index)}` cannot be sent to another process: {error}.",
                    graph[index].location,
                ) from None
        return encoded_rows(parts)

    def fields(self, graph: Graph) -> Fields:
        """Returns the other fields of a graph."""
        return {
            name: [self._numbers(entry, field) for entry in _entries(name, getattr(graph, name))]
            for name, field in FIELDS.items()
            if getattr(graph, name)
        }

    def _row(self, row: Row) -> RowPart:
        operation, args, kwargs, _, _, mark = row
        if BY_NAME.get(operation.name) is not operation:
            raise WireError(f"{operation.name} is not in the registry of operations")
        if operation is KEEP:
            raise WireError(
                "the history that `keep_graph=True` keeps stays in the process that runs: make the "
                "loss in the block, or leave `keep_graph` out"
            )
        into, instead = written_arguments(operation, args, kwargs)
        if into:
            raise WireError(
                f"{operation.short} writes into what stays in this process ({instead}): call "
                "`.eval()` of its module first, or leave `max_norm` out"
            )
        number = self.operations.setdefault(operation.name, len(self.operations))
        positional = [self._argument(arg) for arg in args]
        keywords = {text(key): self.values.part(arg) for key, arg in kwargs.items()}
        return RowPart(number, self.line(mark), positional, keywords)

    def _argument(self, value: Any) -> Value | ModulePart | SubgraphPart:
        if isinstance(value, ModuleRef):
            return ModulePart(text(value.path))
        if isinstance(value, Subgraph):
            graph = value.graph
            return SubgraphPart(
                self.rows(graph), self.values.part(value.output), self.fields(graph)
            )
        return self.values.part(value)

    def line(self, mark: Mark) -> int:
        """Returns the number of a line of the user's."""
        known = (id(mark[0]), mark[1])
        if known not in self._marks:
            line = Location(*mark)
            file = self.files.setdefault(file_name(line.file), len(self.files))
            entry = (file, line.line, printable(line.text)[:MOST_TEXT])
            self._marks[known] = self.lines.setdefault(entry, len(self.lines))
        return self._marks[known]

    def _numbers(self, entry: Sequence[Any], field: Field) -> list[int]:
        return [
            self.line(item) if column is line_column else item
            for item, column in zip(entry, field.columns, strict=True)
        ]


def _entries(name: str, field: Any) -> list[Sequence[Any]]:
    """The entries of a field, each as a row of things; of a flag that is set, an empty row."""
    if name == "contexts":
        return [(at, setting) for at, context in field.items() for setting in settings(context)]
    if isinstance(field, bool):
        return [()] * field
    if isinstance(field, Mapping):
        return list(cast("Mapping[Any, Any]", field).items())
    if isinstance(field, Set):  # in one order, so that the bytes are the same every time
        return [(item,) for item in sorted(cast("Set[int]", field))]
    return [item if isinstance(item, tuple) else (item,) for item in field]


_DECODER = msgspec.msgpack.Decoder(Message)
