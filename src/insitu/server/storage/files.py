"""The files of a server: bodies of jobs, results, and tensors that were sent apart.

Each is named by its digest and written whole or not at all. A process that is killed leaves at
most a temporary file, which the next server removes. Which files are needed is the store's to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from insitu.remote.problems import Problem, ProblemError
from insitu.server.storage.blob_format import check_blob
from insitu.server.storage.data_folder import (
    TEMPORARY,
    StorageError,
    full_disk_is_a_problem,
    make_private,
    write_whole,
)

SPARE_BYTES = 64 * 2**20
"""Space that is left free, for the store's own file and for what was not known before."""

QUICK_BYTES = 256 * 2**10
"""So much is written, or read, in less time than it takes to let a thread do it."""

_GRACE_SECONDS = 3600.0
_FILES_IN_TURN = 100
_DIGEST = re.compile(r"[0-9a-f]{64}")


async def digest_in_turn(data: bytes) -> str:
    """Returns the SHA-256 digest of the bytes of a job; in a thread of its own if there are many.

    Args:
        data: the bytes.
    """
    if len(data) <= QUICK_BYTES:
        return hashlib.sha256(data).hexdigest()
    return (await asyncio.to_thread(hashlib.sha256, data)).hexdigest()


class Files:
    """The files of a server in its data folder.

    The methods may be called in any thread. A body or a blob is there before the store is told of
    it, so for a while nothing refers to it: see `sweep`.

    Args:
        folder: the data folder, which this server has locked: temporary files in it are removed.
        durable: whether what was written is there after a power failure.

    Attributes:
        folder: as given.
        durable: as given.
        bodies: the folder of the bodies of jobs.
        results: the folder of results. Engines write there with `put_result`.
        blobs: the folder of tensors.
    """

    def __init__(self, folder: Path, durable: bool = False) -> None:
        self.folder, self.durable = folder, durable
        self.bodies, self.results, self.blobs = (
            folder / name for name in ("bodies", "results", "blobs")
        )
        make_private(folder)
        for one in self._folders:
            make_private(one)
            for path in one.glob(f"{TEMPORARY}*"):
                path.unlink(missing_ok=True)

    def put_body(self, data: bytes, digest: str = "") -> str:
        """Writes the bytes of a job.

        Args:
            data: the bytes.
            digest: their SHA-256 digest, "" if it is not known.

        Returns:
            Their digest.

        Raises:
            StorageError: if the disk is full.
        """
        digest = digest or hashlib.sha256(data).hexdigest()
        with full_disk_is_a_problem("the job"):
            # Also if there is one: after a power failure it may be there and be empty.
            write_whole(self.bodies / digest, data, self.durable)
        return digest

    async def put_body_in_turn(self, data: bytes, digest: str) -> None:
        """Does what `put_body` does, in a thread of its own if that takes a while.

        Args:
            data: the bytes.
            digest: as of `put_body`.
        """
        if len(data) <= QUICK_BYTES and not self.durable:  # a thread would take longer
            self.put_body(data, digest)
        else:
            await asyncio.to_thread(self.put_body, data, digest)

    def body_path(self, digest: str) -> Path:
        """Returns where the bytes of a job are.

        Args:
            digest: their digest.

        Raises:
            ProblemError: 422 if it is no digest.
        """
        return self.bodies / checked(digest)

    def result_path(self, digest: str) -> Path:
        """Returns where results are; as `body_path`."""
        return self.results / checked(digest)

    def blob_path(self, digest: str) -> Path:
        """Returns where a tensor is; as `body_path`."""
        return self.blobs / checked(digest)

    def put_blob(self, digest: str, data: bytes | memoryview) -> None:
        """Writes a tensor, if it is what its digest says.

        It is looked at also if the tensor is there: who does not have it must not get it by
        naming it.

        Args:
            digest: the digest of the tensor, as in `Job.tensors`.
            data: the bytes of a safetensors file with one tensor, "tensor".

        Raises:
            ProblemError: 422 "digest" or "blob" if they are not what the digest says.
            StorageError: if the disk is full.
        """
        target = self.blob_path(digest)
        check_blob(digest, memoryview(data))
        with full_disk_is_a_problem("the tensor"):
            write_whole(target, data, self.durable)

    def check_space(self, wanted: int, reserved: float = 0.0) -> None:
        """Raises if the disk has no space for something.

        Args:
            wanted: how many bytes it takes.
            reserved: how many bytes are promised already: results of jobs to come.

        Raises:
            StorageError: in that case.
        """
        free = self.free_bytes() - reserved - SPARE_BYTES
        if wanted > free:
            raise StorageError(
                f"The job and its results may take {wanted:,} bytes, and the disk of the server "
                f"has {max(int(free), 0):,} bytes to give: save less, or try again when results "
                "of others have been deleted."
            )

    def free_bytes(self) -> int:
        """Returns how many bytes the disk has for this user."""
        state = os.statvfs(self.bodies)
        return state.f_bavail * state.f_frsize

    def remove(self, path: Path) -> None:
        """Removes a file that nothing refers to any more. Who reads it can go on.

        Args:
            path: the file, of `body_path`, `result_path` or `blob_path`.
        """
        path.unlink(missing_ok=True)

    def remove_unneeded(self, paths: Iterable[Path], refers: Callable[[str], bool]) -> None:
        """Removes files that nothing refers to any more, unless they were written lately.

        Args:
            paths: the files; those that are not there count as removed.
            refers: as of `sweep`.
        """
        youngest = time.time() - _GRACE_SECONDS
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < youngest:
                    _removed(path, refers)

    def sweep(self, refers: Callable[[str], bool], grace: float = _GRACE_SECONDS) -> int:
        """Removes all files that nothing refers to.

        A file that is written while this runs may not be referred to yet. Hence the grace, and
        hence a job is accepted, or done, only after a look in the same turn of the loop whether
        its file is there.

        Args:
            refers: returns whether something refers to a digest: `Store.refers`.
            grace: for how many seconds a file is left alone. 0 when a server starts: nothing is
                under way then.

        Returns:
            How many files were removed.
        """
        return sum(_removed(path, refers) for path in self.older_than(grace))

    async def sweep_in_turns(
        self, refers: Callable[[str], bool], grace: float = _GRACE_SECONDS
    ) -> int:
        """Does what `sweep` does, and lets others have their turn.

        The store is asked in the loop, which it belongs to, and a file that it says is not needed
        is removed in the same turn.

        Args:
            refers: as of `sweep`.
            grace: as of `sweep`.

        Returns:
            How many files were removed.
        """
        removed = 0
        for number, path in enumerate(await asyncio.to_thread(self.older_than, grace), 1):
            removed += _removed(path, refers)
            if number % _FILES_IN_TURN == 0:
                await asyncio.sleep(0)
        return removed

    def older_than(self, grace: float) -> list[Path]:
        """Returns all files that were written some time ago.

        Args:
            grace: how many seconds ago; 0 for all files.
        """
        found: list[Path] = []
        youngest = time.time() - grace if grace else math.inf
        for folder in self._folders:
            with os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # an engine has renamed it
                        if entry.stat(follow_symlinks=False).st_mtime < youngest:
                            found.append(Path(entry.path))
        return found

    def sizes(self) -> dict[str, int]:
        """Returns how many bytes there are of each kind of file, by the name of its folder."""
        found: dict[str, int] = {}
        for folder in self._folders:
            found[folder.name] = 0
            with os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        found[folder.name] += entry.stat(follow_symlinks=False).st_size
        return found

    @property
    def _folders(self) -> tuple[Path, Path, Path]:
        return self.bodies, self.results, self.blobs


def _removed(path: Path, refers: Callable[[str], bool]) -> bool:
    """Removes a file if nothing refers to it, and returns whether it did."""
    if not path.name.startswith(TEMPORARY) and refers(path.name):
        return False
    path.unlink(missing_ok=True)
    return True


def put_result(folder: Path, data: bytes, digest: str = "", durable: bool = False) -> str:
    """Writes results, for a process that has nothing but the folder.

    Args:
        folder: the folder of results.
        data: the bytes of the results.
        digest: their SHA-256 digest, "" if it is not known.
        durable: whether they are to be there after a power failure.

    Returns:
        Their digest.

    Raises:
        StorageError: if the disk is full.
    """
    digest = digest or hashlib.sha256(data).hexdigest()
    with full_disk_is_a_problem("the results"):
        write_whole(folder / checked(digest), data, durable)
    return digest


def checked(digest: str) -> str:
    """Returns a digest, which is the name of a file, if it is one.

    Args:
        digest: what may be one.

    Raises:
        ProblemError: 422 "digest" if it is not.
    """
    if not _DIGEST.fullmatch(digest):
        raise ProblemError(
            Problem(
                "digest",
                "No digest",
                422,
                f"{digest[:80]!r} is no digest: it has 64 hexadecimal digits in small letters.",
            )
        )
    return digest
