"""What messages look like, declared as types: graphs, nodes, arguments, lines and tensors.

An argument that is one number, string, truth value or `None` looks like itself; everything else is
a part, a small array that begins with its tag. `wire_values.py` turns arguments into these and
back.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from insitu.graph.errors import WireError

MOST_ENTRIES = 1024
"""How many entries a dictionary may have, which bounds what one of colliding keys can cost."""

LARGEST_INTEGER = 512
"""How many bytes an integer may have. Python refuses to print those of over 4300 digits."""

Index = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Part(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """All parts of the message that are more than a number or a string."""


class RefPart(Part, tag="ref"):
    """The value of an earlier node."""

    index: Index


class EarlierPart(Part, tag="earlier"):
    """A value that an earlier block of a job keeps: which block, and which of its nodes."""

    block: Index
    node: Index


class WeightPart(Part, tag="weight"):
    """A weight of the model, by its path."""

    path: str


class TensorPart(Part, tag="tensor"):
    """One of the tensors that come with the message."""

    index: Index


class TuplePart(Part, tag="tuple"):
    """A tuple."""

    items: list[Value]


class ListPart(Part, tag="list"):
    """A list."""

    items: list[Value]


class DictPart(Part, tag="dict"):
    """A dictionary."""

    keys: Annotated[list[Value], msgspec.Meta(max_length=MOST_ENTRIES)]
    items: list[Value]


class SlicePart(Part, tag="slice"):
    """A slice, whose bounds may be values of the run."""

    start: Value
    stop: Value
    step: Value


class ResultPart(Part, tag="result"):
    """What `torch.max` and its like return."""

    name: str
    items: list[Value]


class ModelOutputPart(Part, tag="output"):
    """What a model of Transformers returns: a dictionary whose entries are attributes too.

    Results hold these, and arguments do not.

    Attributes:
        kind: the name of its class, with the module.
        names: the names of its entries.
        items: its entries.
        empty: the names of its fields that have no entry.
    """

    kind: str
    names: Annotated[list[str], msgspec.Meta(max_length=MOST_ENTRIES)]
    items: list[Value]
    empty: Annotated[list[str], msgspec.Meta(max_length=MOST_ENTRIES)]


class LeftOutPart(Part, tag="left out"):
    """Stands in results for an object that is no data: the name of its class."""

    kind: str


class IntegerPart(Part, tag="int"):
    """An integer of more than 64 bits, in two's complement, little end first."""

    data: Annotated[bytes, msgspec.Meta(max_length=LARGEST_INTEGER)]


class ComplexPart(Part, tag="complex"):
    """A complex number."""

    real: float | NamedPart
    imag: float | NamedPart


class BytesPart(Part, tag="bytes"):
    """Bytes."""

    data: bytes


class EllipsisPart(Part, tag="ellipsis"):
    """`...`."""


class SizePart(Part, tag="size"):
    """A `torch.Size`."""

    sizes: list[Annotated[int, msgspec.Meta(le=2**63 - 1)]]


class DevicePart(Part, tag="device"):
    """A `torch.device`."""

    name: str


class NamedPart(Part, tag="named"):
    """A dtype, a layout or a memory format; in JSON, a float that is no finite number."""

    name: str


Value = (
    None
    | bool
    | int
    | float
    | str
    | RefPart
    | EarlierPart
    | WeightPart
    | TensorPart
    | TuplePart
    | ListPart
    | DictPart
    | SlicePart
    | ResultPart
    | ModelOutputPart
    | LeftOutPart
    | IntegerPart
    | ComplexPart
    | BytesPart
    | EllipsisPart
    | SizePart
    | DevicePart
    | NamedPart
)


class StoredTensor(Part):
    """What the bytes of a tensor mean.

    Attributes:
        dtype: such as "torch.bfloat16".
        shape: the length of each axis.
        device: where it was. It is put there again if the reader's machine has such a device.
    """

    dtype: str
    shape: Annotated[list[Index], msgspec.Meta(max_length=64)]
    device: str


class DigestedTensor(Part):
    """A tensor that is known by its digest, so that it need not come with every message.

    Attributes:
        tensor: what its bytes mean.
        digest: as of `wire_tensors.digest_of`.
        leaf: of a tensor whose gradient is to come back, its number among those, from 1; else 0.
    """

    tensor: StoredTensor
    digest: str
    leaf: int = 0


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
"""The fields of a graph but its rows. Another name is refused before the value under it is made."""

Fields = dict[FieldName, list[list[Index]]]


MOST_TEXT = 200
"""How many characters of a line travel: it is there to be shown."""

_LONGEST_NAME = 1_000
_MOST_LINES = 200_000  # each takes five bytes at least, and a hundred times as many in memory


class LinePart(Part):
    """A line of the user's: which of the files, its number and its text."""

    file: Index
    number: Index
    text: Annotated[str, msgspec.Meta(max_length=MOST_TEXT)]


FileTable = Annotated[
    list[Annotated[str, msgspec.Meta(max_length=_LONGEST_NAME)]],
    msgspec.Meta(max_length=_MOST_LINES),
]
"""The names of the files that the user's lines are in."""

LineTable = Annotated[list[LinePart], msgspec.Meta(max_length=_MOST_LINES)]
"""The user's lines."""


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
    files: FileTable
    lines: LineTable
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
    if line.isprintable():  # nearly always
        return line
    return "".join([character if character.isprintable() else " " for character in line])


_ROWS = msgspec.msgpack.Decoder(list[RowPart])
