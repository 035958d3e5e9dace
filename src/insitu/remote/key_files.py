"""The keys of servers on this machine, which the user who runs one need not copy.

A server writes its key to a file that only its user can read, and removes it when it ends. A
client of that user finds it by the port. The name of the machine is in the name of the file,
because several machines may share a home.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import stat
from pathlib import Path
from uuid import uuid4

from insitu.graph.errors import LoadError, SaveError
from insitu.graph.location import here
from insitu.remote.cache_folder import cache_folder, check_private, made_private

_LARGEST = 4096
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


def key_file(port: int) -> Path:
    """Returns the file for the key of the server on a port of this machine.

    Args:
        port: the port.

    Raises:
        LoadError: if the user has no home.
    """
    folder = cache_folder("servers")
    if folder is None:
        raise LoadError("There is no folder for keys, since the user has no home.", here())
    machine = re.sub(r"[^\w.-]", "-", platform.node()) or "localhost"
    return folder / f"{machine}-{port}.key"


def write_key(port: int, key: str) -> Path:
    """Leaves the key of a server for clients of the same user, and returns the file.

    Args:
        port: its port.
        key: the key.

    Raises:
        SaveError: if the file cannot be written.
        LoadError: if the folder is open to others.
    """
    path = key_file(port)
    made_private(path.parent)
    beside = path.with_name(f".{uuid4().hex}")
    try:
        number = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(number, "w", encoding="ascii") as file:
                file.write(f"{key}\n")
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise SaveError(f"'{path}' cannot be written: {error}.", here()) from None
    return path


def read_key(port: int) -> str | None:
    """Returns the key that a server on a port of this machine has left, None if none has.

    Args:
        port: the port.

    Raises:
        LoadError: if others could have read or written the file.
    """
    folder = cache_folder("servers")
    if folder is None:
        return None
    path = key_file(port)
    try:
        check_private(folder, os.lstat(folder))
        # The state is that of the file that is read, whatever has its name by then.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _NO_LINK)) as file:
            state = os.fstat(file.fileno())
            check_private(path, state)
            if not stat.S_ISREG(state.st_mode):
                raise LoadError(f"'{path}' is no file, so it is not used.", here())
            return file.read(_LARGEST).decode("ascii").strip() or None
    except FileNotFoundError:
        return None
    except LoadError:
        raise
    except (OSError, ValueError) as error:
        raise LoadError(f"The key in '{path}' cannot be read: {error}.", here()) from None


def forget_key(port: int, key: str) -> None:
    """Removes the key of a server, unless another one has since left its own.

    Args:
        port: its port.
        key: the key.
    """
    with contextlib.suppress(OSError):
        if read_key(port) == key:
            key_file(port).unlink()
