"""The folder of a harvest: begun, gone on with, and a shard at a time committed to it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Generator, Mapping
from pathlib import Path

import msgspec
import torch

from insitu import disk
from insitu.graph.errors import LoadError, OptionError, SaveError
from insitu.graph.location import here
from insitu.harvest.folder.manifest import append_line, read_manifest, replace_manifest, sync_folder
from insitu.harvest.folder.shard_file import Written, digest_of, write_shard
from insitu.harvest.layout import (
    LOCK,
    MANIFEST,
    SHARDS,
    SPECIFICATION,
    Line,
    shard_name,
)
from insitu.harvest.specification import Specification, differences

_TEMPORARY = ".new"
_SHARD = re.compile(r"\d{5,}\.safetensors(\.new)?(-\w+)?")
_NAMED = 4  # differences that a message names


class HarvestFolder:
    """A folder that this process has locked.

    Args:
        path: the folder, with a specification in it.
        lines: the lines of its manifest.

    Attributes:
        path: the same folder.
        lines: the same lines, and one more for each shard that is committed.
    """

    def __init__(self, path: Path, lines: list[Line]) -> None:
        self.path, self.lines = path, lines

    @property
    def is_complete(self) -> bool:
        """Whether nothing comes behind the last shard."""
        return bool(self.lines) and self.lines[-1].last

    def broken(self, closely: bool) -> list[int]:
        """Returns which shards are not there, or not as they were written.

        Args:
            closely: whether digests are compared, and not sizes only.
        """
        return [line.shard for line in self.lines if not self._is_good(line, closely)]

    def _is_good(self, line: Line, closely: bool) -> bool:
        path = self.path / shard_name(line.shard)
        try:
            if path.is_symlink() or path.stat().st_size != line.bytes:
                return False
            return not closely or digest_of(path) == line.sha256
        except OSError:
            return False

    def write(self, shard: int, tensors: Mapping[str, torch.Tensor], mark: str = "") -> Written:
        """Writes a shard to its temporary file.

        Args:
            shard: its number.
            tensors: its tensors.
            mark: the end of the file's name, where several processes write.

        Raises:
            SaveError: if it cannot be written, such as on a full disk. Nothing is left of it.
        """
        path = self._temporary(shard, mark)
        with told_errors(self.path):
            try:
                return write_shard(path, tensors)
            except BaseException:
                with contextlib.suppress(OSError):
                    path.unlink()
                raise

    def commit(self, line: Line, mark: str = "") -> None:
        """Lets a shard count that was written: from here on it stays if the process is killed.

        Args:
            line: its line. That of a shard which was broken takes the place of the old one.
            mark: as of `write`.

        Raises:
            SaveError: if that cannot be done.
        """
        name = self.path / shard_name(line.shard)
        with told_errors(self.path):
            os.replace(self._temporary(line.shard, mark), name)
            sync_folder(name.parent)
            if line.shard == len(self.lines):
                append_line(self.path, line)
                self.lines.append(line)
            elif self.lines[line.shard] != line:
                lines = [*self.lines]
                lines[line.shard] = line
                replace_manifest(self.path, lines)
                self.lines = lines

    def _temporary(self, shard: int, mark: str) -> Path:
        name = shard_name(shard) + _TEMPORARY + (f"-{mark}" if mark else "")
        return self.path / name


def check_folder(path: Path) -> None:
    """Raises if a folder cannot be that of a harvest, before there is anything to write.

    Args:
        path: the folder. It need not be there.

    Raises:
        OptionError: if it is something else, or holds other things.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise OptionError(f"'{path}' is no folder: give one, or none that exists.", here())
    own = {SPECIFICATION, LOCK, MANIFEST, SHARDS}
    with told_errors(path):
        others = sorted(one.name for one in path.iterdir() if one.name not in own)
    others = [one for one in others if not one.startswith(".insitu-")]
    if others and not (path / SPECIFICATION).exists():
        raise OptionError(
            f"The folder '{path}' holds other things, such as {others[0]!r}: give an empty one.",
            here(),
        )


def opened_folder(path: Path, specification: Specification) -> HarvestFolder:
    """Returns a folder as it is to be gone on with. The process holds its lock.

    Shards that the manifest does not list are removed: they were left by a process that was killed.

    Args:
        path: the folder.
        specification: of the harvest that goes on, or begins.

    Raises:
        OptionError: if the folder is of another specification, naming what differs.
        LoadError: if what it holds cannot be read.
        SaveError: if it cannot be written.
    """
    known = read_specification(path)
    if known is not None:
        _check_same(path, known, specification)
    lines, size = read_manifest(path)
    if known is None and lines:
        raise LoadError(f"'{path}' has shards and no {SPECIFICATION}: give another folder.", here())
    with told_errors(path):
        (path / SHARDS).mkdir(exist_ok=True)
        if known is None:
            disk.write(
                path / SPECIFICATION, msgspec.json.format(msgspec.json.encode(specification))
            )
        if (path / MANIFEST).exists() and (path / MANIFEST).stat().st_size != size:
            os.truncate(path / MANIFEST, size)
        listed = {Path(shard_name(line.shard)).name for line in lines}
        for one in (path / SHARDS).iterdir():
            if one.name not in listed and _SHARD.fullmatch(one.name):
                one.unlink()
        for one in path.glob(".insitu-*"):
            one.unlink()
        sync_folder(path)
    return HarvestFolder(path, lines)


def read_specification(path: Path) -> Specification | None:
    """Returns the specification of a folder, None if it has none.

    Args:
        path: the folder.

    Raises:
        LoadError: if it cannot be read.
    """
    file = path / SPECIFICATION
    if not file.exists():
        return None
    try:
        return msgspec.json.decode(disk.read(file, 1 << 24), type=Specification)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LoadError(f"'{file}' is no specification of a harvest: {error}.", here()) from None


def _check_same(path: Path, known: Specification, asked: Specification) -> None:
    found = list(differences(known, asked))
    if not found:
        return
    said = [f"{name} is {old!r:.80} there and {new!r:.80} here" for name, old, new in found]
    more = f", and {len(said) - _NAMED} more" if len(said) > _NAMED else ""
    raise OptionError(
        f"The folder '{path}' holds another harvest: {'; '.join(said[:_NAMED])}{more}. Ask for the "
        "same to go on with it, or give another folder.",
        here(),
    )


@contextlib.contextmanager
def told_errors(path: Path) -> Generator[None]:
    """Raises a `SaveError` in the place of what the system says of a folder.

    Args:
        path: the folder.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, SaveError | LoadError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        said = (error.strerror or str(error)).rstrip(".")
        why = f"there is no space left for it ({said})" if full else said
        raise SaveError(
            f"'{path}' cannot be written: {why}. Shards that are written stay, and the same call "
            "goes on behind them.",
            here(),
        ) from error
