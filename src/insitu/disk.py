"""Files, written whole or not at all and read only where they are plain files.

Everything that Insitu writes or reads by itself goes through `write` and `read`: edits, results,
vectors, pages and pictures. The content of a file is not the business of this module.
"""

from __future__ import annotations

import contextlib
import os
import stat
from uuid import uuid4

from insitu.graph.errors import LoadError, OptionError, SaveError
from insitu.graph.location import here

_NEW = 0o666
"""The mode of a new file before the umask."""

_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_BINARY = getattr(os, "O_BINARY", 0)  # without it, Windows changes line ends


def check_target(path: str | os.PathLike[str]) -> None:
    """Raises if a file cannot be written, before there is anything to write.

    Args:
        path: where a file is going to be written.

    Raises:
        OptionError: if the folder does not exist, or the path is a folder.
        SaveError: if the file or its folder is read-only.
    """
    _target(path)


def write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes a file whole or not at all.

    The data goes to a new file beside the target, which then takes its place. A file that is
    replaced keeps its mode and its owner, and a symbolic link stays and its target is replaced. A
    device or a pipe, such as `/dev/stdout`, is written into.

    Args:
        path: where to.
        data: the content. Text is written as UTF-8.

    Raises:
        OptionError: if the folder does not exist, or the path is a folder.
        SaveError: if the file cannot be written. A file that was there is as it was.
    """
    content = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    target, there = _target(path)
    try:
        if there is not None and not stat.S_ISREG(there.st_mode):
            with open(target, "wb") as file:
                file.write(content)
        else:
            _replace(target, there, content)
    except OSError as error:
        raise SaveError(f"{os.fspath(path)!r} cannot be written: {_said(error)}.", here()) from None


def read(path: str | os.PathLike[str], largest: int | None = None) -> bytes:
    """Returns the content of a file.

    Args:
        path: the file.
        largest: how many bytes it may have; None for any number.

    Raises:
        LoadError: if there is no such file, if it is a folder, a pipe or a device, or if it is
            larger.
    """
    check_readable(path)
    try:
        # Without `O_NONBLOCK` opening a pipe waits until somebody writes into it.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _NO_WAIT)) as file:
            state = os.fstat(file.fileno())
            _check_regular(path, state)
            if largest is not None and state.st_size > largest:
                raise LoadError(
                    f"{os.fspath(path)!r} has {state.st_size} bytes, more than the {largest} that "
                    "such a file may have.",
                    here(),
                )
            return file.read()
    except LoadError:
        raise
    except OSError as error:
        raise LoadError(f"{os.fspath(path)!r} cannot be read: {_said(error)}.", here()) from None


def check_readable(path: str | os.PathLike[str]) -> None:
    """Raises if a path is no plain file that can be read, for libraries that open it themselves.

    Args:
        path: the file.

    Raises:
        LoadError: as of `read`.
    """
    try:
        _check_regular(path, os.stat(path))
    except LoadError:
        raise
    except (OSError, ValueError) as error:
        raise LoadError(f"{os.fspath(path)!r} cannot be read: {_said(error)}.", here()) from None


def _check_regular(path: str | os.PathLike[str], state: os.stat_result) -> None:
    if not stat.S_ISREG(state.st_mode):
        found = "a folder" if stat.S_ISDIR(state.st_mode) else "a pipe or a device"
        raise LoadError(
            f"{os.fspath(path)!r} cannot be read: it is {found}, not a regular file.", here()
        )


def _target(path: str | os.PathLike[str]) -> tuple[str, os.stat_result | None]:
    """The file that a path leads to over symbolic links, and its state if it exists."""
    try:
        target = os.path.realpath(path)
        folder = os.path.dirname(target)
        if not os.path.isdir(folder):
            raise OptionError(
                f"There is no folder {folder!r} to write {os.fspath(path)!r} to.", here()
            )
        try:
            there = os.stat(target)
        except FileNotFoundError:
            there = None
    except (OSError, ValueError) as error:
        if isinstance(error, OptionError):
            raise
        raise SaveError(f"{os.fspath(path)!r} cannot be written: {_said(error)}.", here()) from None
    if there is not None and stat.S_ISDIR(there.st_mode):
        raise OptionError(f"{os.fspath(path)!r} is a folder: name a file in it.", here())
    # A file that is read-only could still be replaced. Opening it to write would fail.
    if there is not None and not os.access(target, os.W_OK):
        raise SaveError(f"{os.fspath(path)!r} cannot be written: it is read-only.", here())
    regular = there is None or stat.S_ISREG(there.st_mode)
    if regular and not os.access(folder, os.W_OK | os.X_OK):
        raise SaveError(f"No file can be made in the folder {folder!r}.", here())
    return target, there


def _replace(target: str, there: os.stat_result | None, content: bytes) -> None:
    """Puts a complete file in the place of another."""
    mode = _NEW if there is None else stat.S_IMODE(there.st_mode)
    beside = os.path.join(os.path.dirname(target), f".insitu-{uuid4().hex}")
    # It is made with the mode that it is going to have: a private file is private from the start.
    number = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, mode)
    try:
        with open(number, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(number)  # else a power cut may leave the name with none of the data
        if there is not None:
            _keep_owner(beside, there)
            os.chmod(beside, mode)  # the umask took bits away, and so does a change of owner
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def _keep_owner(path: str, there: os.stat_result) -> None:
    """Gives a new file the owner and group of the old one, as far as the user may."""
    made = os.stat(path)
    if hasattr(os, "chown") and (made.st_uid, made.st_gid) != (there.st_uid, there.st_gid):
        with contextlib.suppress(OSError):
            os.chown(path, there.st_uid, there.st_gid)


def _said(error: Exception) -> str:
    """What the system says, without the number and the path."""
    return (getattr(error, "strerror", None) or str(error)).rstrip(".")
