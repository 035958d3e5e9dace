"""A SQLite file with transactions that are whole or not at all, and a clock that goes on.

What the tables mean is the business of `sqlite_store.py`.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from insitu.server.storage.data_folder import StorageError
from insitu.server.storage.sqlite_schema import opened

_NOTE_SECONDS = 1.0  # the time is written down no more often
_TO_COME = (("jobs", "expires"), ("jobs", "lease_until"), ("grants", "used"))
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)
_PASSING = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR)
"""Of errors that pass: somebody else has the file, or the disk does not write, as with a quota."""


class Database:
    """The file of a store.

    Args:
        path: the file.
        durable: whether a change waits until it is on the disk.
        now: the time.

    Raises:
        LoadError: as of `opened`.
    """

    def __init__(self, path: Path, durable: bool, now: Callable[[], float]) -> None:
        self._now, self._durable = now, durable
        self._db = opened(path)
        self._db.execute(f"pragma synchronous = {'full' if durable else 'normal'}")
        self._db.execute(f"pragma fullfsync = {int(durable)}")
        self._noted = -math.inf
        self._is_open = False  # whether there is a transaction
        self._failed: BaseException | None = None
        self._go_on()

    def rows(self, command: str, given: Sequence[Any] = ()) -> list[Any]:
        """Returns what a statement gives.

        Args:
            command: the statement.
            given: what its question marks stand for.
        """
        # All at once: a reader that stops in the middle would keep the log from ending.
        return self._db.execute(command, given).fetchall()

    @contextlib.contextmanager
    def change(self, cheaply: bool = False) -> Iterator[sqlite3.Connection]:
        """A transaction that writes: all of it, or nothing if something is raised in it.

        One in another is a part of it, and an error that is raised in a part is raised by the whole
        too.

        Args:
            cheaply: whether it need not survive a power failure.

        Raises:
            StorageError: if the disk is full.
        """
        if self._is_open:
            with self._part():
                yield self._db
            return
        with self._lightly() if cheaply else contextlib.nullcontext(), _full_disk():
            # Whoever begins so waits for others. Who reads first and then writes would fail.
            self._db.execute("begin immediate")
            self._is_open, self._failed = True, None
            try:
                yield self._db
                if self._failed is not None:
                    raise self._failed
                self._note_time()
                self._db.execute("commit")
            except BaseException:
                if self._db.in_transaction:  # SQLite ends some of them by itself
                    self._db.execute("rollback")
                raise
            finally:
                self._is_open = False

    @contextlib.contextmanager
    def _part(self) -> Iterator[None]:
        """Remembers an error, so that the whole fails even if somebody suppresses that."""
        if self._failed is not None:  # SQLite may have ended the transaction
            raise self._failed
        try:
            with _full_disk():
                yield
        except BaseException as error:
            self._failed = error
            raise

    def change_cheaply(self, command: str, given: Sequence[Any]) -> list[Any]:
        """Runs one statement, which need not survive a power failure, and returns what it gives.

        Args:
            command: the statement.
            given: what its question marks stand for.

        Raises:
            StorageError: if the disk is full.
        """
        if self._is_open:
            with self._part():
                return self.rows(command, given)
        with self._lightly(), _full_disk():
            return self.rows(command, given)

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(StorageError, sqlite3.OperationalError):
            self._noted = -math.inf
            with self.change():
                pass
        self._db.close()

    @contextlib.contextmanager
    def _lightly(self) -> Iterator[None]:
        """Does not wait for the disk. The next change that does so brings the earlier ones too."""
        if not self._durable:
            yield
            return
        self._db.execute("pragma synchronous = normal")
        try:
            yield
        finally:
            self._db.execute("pragma synchronous = full")

    def _note_time(self) -> None:
        """Writes down the time for the next server; see `_go_on`."""
        now = self._now()
        if now - self._noted >= _NOTE_SECONDS:
            self._db.execute("insert or replace into meta values ('time', ?)", (now,))
            self._noted = now

    def _go_on(self) -> None:
        """Moves all that is to come by the time that has passed since the last server, if any.

        Nobody could fetch results in that time, and a clock that was set looks the same.
        """
        with self.change() as db:
            rows = self.rows("select value from meta where name = 'time'")
            passed = self._now() - rows[0][0] if rows else 0.0
            for table, name in _TO_COME if passed else ():
                db.execute(
                    f"update {table} set {name} = {name} + ? where {name} is not null", (passed,)
                )


@contextlib.contextmanager
def _full_disk() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode in _FULL:
            raise StorageError("The disk of the server is full: no space for its store.") from error
        if error.sqlite_errorcode & 0xFF in _PASSING:
            raise StorageError(f"The store of the server cannot be written: {error}.") from error
        raise
