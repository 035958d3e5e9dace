"""The folder in which clients keep what servers have sent, and servers leave their keys."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from insitu.graph.errors import LoadError, SaveError
from insitu.graph.location import here

_OTHERS = 0o077
"""The permissions of everybody but the owner."""


def cache_folder(*parts: str) -> Path | None:
    """Returns a folder of Insitu's in the user's cache, which need not exist.

    Args:
        parts: the names of the folders in it.

    Returns:
        The folder; None for a user without a home.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if not base or not os.path.isabs(base):
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            return None
    return Path(base, "insitu", *parts)


def made_private(folder: Path) -> Path:
    """Makes a folder that nobody but the user can enter, if it is not there yet.

    Args:
        folder: the folder.

    Raises:
        SaveError: if it cannot be made.
        LoadError: if it is there, and is another user's or open to others.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        check_private(folder, os.lstat(folder))
    except OSError as error:
        if isinstance(error, LoadError):
            raise
        raise SaveError(f"The folder '{folder}' cannot be made: {error}.", here()) from None
    return folder


def check_private(path: Path, state: os.stat_result) -> None:
    """Raises if a file or a folder is not the user's alone.

    Args:
        path: the file or folder.
        state: its state.

    Raises:
        LoadError: if it is a link, another user's, or if others may read it or write to it.
    """
    if not hasattr(os, "getuid"):  # Windows has other permissions, of which these say nothing
        return
    if stat.S_ISLNK(state.st_mode):
        raise LoadError(f"'{path}' is a link, so it is not used. Remove it.", here())
    if state.st_uid != os.getuid():
        raise LoadError(f"'{path}' is another user's, so it is not used.", here())
    if state.st_mode & _OTHERS:
        mode = "700" if stat.S_ISDIR(state.st_mode) else "600"
        raise LoadError(
            f"Other users have access to '{path}', so it is not used: "
            f"`chmod {mode} '{path}'`, if you trust its content.",
            here(),
        )
