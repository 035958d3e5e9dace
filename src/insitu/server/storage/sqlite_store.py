"""The store of a server on one machine: a SQLite file with a log beside it.

One thread uses it: the loop of the front. A transaction takes some tens of microseconds. What was
committed survives when the process is killed; with `durable` what was accepted, and what has
become of it, survives a power failure too. Files are not its business, nor is it the store's to
see that no other server has its folder: see `files.py` and `data_folder.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import msgspec

from insitu.remote.problems import Problem
from insitu.remote.protocol import ENDS, JobEvent, JobState
from insitu.server.records import JobRecord, Key, Tenant
from insitu.server.states import MOST_ATTEMPTS, has_ended, may_follow
from insitu.server.storage.sqlite_database import Database
from insitu.server.storage.store_clock import StoreClock
from insitu.server.storage.store_rows import (
    COLUMNS,
    differences,
    job_of,
    key_of,
    key_row,
    moved,
    row_of,
    tenant_of,
    tenant_row,
    text,
)

_DAY = 24 * 3600
_MOST_FORGOTTEN = 1_000
_USE_SECONDS = 60.0  # the use of a blob is written down no more often
_HELD = "('leased', 'running')"
_OPEN = "('queued', 'leased', 'running')"
_ENDED = f"({', '.join(map(repr, sorted(ENDS)))})"
_AMOUNTS = ("operations", "seconds", "received", "sent")
_ADD_EVENT = """insert into events
    select sequence,
        (select coalesce(max(number), 0) + 1 from events where job = jobs.sequence), ?, ?
    from jobs where id = ?"""

_data_of = msgspec.json.Decoder(dict[str, Any]).decode


class SqliteStore:
    """A `Store` in a SQLite file; see there for its methods.

    Args:
        path: the file, in a data folder that this server has locked.
        durable: whether jobs and their ends survive a power failure. Progress and tokens survive
            the end of the process only: a job that was running then is run again.
        clock: the time; see `StoreClock`.

    Raises:
        LoadError: if the file cannot be used, or if a newer Insitu has made it.
    """

    def __init__(
        self, path: Path, durable: bool = False, clock: Callable[[], float] | None = None
    ) -> None:
        self._clock = StoreClock() if clock is None else clock
        self._db = Database(path, durable, self._clock)

    def now(self) -> float:
        """As of `Store`."""
        return self._clock()

    def close(self) -> None:
        """As of `Store`."""
        self._db.close()

    def together(self, cheaply: bool = False) -> AbstractContextManager[object]:
        """As of `Store`."""
        return self._db.change(cheaply)

    # Tenants and keys.

    def put_tenant(self, tenant: Tenant) -> None:
        """As of `Store`."""
        with self._db.change() as db:
            db.execute("insert or replace into tenants values (?, ?, ?, ?, ?)", tenant_row(tenant))

    def tenant(self, id: str) -> Tenant | None:
        """As of `Store`."""
        rows = self._db.rows("select * from tenants where id = ?", (id,))
        return tenant_of(rows[0]) if rows else None

    def tenants(self) -> Sequence[Tenant]:
        """As of `Store`."""
        return [tenant_of(row) for row in self._db.rows("select * from tenants order by id")]

    def put_key(self, key: Key) -> None:
        """As of `Store`."""
        with self._db.change() as db:
            db.execute("insert or replace into keys values (?, ?, ?, ?, ?, ?)", key_row(key))

    def key(self, prefix: str) -> Key | None:
        """As of `Store`."""
        rows = self._db.rows("select * from keys where prefix = ?", (prefix,))
        return key_of(rows[0]) if rows else None

    def keys(self) -> Sequence[Key]:
        """As of `Store`."""
        return [key_of(row) for row in self._db.rows("select * from keys order by prefix")]

    # Jobs.

    def add(self, job: JobRecord) -> JobRecord:
        """As of `Store`; the time of the job is the store's.

        Raises:
            StorageError: if the disk is full.
        """
        if job.state != "queued":
            raise ValueError(f"a new job is 'queued', not {job.state!r}")
        with self._db.change() as db:
            found = self.sent(job.tenant, job.idempotency)
            if found is not None:
                return found
            row = {**row_of(job), "created": self.now()}
            names = ", ".join(row)
            marks = ", ".join("?" * len(row))
            done = db.execute(f"insert into jobs ({names}) values ({marks})", [*row.values()])
            sequence = cast(int, done.lastrowid)
            for digest in dict.fromkeys(job.price.blobs):
                db.execute("insert into needs values (?, ?)", (sequence, digest))
            self._tell_state(job.id, "queued", job.attempt)
            return self._jobs("sequence = ?", (sequence,))[0]

    def sent(self, tenant: str, idempotency: str) -> JobRecord | None:
        """As of `Store`."""
        where = "tenant = ? and idempotency = ? and idempotency <> ''"
        found = self._jobs(where, (tenant, idempotency))
        return found[0] if found else None

    def job(self, id: str) -> JobRecord | None:
        """As of `Store`."""
        found = self._jobs("id = ?", (id,))
        return found[0] if found else None

    def jobs(
        self,
        tenant: str | None = None,
        states: Collection[JobState] = (),
        before: int | None = None,
        limit: int = 100,
    ) -> Sequence[JobRecord]:
        """As of `Store`."""
        conditions: dict[str, Sequence[Any]] = {}
        if tenant is not None:
            conditions["tenant = ?"] = [tenant]
        if states:
            conditions[f"state in ({', '.join('?' * len(states))})"] = [*states]
        if before is not None:
            conditions["sequence < ?"] = [before]
        where = " and ".join(conditions) or "true"
        given = [value for values in conditions.values() for value in values]
        return self._jobs(f"{where} order by sequence desc limit ?", [*given, limit])

    def waiting(self, model: str) -> Sequence[JobRecord]:
        """As of `Store`."""
        return self._jobs("state = 'queued' and model = ? order by sequence", (model,))

    def ahead(self, job: JobRecord) -> int:
        """As of `Store`."""
        command = "select count(*) from jobs where state = 'queued' and model = ? and sequence < ?"
        return self._db.rows(command, (job.model, job.sequence))[0][0]

    def move(
        self,
        id: str,
        before: JobState,
        after: JobState,
        *,
        attempt: int | None = None,
        changes: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> JobRecord | None:
        """As of `Store`: a job that becomes "leased" begins another attempt with it.

        Raises:
            StorageError: if the disk is full. The job is where it was.
        """
        if not may_follow(before, after):
            raise ValueError(f"a job that is {before!r} cannot become {after!r}")
        with self._db.change():
            found = self.job(id)
            if found is None or found.state != before or attempt not in (None, found.attempt):
                return None
            return self._moved(found, after, changes, data)

    def renew(self, engine: str, seconds: float) -> int:
        """As of `Store`."""
        until = self.now() + seconds
        with self._db.change(cheaply=True) as db:
            command = f"update jobs set lease_until = ? where engine = ? and state in {_HELD}"
            return db.execute(command, (until, engine)).rowcount

    def overdue(self) -> Sequence[JobRecord]:
        """As of `Store`; so is a job that somebody has without a lease."""
        where = f"state in {_HELD} and coalesce(lease_until, 0) < ? order by sequence"
        return self._jobs(where, (self.now(),))

    def give_back(
        self, engine: str, company: Mapping[str, int], problem: Problem
    ) -> Sequence[JobRecord]:
        """As of `Store`. A job that `company` says nothing of is run with as many as before."""
        given: list[JobRecord] = []
        with self._db.change():
            where = f"engine = ? and state in {_HELD} order by sequence"
            for job in self._jobs(where, (engine,)):
                if job.attempt >= MOST_ATTEMPTS:
                    given.append(self._moved(job, "failed", {"problem": problem}))
                else:
                    most = {"company": company.get(job.id, job.company)}
                    given.append(self._moved(job, "queued", most))
        return given

    def forget(self, moment: float) -> Sequence[JobRecord]:
        """As of `Store`, the oldest 1,000 at most: others wait meanwhile. None that has not ended.

        Their files may be removed where `refers` says that nothing else needs them.
        """
        with self._db.change() as db:
            where = f"expires < ? and state in {_ENDED} order by expires limit ?"
            gone = self._jobs(where, (moment, _MOST_FORGOTTEN))
            for job in gone:
                db.execute("delete from events where job = ?", (job.sequence,))
                db.execute("delete from jobs where sequence = ?", (job.sequence,))
        return gone

    # Events.

    def tell(
        self, id: str, kind: str, data: Mapping[str, Any], attempt: int | None = None
    ) -> JobEvent | None:
        """As of `Store`; None also if the job has ended, or is in another attempt."""
        only = f"state in {_OPEN} and (? is null or attempt = ?) returning number"
        given = (kind, text(data), id, attempt, attempt)
        rows = self._db.change_cheaply(f"{_ADD_EVENT} and {only}", given)
        return JobEvent(rows[0][0], cast(Any, kind), data) if rows else None

    def events(self, id: str, after: int = 0, limit: int = 1000) -> Sequence[JobEvent]:
        """As of `Store`."""
        rows = self._db.rows(
            """select number, kind, data from events
            where job = (select sequence from jobs where id = ?) and number > ?
            order by number limit ?""",
            (id, after, limit),
        )
        return [JobEvent(number, kind, _data_of(data)) for number, kind, data in rows]

    # Blobs and files.

    def grant(self, tenant: str, digest: str, size: int) -> None:
        """As of `Store`."""
        with self._db.change() as db:
            db.execute(
                """insert into grants values (?, ?, ?, ?)
                on conflict (tenant, digest) do update set used = excluded.used""",
                (tenant, digest, size, self.now()),
            )

    def has_blob(self, tenant: str, digest: str) -> bool:
        """As of `Store`."""
        where = "where tenant = ? and digest = ?"
        rows = self._db.rows(f"select used from grants {where}", (tenant, digest))
        now = self.now()
        if rows and now - rows[0][0] > _USE_SECONDS:
            with self._db.change(cheaply=True) as db:
                db.execute(f"update grants set used = ? {where}", (now, tenant, digest))
        return bool(rows)

    def release(self, moment: float) -> Sequence[str]:
        """As of `Store`."""
        with self._db.change() as db:
            digests = {
                digest
                for (digest,) in db.execute(
                    """delete from grants
                    where used < ? and digest not in (select digest from needs)
                    returning digest""",
                    (moment,),
                ).fetchall()
            }
        return sorted(digest for digest in digests if not self.refers(digest))

    def refers(self, digest: str) -> bool:
        """As of `Store`."""
        (found,) = self._db.rows(
            """select exists (select 1 from jobs where body = ?1)
            or exists (select 1 from jobs where result = ?1 and result <> '')
            or exists (select 1 from grants where digest = ?1)
            or exists (select 1 from needs where digest = ?1)""",
            (digest,),
        )
        return bool(found[0])

    def reserved(self) -> float:
        """As of `Store`."""
        return self._db.rows(f"select total(reserved) from jobs where state in {_OPEN}")[0][0]

    # Usage.

    def used(self, tenant: str, **amounts: float) -> None:
        """As of `Store`.

        Raises:
            ValueError: if there is no amount of such a name.
        """
        if wrong := amounts.keys() - set(_AMOUNTS):
            raise ValueError(f"nothing is counted as {sorted(wrong)}: {_AMOUNTS}")
        names = ", ".join(_AMOUNTS)
        sums = ", ".join(f"{name} = {name} + excluded.{name}" for name in _AMOUNTS)
        given = [amounts.get(name, 0.0) for name in _AMOUNTS]
        with self._db.change(cheaply=True) as db:
            db.execute(
                f"""insert into spent (tenant, day, {names}) values (?, ?, ?, ?, ?, ?)
                on conflict (tenant, day) do update set {sums}""",
                (tenant, self._day(), *given),
            )

    def usage(self, tenant: str) -> Mapping[str, float]:
        """As of `Store`."""
        spent = self._db.rows(
            f"select {', '.join(_AMOUNTS)} from spent where tenant = ? and day = ?",
            (tenant, self._day()),
        )
        ((queued, running, reserved, stored),) = self._db.rows(
            f"""select total(state = 'queued'), total(state <> 'queued'), total(reserved),
                coalesce((select bytes from stored where tenant = ?1), 0)
            from jobs where tenant = ?1 and state in {_OPEN}""",
            (tenant,),
        )
        return {
            **dict(zip(_AMOUNTS, spent[0] if spent else [0.0] * len(_AMOUNTS), strict=True)),
            "queued": queued,
            "running": running,
            "stored": stored,
            "reserved": reserved,
        }

    def strike(self, tenant: str) -> int:
        """As of `Store`.

        Raises:
            KeyError: if there is no such tenant.
        """
        with self._db.change() as db:
            command = "update tenants set strikes = strikes + 1 where id = ? returning strikes"
            rows = db.execute(command, (tenant,)).fetchall()
        if not rows:
            raise KeyError(tenant)
        return rows[0][0]

    # What the methods are made of.

    def _jobs(self, where: str, given: Sequence[Any]) -> list[JobRecord]:
        return [
            job_of(row) for row in self._db.rows(f"select {COLUMNS} from jobs where {where}", given)
        ]

    def _day(self) -> int:
        return int(self.now() // _DAY)

    def _moved(
        self,
        job: JobRecord,
        after: JobState,
        changes: Mapping[str, Any] | None,
        data: Mapping[str, Any] | None = None,
    ) -> JobRecord:
        """Writes that a job goes to another state, in the transaction that is open."""
        changed = moved(job, after, self.now(), changes)
        columns = differences(job, changed)
        sets = ", ".join(f"{name} = ?" for name in columns)
        self._db.rows(
            f"update jobs set {sets} where sequence = ?", (*columns.values(), job.sequence)
        )
        if has_ended(after):
            self._db.rows("delete from needs where job = ?", (job.sequence,))
        self._tell_state(job.id, after, changed.attempt, data)
        return changed

    def _tell_state(
        self, id: str, state: JobState, attempt: int, data: Mapping[str, Any] | None = None
    ) -> None:
        """Adds the event of a state, in the transaction that is open."""
        said = {**(data or {}), "state": state, "attempt": attempt}
        self._db.rows(_ADD_EVENT, ("state", text(said), id))
