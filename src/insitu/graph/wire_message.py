"""What the message of a wired graph looks like: its nodes, lines, tensors and fields."""

from __future__ import annotations

from typing import Literal

import msgspec

from insitu.graph.errors import WireError
from insitu.graph.wire_parts import Index, Part, Value
from insitu.graph.wire_tensors import StoredTensor

FieldName = Literal[
    "writes",
    "skips",
    "stops",
    "optional",
    "repeats",
    "differentiates",
    "after",
    "unfused",
    "contexts",
    "scopes",
]
"""The fields of a graph but its rows. Another name is refused before what is under it is made."""

Fields = dict[FieldName, list[list[Index]]]


class LinePart(Part):
    """A line of the user's: which of the files, its number and its text."""

    file: Index
    number: Index
    text: str


class ModulePart(Part, tag="module"):
    """One of the model's modules, that a node calls."""

    path: str


class SubgraphPart(Part, tag="function"):
    """A function that was recorded, that a node calls. Its rows are encoded: see `encoded_rows`."""

    rows: msgspec.Raw
    output: Value
    fields: Fields


class RowPart(Part):
    """A node: which of the operations and of the lines, and the arguments."""

    operation: Index
    line: Index
    args: list[Value | ModulePart | SubgraphPart]
    kwargs: dict[str, Value]


class Message(Part):
    """A graph.

    Attributes:
        operations: the names of those that its nodes use.
        files: the names of the files that its lines are in.
        lines: the user's lines.
        tensors: what the tensors look like that come with it.
        rows: its nodes.
        fields: its other fields, as rows of numbers; those that are empty are left out.
    """

    operations: list[str]
    files: list[str]
    lines: list[LinePart]
    tensors: list[StoredTensor]
    rows: msgspec.Raw
    fields: Fields


def encoded_rows(rows: list[RowPart]) -> msgspec.Raw:
    """Returns rows as a part of a message of their own, which is read after they are counted.

    A row of five bytes takes hundreds of them in memory.
    """
    return msgspec.Raw(msgspec.msgpack.encode(rows))


def row_count(rows: msgspec.Raw) -> int:
    """Returns how many rows there are, without reading them.

    Raises:
        WireError: if they are no list.
    """
    head = bytes(memoryview(rows)[:5])
    if head and head[0] & 0xF0 == 0x90:
        return head[0] & 0x0F
    length = {0xDC: 3, 0xDD: 5}.get(head[0] if head else 0)
    if length is None:
        raise WireError("its nodes are no list: they cannot be read")
    return int.from_bytes(head[1:length], "big")


def decoded_rows(rows: msgspec.Raw) -> list[RowPart]:
    """Returns rows.

    Raises:
        WireError: if they are anything else.
    """
    try:
        return _ROWS.decode(rows)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"its nodes cannot be read: {error}") from None


def file_name(path: str) -> str:
    """Returns the last part of a file's name, of any operating system."""
    return printable(path.replace("\\", "/").rpartition("/")[2])


def printable(line: str) -> str:
    """Returns a line without what would not show, or end it where it is printed."""
    return "".join([character if character.isprintable() else " " for character in line])


_ROWS = msgspec.msgpack.Decoder(list[RowPart])
