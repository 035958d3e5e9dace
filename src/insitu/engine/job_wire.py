"""Jobs as bytes: `Job.to_bytes` and `Job.from_bytes`.

A frame with a version and a checksum holds a msgpack message, and the tensors that it refers to,
each by its digest. What a message may look like is declared as types, and msgspec reads nothing
else. Reading is safe for any bytes: nothing is evaluated, imported or unpickled, operations are
looked up in the registry, options in a list, and every number is checked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from typing import Annotated, Any, Literal

import msgspec
import torch

from insitu.engine.job_options import check_options
from insitu.engine.job_parts import (
    MOST_BLOCKS,
    Demanded,
    JobBlock,
    JobModel,
    JobPart,
    JobPrompt,
    Name,
)
from insitu.engine.leaves import check_named
from insitu.engine.limits import Limits
from insitu.graph.context import Context, context_of, settings
from insitu.graph.errors import WireError
from insitu.graph.location import Location, Mark
from insitu.graph.operations import KEEP, SAVE
from insitu.graph.ordinary import ordinary_tensors
from insitu.graph.save_names import unfit
from insitu.graph.wire import Frame, Writer, decoded, said_of
from insitu.graph.wire_message import (
    DigestedTensor,
    Fields,
    FileTable,
    Index,
    LineTable,
    Part,
    Value,
)
from insitu.graph.wire_reader import Reader
from insitu.graph.wire_tensors import (
    Identity,
    digest_of,
    restored_by_digest,
    stored_by_digest,
)
from insitu.graph.wire_values import ValueWriter

VERSION = 1
"""The version of the format. Another one cannot be read."""

JOB_FRAME = Frame(b"insitu job", VERSION, "job")


class PromptPart(Part):
    """What an invocation is given: fields as of `JobPrompt`, and the number of its line."""

    line: Index | None
    ids: Value
    mask: Value
    args: list[Value]
    kwargs: dict[Name, Value]
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None
    steps: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] | None
    padded: Literal["left", "right"] | None


class DemandedPart(Part):
    """Options that a value takes, the line that reads it, and the prompts that have them."""

    options: dict[Name, Value]
    line: Index
    prompts: list[Index]


class BlockPart(Part):
    """A block: fields as of `JobBlock`, its graph in two, and its context as numbers."""

    procedure: Literal["trace", "generate"]
    options: dict[Name, Value]
    prompts: list[PromptPart]
    rows: msgspec.Raw
    fields: Fields
    saves: list[tuple[Index, Name]]
    demanded: DemandedPart | None
    begun: list[Index]


class JobMessage(Part):
    """A job. The first tables are as of the message of a graph, and all its blocks share them."""

    operations: list[str]
    files: FileTable
    lines: LineTable
    tensors: list[DigestedTensor]
    model: JobModel
    blocks: Annotated[list[BlockPart], msgspec.Meta(max_length=MOST_BLOCKS)]
    parts: Annotated[list[JobPart], msgspec.Meta(max_length=MOST_BLOCKS)]


class _Writer(Writer):
    """Writes what blocks hold, and of equal tensors one.

    Attributes:
        by_digest: the tensors, by what tells them apart, in the order of their numbers.
        leaves: those whose gradients are to come back.
    """

    def __init__(self, trains: bool = False) -> None:
        self.by_digest: dict[Identity, torch.Tensor] = {}
        self.leaves: list[torch.Tensor] = []
        super().__init__(ValueWriter(identity=self._identity, trains=trains))

    def _identity(self, tensor: torch.Tensor) -> Identity:
        if tensor.requires_grad:
            self.leaves.append(tensor)
        leaf = len(self.leaves) if tensor.requires_grad else 0
        key = digest_of(tensor), str(tensor.device), leaf
        self.by_digest.setdefault(key, tensor)
        return key


def to_bytes(
    model: JobModel,
    blocks: Sequence[JobBlock],
    without: Collection[str],
    joined: Sequence[JobPart] = (),
    trains: bool = False,
) -> bytes:
    """Returns a job as bytes; see `Job.to_bytes`."""
    writer = _Writer(trains)
    parts = [_block_part(writer, block) for block in blocks]
    for block in blocks if writer.leaves else ():
        check_named(block.graph, writer.leaves)
    described, tensors = stored_by_digest(writer.by_digest, frozenset(without))
    message = JobMessage(
        list(writer.operations),
        list(writer.files),
        writer.line_parts,
        described,
        model,
        parts,
        [*joined],
    )
    return JOB_FRAME.around(msgspec.msgpack.encode(message), tensors)


def tensors_of(
    blocks: Sequence[JobBlock], trains: bool = False
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Returns the tensors of a job by digest, and those whose gradients are to come back.

    Args:
        blocks: its blocks.
        trains: as of `Job.to_bytes`.
    """
    writer = _Writer(trains)
    for block in blocks:
        _block_part(writer, block)
    tensors = {digest: tensor for (digest, _, _), tensor in writer.by_digest.items()}
    return tensors, writer.leaves


def from_bytes(
    data: bytes,
    elsewhere: Mapping[str, torch.Tensor],
    limits: Limits,
    place: torch.device | None = None,
) -> tuple[JobModel, list[JobBlock], list[JobPart], list[torch.Tensor]]:
    """Returns the model, blocks, parts and leaves of a job in bytes; see `Job.from_bytes`."""
    limits.check("peak_bytes", len(data), f"The job has {len(data):,} bytes")
    message, tensors = _opened(data)
    # What is run in blocks of any kind must not be made in inference mode.
    with said_of("job"), ordinary_tensors():
        found = restored_by_digest(message.tensors, tensors, elsewhere, place)
        reader = Reader(message, found, limits.nodes, limits.sites)
        names: set[str] = set()
        blocks = [_block(reader, part, names) for part in message.blocks]
        reader.check_tensors()
        if not blocks:
            raise WireError("it has no block")
        saved = {name for block in blocks for name in block.saves.values()}
        for part in message.parts:
            _check_part(part, blocks, saved)
    leaves = [tensor for tensor, one in zip(found, message.tensors, strict=True) if one.leaf]
    return message.model, blocks, message.parts, leaves


def _opened(data: bytes) -> tuple[JobMessage, bytes]:
    """The message in the bytes of a job, and the bytes of its tensors."""
    encoded, tensors = JOB_FRAME.opened(data)
    return decoded(_DECODER, encoded, "job"), tensors


def _check_part(part: JobPart, blocks: Sequence[JobBlock], saved: Set[str]) -> None:
    """Raises if one of several jobs names something that is not there."""
    for share in part.shares:
        block = blocks[share.block] if share.block < len(blocks) else None
        if (
            block is None
            or share.first + share.count > len(block.prompts)
            or share.start + share.size > len(block.graph)
        ):
            raise WireError("a job that is a part of it has lines or prompts that are not there")
    if len({share.block for share in part.shares}) < len(part.shares):
        raise WireError("two blocks of a job that is a part of it are one")
    if not part.names.keys() <= saved or len({*part.names.values()}) < len(part.names):
        raise WireError("a job that is a part of it names a value that is not saved, or one twice")


def _block_part(writer: Writer, block: JobBlock) -> BlockPart:
    context = Context(casts=tuple(block.casts.items()), dtype=block.dtype)
    first = block.prompts[0].mark if block.prompts else None
    demanded = block.demanded
    # The graph last: what is wrong with the block as a whole is said first.
    options = _options(writer, block.procedure, block.options, first)
    return BlockPart(
        block.procedure,
        options,
        [_prompt_part(writer, prompt) for prompt in block.prompts],
        writer.rows(block.graph),
        writer.fields(block.graph),
        [*block.saves.items()],
        demanded
        and DemandedPart(
            _options(writer, block.procedure, demanded.options, demanded.mark),
            writer.line(demanded.mark),
            [*demanded.prompts],
        ),
        settings(context),
    )


def _options(
    writer: Writer, procedure: str, options: Mapping[str, Any], mark: Mark | None
) -> dict[str, Value]:
    location = None if mark is None else Location(*mark)
    try:
        check_options(procedure, options)
        return {name: writer.values.part(value) for name, value in options.items()}
    except WireError as error:
        raise WireError(f"The job cannot be sent to another process: {error}.", location) from None


def _prompt_part(writer: Writer, prompt: JobPrompt) -> PromptPart:
    def part(name: str, value: Any) -> Value:
        try:
            return writer.values.part(value)
        except WireError as error:
            raise WireError(
                f"`{name}` of the prompt cannot be sent to another process: {error}.",
                prompt.location,
            ) from None

    return PromptPart(
        None if prompt.mark is None else writer.line(prompt.mark),
        part("input_ids", prompt.ids),
        part("attention_mask", prompt.mask),
        [part(f"argument {place}", value) for place, value in enumerate(prompt.args)],
        {name: part(name, value) for name, value in prompt.kwargs.items()},
        prompt.seed,
        prompt.steps,
        prompt.padded,
    )


def _block(reader: Reader, part: BlockPart, names: set[str]) -> JobBlock:
    """A block, which may use values of the blocks that were read before it."""
    options = _values(reader, part.options)
    check_options(part.procedure, options)
    prompts = [_prompt(reader, prompt) for prompt in part.prompts]
    if not prompts:
        raise WireError("a block has no prompt")
    graph = reader.graph(part.rows, part.fields)
    for index, (operation, args, *_) in enumerate(graph.rows):
        if operation.name == "read" and args[0] >= len(prompts):
            raise WireError(
                f"node {index} is of invocation {args[0]}, and there are {len(prompts)}",
                graph[index].location,
            )
    if any(number >= len(prompts) for number, *_ in graph.scopes):
        raise WireError("lines stand in an invocation that is not there")
    saved = frozenset(at for at, row in enumerate(graph.rows) if row[0] in (SAVE, KEEP))
    saves = dict(part.saves)
    if len(saves) < len(part.saves) or not saves.keys() <= saved:
        raise WireError("a name is given to a value that is not saved, or two names to one value")
    for name in saves.values():
        if not name.isdigit() and (why := unfit(name)):
            raise WireError(f"a value is saved as {name!r:.40}: {why}")
        if name in names:
            raise WireError(f"two values are saved as {name!r}")
        names.add(name)
    reader.values.saved.append(saved)
    demanded = part.demanded and Demanded(
        _values(reader, part.demanded.options),
        _mark(reader, part.demanded.line),
        part.demanded.prompts,
    )
    if demanded is not None:
        check_options(part.procedure, demanded.options)
        plain = all(isinstance(value, bool | str) for value in demanded.options.values())
        if not plain or not graph.unfused:
            raise WireError("a block has options that no value takes")
        if any(number >= len(prompts) for number in demanded.prompts):
            raise WireError("a block has options of a prompt that is not there")
    casts, dtype = _begun(part.begun)
    return JobBlock(part.procedure, options, prompts, graph, saves, demanded, casts, dtype)


def _prompt(reader: Reader, part: PromptPart) -> JobPrompt:
    ids, mask = (
        _whole(reader, value, name) for value, name in ((part.ids, "ids"), (part.mask, "mask"))
    )
    if mask is not None and (ids is None or mask.shape != ids.shape):
        raise WireError("the mask of a prompt is not of the shape of its ids")
    args = tuple([_value(reader, value) for value in part.args])
    kwargs = _values(reader, part.kwargs)
    line = None if part.line is None else _mark(reader, part.line)
    return JobPrompt(ids, mask, args, kwargs, part.seed, line, part.steps, part.padded)


def _whole(reader: Reader, part: Value, name: str) -> torch.Tensor | None:
    """Token ids, or a mask of them."""
    value = _value(reader, part)
    if value is None:
        return None
    if not isinstance(value, torch.Tensor) or value.dtype is not torch.int64 or value.ndim != 2:
        raise WireError(f"the {name} of a prompt are not whole numbers with two axes")
    return value


def _values(reader: Reader, parts: Mapping[str, Value]) -> dict[str, Any]:
    return {name: _value(reader, part) for name, part in parts.items()}


def _value(reader: Reader, part: Value) -> Any:
    """What a part stands for that is no argument of a node: it refers to none."""
    values = reader.values
    values.earlier = values.weights = 0
    found = values.value(part, 0)
    if values.earlier or values.weights:
        raise WireError("a prompt or an option is a value of the run, or a weight of the model")
    return found


def _mark(reader: Reader, line: int) -> Mark:
    if line >= len(reader.marks):
        raise WireError(f"there is no line {line}")
    return reader.marks[line]


def _begun(numbers: Sequence[int]) -> tuple[Mapping[str, torch.dtype], torch.dtype]:
    """The context that a block began in."""
    try:
        context = context_of([*numbers])
    except ValueError:
        raise WireError(f"no block begins in a context of the numbers {numbers}") from None
    casts = {device: kind for device, kind in context.casts if kind is not None}
    if not context.grad or context.dtype is None or len(casts) < len(context.casts):
        raise WireError(f"no block begins in a context of the numbers {numbers}")
    return casts, context.dtype


_DECODER = msgspec.msgpack.Decoder(JobMessage)
