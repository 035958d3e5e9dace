"""A lock on a folder: one process writes into it at a time."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from insitu.graph.errors import SaveError
from insitu.graph.location import here
from insitu.harvest.layout import LOCK


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Holds the lock of a folder in a `with` block.

    The system holds it for the process, so one that dies has it no longer, however it dies.

    Args:
        folder: the folder.

    Raises:
        SaveError: if another process, or another thread, holds it.
    """
    path = folder / LOCK
    try:
        number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise SaveError(f"'{path}' cannot be written: {error.strerror}.", here()) from None
    try:
        try:
            _take(number)
        except OSError:
            owner = os.pread(number, 32, 0).decode("ascii", "replace").strip("\0 \n")
            who = f" (process {owner})" if owner.isdigit() else ""
            raise SaveError(
                f"Another harvest is writing to '{folder}'{who}: wait until it has ended, or give "
                "another folder.",
                here(),
            ) from None
        with suppress(OSError):  # on a full disk: it is for a message only
            os.ftruncate(number, 0)
            os.pwrite(number, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(number)  # which gives the lock back


def _take(number: int) -> None:
    try:
        import fcntl
    except ImportError:  # on Windows
        import msvcrt

        msvcrt.locking(number, msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
