"""Edits as bytes: what `model.save_edits` writes and `model.load_edits` reads.

A header with the number of edits, then each as the bytes of its graph behind their length. What
is read is checked as if it had been written in `with model.edit()`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterator, Sequence

from insitu.graph.errors import InsituError, WireError
from insitu.graph.location import here
from insitu.graph.node import Graph
from insitu.tracing.edit import check_edit
from insitu.tracing.graph_check import check_modules

_HEADER = struct.Struct("<12sI")
_LENGTH = struct.Struct("<Q")
_MAGIC = b"insitu edits"


def edits_to_bytes(edits: Sequence[Graph]) -> bytes:
    """Returns edits as bytes.

    Args:
        edits: the edits, in the order in which they hold.

    Raises:
        WireError: if one holds something that is no data.
    """
    from insitu.graph import wire  # of no use to most who import this

    parts = [_HEADER.pack(_MAGIC, len(edits))]
    for graph in edits:
        data = wire.to_bytes(graph)
        parts += [_LENGTH.pack(len(data)), data]
    return b"".join(parts)


def edits_from_bytes(
    data: bytes, path: str | os.PathLike[str], modules: Collection[str]
) -> list[Graph]:
    """Returns the edits that bytes stand for.

    Args:
        data: the bytes.
        path: the file that they are from, for errors.
        modules: the paths of the model's modules.

    Raises:
        WireError: if they are no edits, or not those of such a model.
    """
    from insitu.graph import wire  # of no use to most who import this

    name = os.fspath(path)
    count, start = None, 0
    if data[: len(_MAGIC)] == _MAGIC and len(data) >= _HEADER.size:
        count, start = _HEADER.unpack_from(data)[1], _HEADER.size
    elif not data:  # a file of the first format has no header, but at least one edit
        raise WireError(f"{name!r} holds no edits: it is empty.", here())
    graphs: list[Graph] = []
    try:
        for part in _parts(data, start):
            graph = wire.from_bytes(part)
            check_edit(graph)
            check_modules(graph, modules)
            graphs.append(graph)
    except InsituError as error:
        first = str(error).splitlines()[0]
        raise WireError(f"{name!r} holds no edits of this model: {first}", here()) from None
    if count not in (None, len(graphs)):
        raise WireError(f"{name!r} holds {len(graphs)} of its {count} edits.", here())
    return graphs


def _parts(data: bytes, start: int) -> Iterator[bytes]:
    while start < len(data):
        begin = start + _LENGTH.size
        size = _LENGTH.unpack_from(data, start)[0] if begin <= len(data) else 0
        if not 0 < size <= len(data) - begin:
            raise WireError("It ends too early, or is no file of edits.")
        yield data[begin : begin + size]
        start = begin + size
