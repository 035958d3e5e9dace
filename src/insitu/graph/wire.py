"""Graphs as bytes, to be run in another process: `Graph.to_bytes` and `Graph.from_bytes`.

A frame with a version and a checksum holds a msgpack message, and the tensors that the graph
refers to. What a message may look like is declared as types, and msgspec reads nothing else.
Reading is safe whatever the bytes are: nothing is evaluated or imported, operations are looked up
in the registry, and every number is checked.

The user's lines travel too, so that an error in another process names them: of each the text, the
line number and the last part of the file's name. Folders stay at home, since they tell who and
where the user is.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec
import torch

from insitu.graph.context import settings
from insitu.graph.errors import WireError
from insitu.graph.expression import expression
from insitu.graph.location import Location, Mark
from insitu.graph.node import Graph, ModuleRef, Row, Subgraph
from insitu.graph.operations import BY_NAME
from insitu.graph.wire_message import (
    Fields,
    LinePart,
    Message,
    ModulePart,
    RowPart,
    SubgraphPart,
    file_name,
    printable,
)
from insitu.graph.wire_parts import Value
from insitu.graph.wire_reader import FIELDS, Field, Reader, line_column
from insitu.graph.wire_tensors import stored
from insitu.graph.wire_values import ValueWriter, text

VERSION = 1
"""The version of the format. Another one cannot be read."""

# What it is, the version, and a checksum of all that follows; then the length of the message.
_FRAME = struct.Struct("<6sBI")
_LENGTH = struct.Struct("<Q")
_MAGIC = b"insitu"
_LONGEST_TEXT = 200


def to_bytes(graph: Graph) -> bytes:
    """Returns a graph as bytes; see `Graph.to_bytes`."""
    writer = _Writer()
    rows, fields = writer.rows(graph), writer.fields(graph)
    described, tensors = stored(writer.values.tensors)
    message = Message(
        list(writer.operations),
        list(writer.files),
        [LinePart(*line) for line in writer.lines],
        described,
        rows,
        fields,
    )
    encoded = msgspec.msgpack.encode(message)
    body = b"".join((_LENGTH.pack(len(encoded)), encoded, tensors))
    return _FRAME.pack(_MAGIC, VERSION, zlib.crc32(body)) + body


def from_bytes(data: bytes) -> Graph:
    """Returns the graph that bytes stand for; see `Graph.from_bytes`."""
    encoded, tensors = _unframed(memoryview(data))
    try:
        message = _DECODER.decode(encoded)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"The bytes of the graph cannot be read: {error}.") from None
    try:
        return Reader(message, tensors).graph()
    except WireError as error:
        if error.location is not None:
            raise
        raise WireError(f"The graph cannot be read: {error}.") from None


def _unframed(data: memoryview) -> tuple[memoryview, bytes]:
    """The message and the tensors in a frame."""
    if bytes(data[: len(_MAGIC)]) != _MAGIC:
        raise WireError("The bytes are no graph of Insitu: they do not begin as one.")
    start = _FRAME.size + _LENGTH.size
    if len(data) < start:
        raise WireError("The bytes of the graph end too early.")
    _, version, checksum = _FRAME.unpack_from(data)
    if version != VERSION:
        raise WireError(
            f"The graph is in version {version} of the format, and this Insitu reads version "
            f"{VERSION}: install the same Insitu in both places."
        )
    if zlib.crc32(data[_FRAME.size :]) != checksum:
        raise WireError("The bytes of the graph are not complete, or were changed on their way.")
    end = start + _LENGTH.unpack_from(data, _FRAME.size)[0]
    if end > len(data):
        raise WireError("The bytes of the graph end too early.")
    return data[start:end], bytes(data[end:])


class _Writer:
    """Collects what makes a message; what occurs several times is written once."""

    def __init__(self) -> None:
        self.operations: dict[str, int] = {}
        self.files: dict[str, int] = {}
        self.lines: dict[tuple[int, int, str], int] = {}
        self.values = ValueWriter()
        self._marks: dict[tuple[int, int], int] = {}

    def rows(self, graph: Graph) -> list[RowPart]:
        """Returns the nodes of a graph.

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
        return parts

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
        if operation.short in _KEEPING_STATISTICS and keeps_statistics(args, kwargs):
            raise WireError(
                f"{operation.short} in training mode updates the running statistics of its module, "
                "which stay in this process: call `.eval()` of the module first"
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
            entry = (file, line.line, printable(line.text)[:_LONGEST_TEXT])
            self._marks[known] = self.lines.setdefault(entry, len(self.lines))
        return self._marks[known]

    def _numbers(self, entry: Sequence[Any], field: Field) -> list[int]:
        return [
            self.line(item) if column is line_column else item
            for item, column in zip(entry, field.columns, strict=True)
        ]


_KEEPING_STATISTICS = ("batch_norm", "instance_norm")


def keeps_statistics(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a normalisation writes into running statistics that it is given."""
    given = [*args[1:2], kwargs.get("running_mean")]
    training = kwargs.get("training", kwargs.get("use_input_stats", len(args) > 5 and args[5]))
    return bool(training) and any(isinstance(item, torch.Tensor) for item in given)


def _entries(name: str, field: Any) -> list[Sequence[Any]]:
    """The entries of a field, each as a row of things; of a flag that is set, an empty row."""
    if name == "contexts":
        return [(at, setting) for at, context in field.items() for setting in settings(context)]
    if isinstance(field, bool):
        return [()] * field
    if isinstance(field, Mapping):
        return list(cast("Mapping[Any, Any]", field).items())
    if isinstance(field, frozenset):  # in one order, so that the bytes are the same every time
        return [(item,) for item in sorted(cast("frozenset[int]", field))]
    return [item if isinstance(item, tuple) else (item,) for item in field]


_DECODER = msgspec.msgpack.Decoder(Message)
