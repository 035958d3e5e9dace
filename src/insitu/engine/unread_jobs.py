"""What can be done with the bytes of a job before anybody reads all of it."""

from __future__ import annotations

import msgspec

from insitu.engine.job_wire import JOB_FRAME
from insitu.graph.wire import decoded, said_of
from insitu.graph.wire_message import DigestedTensor, LineTable, Part
from insitu.graph.wire_tensors import digests_in


class _JobLines(Part):
    """A job; only its lines are read. Whoever reads no more of it needs no limits."""

    operations: msgspec.Raw
    files: msgspec.Raw
    lines: LineTable
    tensors: msgspec.Raw
    model: msgspec.Raw
    blocks: msgspec.Raw
    parts: msgspec.Raw


class _JobTensors(Part):
    """A job; only the descriptions of its tensors are read."""

    operations: msgspec.Raw
    files: msgspec.Raw
    lines: msgspec.Raw
    tensors: list[DigestedTensor]
    model: msgspec.Raw
    blocks: msgspec.Raw
    parts: msgspec.Raw


def without_source(data: bytes) -> bytes:
    """Returns the bytes of a job without the texts of the user's lines: their numbers stay.

    Args:
        data: the bytes of a job.

    Raises:
        WireError: if they are none.
    """
    encoded, tensors = JOB_FRAME.opened(data)
    message = decoded(_LINES_DECODER, encoded, "job")
    message.lines = [msgspec.structs.replace(line, text="") for line in message.lines]
    return JOB_FRAME.around(msgspec.msgpack.encode(message), tensors)


def absent_from(data: bytes) -> list[str]:
    """Returns the digests of the tensors that a job takes and that are not among its bytes.

    Args:
        data: the bytes of a job.

    Raises:
        WireError: if they are none.
    """
    encoded, tensors = JOB_FRAME.opened(data)
    with said_of("job"):
        there = digests_in(tensors)
    taken = [one.digest for one in decoded(_TENSORS_DECODER, encoded, "job").tensors]
    return [digest for digest in dict.fromkeys(taken) if digest not in there]


_LINES_DECODER = msgspec.msgpack.Decoder(_JobLines)
_TENSORS_DECODER = msgspec.msgpack.Decoder(_JobTensors)
