"""How the arguments of nodes look in the wire format, declared as types.

What is one number, string, truth value or `None` looks like itself; everything else is a part, a
small array that begins with its tag. `wire_values.py` turns arguments into these and back.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

MOST_ENTRIES = 1024
"""How many entries a dictionary may have, which bounds what one of colliding keys can cost."""

LARGEST_INTEGER = 512
"""How many bytes an integer may have. Python refuses to print those of over 4300 digits."""

Index = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Part(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Of the message, whatever is more than a number or a string."""


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
    | IntegerPart
    | ComplexPart
    | BytesPart
    | EllipsisPart
    | SizePart
    | DevicePart
    | NamedPart
)
