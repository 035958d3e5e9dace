"""The manifest of a folder: one line for each shard that is complete."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from insitu import disk
from insitu.graph.errors import LoadError
from insitu.graph.location import here
from insitu.harvest.layout import MANIFEST, Line


def read_manifest(folder: Path) -> tuple[list[Line], int]:
    """Returns the lines of a manifest, and how many bytes they are.

    What stands behind the last end of a line was being written when a process was killed, and is
    no line. No manifest is one without lines.

    Args:
        folder: the folder.

    Raises:
        LoadError: if a line is none, or they are not of consecutive shards.
    """
    path = folder / MANIFEST
    if not path.exists():
        return [], 0
    content = disk.read(path)
    whole = content[: content.rfind(b"\n") + 1]
    lines = list[Line]()
    for number, text in enumerate(whole.splitlines()):
        try:
            line = msgspec.json.decode(text, type=Line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise LoadError(f"Line {number + 1} of '{path}' is none: {error}.", here()) from None
        if line.shard != number or (lines and lines[-1].last):
            raise LoadError(f"Line {number + 1} of '{path}' is of shard {line.shard}.", here())
        lines.append(line)
    return lines, len(whole)


def append_line(folder: Path, line: Line) -> None:
    """Appends a line, and waits until it is on the disk.

    Args:
        folder: the folder.
        line: the line.

    Raises:
        OSError: as the system says. Then there is nothing of the line.
    """
    path = folder / MANIFEST
    is_new = not path.exists()
    with open(path, "ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        content = _text(line)
        try:
            if os.write(file.fileno(), content) != len(content):
                raise OSError(28, os.strerror(28))  # ENOSPC: a part of it had a place
            os.fsync(file.fileno())
        except BaseException:
            os.ftruncate(file.fileno(), size)
            raise
    if is_new:
        sync_folder(folder)


def replace_manifest(folder: Path, lines: Sequence[Line]) -> None:
    """Puts other lines in the place of all.

    Args:
        folder: the folder.
        lines: the lines.

    Raises:
        SaveError: if they cannot be written. Then the lines are as before.
    """
    disk.write(folder / MANIFEST, b"".join(map(_text, lines)))
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Waits until the names of files in a folder are on the disk.

    Args:
        folder: the folder.
    """
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:  # on Windows a folder cannot be opened, and need not be
        return
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _text(line: Line) -> bytes:
    return msgspec.json.encode(line) + b"\n"
