"""Results as bytes: a safetensors file, with their structure in its metadata.

The metadata is JSON, in the parts that arguments of nodes are written in. A tensor of a dtype that
safetensors lacks is stored as a row of bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, Literal, NamedTuple, cast

import msgspec
import safetensors.torch
import torch

from insitu.engine import model_outputs
from insitu.engine.job_outcome import Failure, Outputs
from insitu.engine.model_outputs import LeftOut, Output, kind_of
from insitu.graph import errors
from insitu.graph.errors import ExecutionError, InsituError, WireError
from insitu.graph.location import Location, SourceLine
from insitu.graph.wire_message import (
    MOST_TEXT,
    LeftOutPart,
    ModelOutputPart,
    Part,
    StoredTensor,
    Value,
    file_name,
    printable,
)
from insitu.graph.wire_tensors import bytes_of, tensor_of
from insitu.graph.wire_values import ValueReader, ValueWriter, text

_KEY = "insitu"
_VERSION = 1
_LONGEST_HEADER = 64 * 2**20
_NATIVE = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)


class TensorPlace(Part):
    """Where a tensor is in the file, and what its bytes mean."""

    key: str
    how: StoredTensor


class OutputsPart(Part):
    """What a generation returned: fields as of `Outputs`."""

    whole: Value
    each: list[Value]
    parts: list[tuple[int, Value]] = msgspec.field(default_factory=list[tuple[int, Value]])


class FailurePart(Part):
    """What failed: fields as of `Failure`, the error as its class, its message and its line."""

    block: int
    invocations: list[int]
    names: list[str]
    error: str
    message: str
    part: int
    line: tuple[str, int, str] | None = None


class Told(msgspec.Struct, forbid_unknown_fields=True):
    """The metadata of a file of results.

    Attributes:
        kind: the kind of the file's content.
        version: the version of the format.
        tensors: its tensors, which the values refer to by their place here.
        values: the saved values, by name.
        about: as of `Results`.
        outputs: as of `Results`.
        differences: as of `Results`.
        failed: as of `Results`.
        gradients: as of `Results`.
    """

    kind: Literal["results of a job"]
    version: int
    tensors: list[TensorPlace]
    values: dict[str, Value]
    about: dict[str, str]
    outputs: list[OutputsPart | None]
    differences: list[str]
    failed: list[FailurePart] = msgspec.field(default_factory=list[FailurePart])
    gradients: list[Value] = msgspec.field(default_factory=list[Value])


class Stored(NamedTuple):
    """What a file of results holds: the arguments of `Results`."""

    values: Mapping[str, Any]
    about: Mapping[str, str]
    outputs: Sequence[Outputs | None]
    differences: Sequence[str]
    failed: Sequence[Failure] = ()
    gradients: Sequence[torch.Tensor | None] = ()


def to_bytes(stored: Stored) -> bytes:
    """Returns results as bytes; see `Results.to_bytes`."""
    writer = _Writer()
    saved = {name: writer.saved(value, name) for name, value in stored.values.items()}
    outputs = [_outputs_part(writer, at, one) for at, one in enumerate(stored.outputs)]
    gradients = [writer.saved(one, f"gradient {at}") for at, one in enumerate(stored.gradients)]
    rows: dict[str, torch.Tensor] = {}
    places: list[TensorPlace] = []
    for key, tensor in zip(writer.keys, writer.tensors, strict=True):
        how = StoredTensor(str(tensor.dtype), list(tensor.shape), "cpu")
        places.append(TensorPlace(key, how))
        row = bytes_of(tensor)
        # Of other dtypes, such as complex numbers, the file has the bytes, and `how` says what they
        # mean.
        rows[key] = tensor_of(row, how) if tensor.dtype in _NATIVE else row
    told = Told(
        "results of a job",
        _VERSION,
        places,
        saved,
        dict(stored.about),
        outputs,
        list(stored.differences),
        [_failure_part(one) for one in stored.failed],
        gradients,
    )
    return safetensors.torch.save(rows, {_KEY: msgspec.json.encode(told).decode()})


def from_bytes(data: bytes) -> Stored:
    """Returns the results that bytes stand for; see `Results.from_bytes`."""
    told = _told(data)
    if told.version != _VERSION:
        raise WireError(
            f"The results are in version {told.version} of the format, and this Insitu reads "
            f"version {_VERSION}: install the same Insitu in both places."
        )
    try:
        rows = safetensors.torch.load(data)
    except Exception as error:  # it raises several kinds, not all of them its own
        raise WireError(f"The tensors of the results cannot be read: {error}.") from None
    try:
        if sorted(rows) != sorted(place.key for place in told.tensors):
            raise WireError("the file does not have the tensors that it names")
        reader = _Reader([_tensor(rows[place.key], place.how) for place in told.tensors])
        values = {name: reader.value(part, 0) for name, part in told.values.items()}
        outputs = [part and _outputs(reader, part) for part in told.outputs]
        gradients = [reader.value(part, 0) for part in told.gradients]
        if not all(one is None or isinstance(one, torch.Tensor) for one in gradients):
            raise WireError("a gradient in it is no tensor")
        if reader.weights:
            raise WireError("a weight of a model is no result")
    except WireError as error:
        raise WireError(f"The results cannot be read: {error}.") from None
    failed = [_failure(part) for part in told.failed]
    return Stored(values, told.about, outputs, told.differences, failed, gradients)


class _Writer(ValueWriter):
    """Writes values, and gives each tensor a key from which a reader can tell what it is."""

    def __init__(self) -> None:
        super().__init__(finite=True)
        self.keys: list[str] = []
        self._taken = {"__metadata__"}  # a header of safetensors has its metadata there

    def saved(self, value: Any, name: str) -> Value:
        """Returns how a value looks, that goes under a name.

        Raises:
            WireError: if it is no data.
        """
        data = _as_data(value)
        try:
            part = self.part(data)
        except WireError as error:
            raise WireError(f"`results[{name!r}]` cannot be stored: {error}.") from None
        self.keys += map(self._free, _keys(data, name))  # in the order of the tensors
        return part

    def output(self, value: Any, name: str) -> Value:
        """Returns how the output of a generation looks, without the parts that are no data.

        Nobody has asked for all parts, and the saved values must not be lost for one.
        """
        if isinstance(value, torch.Tensor):  # nearly always
            return self.saved(value, name)
        data = _as_data(value)
        if isinstance(data, Output):
            entries = {key: _if_stored(item) for key, item in data.entries.items()}
            return self.saved(data._replace(entries=entries), name)
        return self.saved(_if_stored(data), name)

    def _container(self, value: Any, kind: Any, depth: int) -> Value:
        if kind is LeftOut:
            return LeftOutPart(text(kind_of(value)))
        if kind is not Output:
            return super()._container(value, kind, depth)
        names, empty = list(map(text, value.entries)), list(map(text, value.empty))
        items = [self.part(item, depth) for item in value.entries.values()]
        return ModelOutputPart(text(value.kind), names, items, empty)

    def _free(self, key: str) -> str:
        while key in self._taken:
            key += "'"
        self._taken.add(key)
        return key


def _if_stored(value: Any) -> Any:
    """A value, or what stands for it if it cannot be stored."""
    try:
        _Writer().part(value)
    except WireError:
        return LeftOut(kind_of(value))
    return value


class _Reader(ValueReader):
    """Reads values, among them outputs of models."""

    def of_results(
        self, part: ModelOutputPart | LeftOutPart, values: Callable[[Sequence[Value]], list[Any]]
    ) -> Any:
        """Returns what a model has returned, or what stands for a part of it."""
        if isinstance(part, LeftOutPart):
            return LeftOut(part.kind)
        return model_outputs.made(part.kind, part.names, values(part.items), part.empty)


def _keys(value: Any, key: str) -> list[str]:
    """A key for each tensor in a value, which is data."""
    if isinstance(value, torch.Tensor):
        return [key]
    if isinstance(value, Output):
        return _keys(value.entries, key)
    items: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        items = list(cast("Mapping[Any, Any]", value).items())
    elif isinstance(value, tuple | list):
        items = list(enumerate(cast("tuple[Any, ...]", value)))
    return [found for name, item in items for found in _keys(item, f"{key}/{name}")]


def _as_data(value: Any) -> Any:
    """A value with plain containers, and tensors without their history, each an object of its own.

    What torch's functions return keeps its class, and so does what models of Transformers return.
    """
    if isinstance(value, torch.Tensor):
        plain = value.detach()
        return plain if type(plain) is torch.Tensor else plain.as_subclass(torch.Tensor)
    if isinstance(value, Output):
        return value
    if model_outputs.is_output(value):
        output = model_outputs.as_data(value)
        return output._replace(entries=_as_data(output.entries))
    if isinstance(value, Mapping):
        entries = cast("Mapping[Any, Any]", value)
        return {key: _as_data(item) for key, item in entries.items()}
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        items = [_as_data(item) for item in cast("tuple[Any, ...]", value)]
        # Any other class may be the user's, and not be there where the file is read.
        kind: Any = cast(Any, type)(value)
        return kind(items) if kind.__module__ == "torch.return_types" else tuple(items)
    if isinstance(value, list):
        return [_as_data(item) for item in cast("list[Any]", value)]
    return value


def _outputs_part(writer: _Writer, at: int, outputs: Outputs | None) -> OutputsPart | None:
    if outputs is None:
        return None
    each = [writer.output(one, f"output {at}/{n}") for n, one in enumerate(outputs.each)]
    whole, parts = writer.output(outputs.whole, f"output {at}"), outputs.parts.items()
    return OutputsPart(
        whole, each, [(n, writer.output(one, f"output {at} of job {n}")) for n, one in parts]
    )


def _outputs(reader: ValueReader, part: OutputsPart) -> Outputs:
    parts = {number: reader.value(one, 0) for number, one in part.parts}
    each = [reader.value(one, 0) for one in part.each]
    return Outputs(reader.value(part.whole, 0), each, parts)


def _failure_part(failure: Failure) -> FailurePart:
    kind, error = type(failure.error).__name__, failure.error
    location, message, line = error.location, str(error), None
    if location is not None:
        message = message.removesuffix(f"\n{location}")
        line = PurePath(location.file).name, location.line, location.text
    return FailurePart(
        failure.block, [*failure.invocations], [*failure.names], kind, message, failure.part, line
    )


def _failure(part: FailurePart) -> Failure:
    """A failure with an error of Insitu's own, of the class that it had."""
    kind: Any = vars(errors).get(part.error)
    # The name comes from anybody too, and may name nothing but errors of Insitu's.
    known = isinstance(kind, type) and issubclass(kind, InsituError)
    location: Location | None = None
    if part.line is not None:
        file, number, text = part.line
        location = Location(SourceLine(file_name(file), number, printable(text)[:MOST_TEXT]), 0)
    made = cast("type[InsituError]", kind) if known else ExecutionError
    error = made("\n".join(map(printable, part.message.split("\n"))), location)
    return Failure(part.block, part.invocations, part.names, error, part.part)


def _tensor(row: torch.Tensor, how: StoredTensor) -> torch.Tensor:
    if str(row.dtype) == how.dtype and list(row.shape) == how.shape:
        if row.dtype is torch.bool and bool((row.view(torch.uint8) > 1).any()):
            raise WireError("a boolean tensor holds other values than true and false")
        return row
    return tensor_of(row, how)


def _told(data: bytes) -> Told:
    """The metadata of a file."""
    what = "The bytes are no results of a job"
    # The length comes from anybody: it is bounded before anything of that size is made.
    size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else -1
    if not 0 <= size <= min(_LONGEST_HEADER, len(data) - 8):
        raise WireError(f"{what}: they are no safetensors file.")
    try:
        header = msgspec.json.decode(data[8 : 8 + size], type=_Header)
        written = header.metadata.get(_KEY)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"{what}: {error}.") from None
    if written is None:
        raise WireError(f"{what}, but a safetensors file of something else.")
    try:
        return msgspec.json.decode(written, type=Told)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"The results cannot be read: {error}.") from None


class _Header(msgspec.Struct):
    """The header of a safetensors file, as far as it is read here."""

    metadata: dict[str, str] = msgspec.field(name="__metadata__", default_factory=dict[str, str])
