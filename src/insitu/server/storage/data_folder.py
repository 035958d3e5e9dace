"""The data folder of a server: nobody else's, and of one server at a time.

Files are written whole or not at all, and nobody but the user of the server may read them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from uuid import uuid4

from insitu.graph.errors import OptionError
from insitu.remote.problems import Problem, ProblemError

TEMPORARY = ".new-"
"""The beginning of the name of a file that is still being written."""

_LOCK = "lock"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class StorageError(ProblemError, OSError):
    """The disk of the server is full: a problem "storage" with the status 507.

    Args:
        detail: what there was no space for.
    """

    def __init__(self, detail: str) -> None:
        super().__init__(Problem("storage", "No space", 507, detail))


@contextlib.contextmanager
def full_disk_is_a_problem(what: str) -> Iterator[None]:
    """Raises a `StorageError` in the place of what the system says when a disk is full.

    Args:
        what: the content in words, such as "the job".
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(f"The disk of the server is full: no space for {what}.") from error
        raise


def make_private(folder: Path) -> None:
    """Makes a folder that only this user can look into, if it is not there.

    Args:
        folder: the folder. One that is there and holds other things has to be private already.

    Raises:
        OptionError: if it is somebody else's, or if others can write into it and it holds
            something that no server has put there.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = folder.stat()
    if state.st_uid != os.geteuid():
        raise OptionError(f"The folder {str(folder)!r} belongs to another user.")
    if not stat.S_IMODE(state.st_mode) & 0o077:
        return
    # The mode of a folder that the user has for something else is the user's business.
    if (folder / _LOCK).exists() or not any(folder.iterdir()):
        folder.chmod(0o700)
    elif stat.S_IMODE(state.st_mode) & 0o022:
        raise OptionError(
            f"Other users can write into the folder {str(folder)!r}: give an empty folder, or "
            f"run `chmod 700 {folder}`."
        )


class FolderLock:
    """Holds a folder until it is closed, or until this process ends in any way.

    Args:
        number: the number of the open lock file.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        # A forked process has the lock too, and would keep it when this one is gone.
        own = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _leave(own()))

    def close(self) -> None:
        """Gives the folder free. Doing it twice does nothing."""
        if self._number >= 0:
            fcntl.flock(self._number, fcntl.LOCK_UN)
        self.leave()

    def leave(self) -> None:
        """Lets the folder to others who have this lock: those that this process was forked of."""
        number, self._number = self._number, -1
        if number >= 0:
            os.close(number)

    def __del__(self) -> None:
        self.leave()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _leave(lock: FolderLock | None) -> None:
    if lock is not None:
        lock.leave()


def locked(folder: Path) -> FolderLock:
    """Takes a data folder for this server, and makes it if it is not there.

    Args:
        folder: the folder.

    Returns:
        What holds it. It has to be kept: a lock that is collected is no longer held.

    Raises:
        OptionError: if another server has it, in this process or in another one, or if it is not
            private; see `make_private`.
    """
    make_private(folder)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    number = os.open(folder / _LOCK, flags, 0o600)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(number, 32).decode(errors="replace").strip()
        os.close(number)
        process = f" (process {holder})" if holder.isdigit() else ""
        raise OptionError(
            f"Another server{process} has the data folder {str(folder)!r}: end that one, or give "
            "this one a folder of its own with `--data`."
        ) from None
    except BaseException:
        os.close(number)
        raise
    os.ftruncate(number, 0)
    os.pwrite(number, f"{os.getpid()}\n".encode(), 0)
    return FolderLock(number)


def create(folder: Path) -> tuple[int, Path]:
    """Makes a temporary file that only this user can read.

    Args:
        folder: the folder of the file that it becomes.

    Returns:
        The number of the open file, and its path.
    """
    path = folder / f"{TEMPORARY}{uuid4().hex}"
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), path


def write_all(number: int, data: bytes | memoryview) -> None:
    """Writes all of some bytes into an open file.

    Args:
        number: the number of the open file.
        data: the bytes.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(number, rest) :]


def put_in_place(number: int, path: Path, target: Path, durable: bool) -> None:
    """Gives a temporary file its name, in the place of one that has it.

    Args:
        number: the number of the open file.
        path: its path.
        target: its path from now on.
        durable: whether it is to be there after a power failure.
    """
    if durable:
        synchronise(number)
    os.replace(path, target)
    if durable:
        with open_folder(target.parent) as folder:
            synchronise(folder)


def write_whole(target: Path, data: bytes | memoryview, durable: bool = False) -> None:
    """Writes a file whole or not at all, readable for this user alone.

    Args:
        target: its path. A file that is there is replaced.
        data: its content.
        durable: whether it is to be there after a power failure.
    """
    number, path = create(target.parent)
    try:
        write_all(number, data)
        put_in_place(number, path, target, durable)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(number)


@contextlib.contextmanager
def open_folder(folder: Path) -> Iterator[int]:
    """Opens a folder, to synchronise what names it has.

    Args:
        folder: the folder.
    """
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield number
    finally:
        os.close(number)


def synchronise(number: int) -> None:
    """Waits until an open file or folder is on the disk.

    Args:
        number: its number.
    """
    whole = getattr(fcntl, "F_FULLFSYNC", None)  # on macOS `fsync` leaves it in the disk's cache
    if whole is not None:
        with contextlib.suppress(OSError):  # not every file system has it
            fcntl.fcntl(number, whole)
            return
    os.fsync(number)
