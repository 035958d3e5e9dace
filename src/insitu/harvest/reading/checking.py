"""Whether the shards of a folder are as they were written."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from insitu.graph.errors import LoadError
from insitu.harvest.layout import Line, shard_name
from insitu.harvest.reading.mapped_shard import open_shard
from insitu.harvest.reading.opening import Contents
from insitu.harvest.specification import Specification


@dataclass(frozen=True, slots=True)
class BrokenShard:
    """A shard that is not as the manifest says.

    Attributes:
        shard: its number.
        file: its file, relative to the folder.
        reason: in which way it differs.
    """

    shard: int
    file: str
    reason: str


def broken_shards(folder: Path, contents: Contents) -> list[BrokenShard]:
    """Reads all shards and returns those that are missing, or not as they were written.

    Args:
        folder: the folder.
        contents: what it says of itself.
    """
    found: list[BrokenShard] = []
    for line in contents.lines:
        reason = _wrong(folder, contents.specification, line)
        if reason:
            found.append(BrokenShard(line.shard, shard_name(line.shard), reason))
    return found


def _wrong(folder: Path, specification: Specification, line: Line) -> str:
    """Why a shard is broken, "" if it is not."""
    try:
        open_shard(folder, specification, line)
        with open(folder / shard_name(line.shard), "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except LoadError as error:
        return str(error).splitlines()[0]
    except OSError as error:  # of a disk that fails in the middle
        return error.strerror or str(error)
    return "" if digest == line.sha256 else "its digest is not that in the manifest"
