"""The tables of `SqliteStore`, and how its file is opened.

A table of jobs has the fields of `JobRecord` as its columns. What a tenant has stored is added up
by triggers, so it is right after every change, and costs no look at all of its jobs.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from insitu.graph.errors import LoadError

VERSION = 1
"""The version of the tables. A file of a newer one is refused, an older one is brought up."""

_APPLICATION = 0x494E5349  # "INSI"
_OLDEST_SQLITE = (3, 35)  # the first with `returning`
_BUSY_MILLISECONDS = 5_000

_TABLES = """
create table meta (name text primary key, value) without rowid;

create table tenants (
    id text primary key,
    name text not null,
    weight real not null,
    limits text not null,
    strikes integer not null
) without rowid;

create table keys (
    prefix text primary key,
    digest text not null,
    tenant text not null,
    scopes text not null,
    expires real,
    revoked integer not null
) without rowid;

create table jobs (
    sequence integer primary key autoincrement,
    id text not null unique,
    tenant text not null,
    model text not null,
    state text not null,
    priority text not null,
    body text not null,
    price text not null,
    attempt integer not null,
    company integer not null,
    seconds real,
    created real not null,
    started real,
    ended real,
    expires real,
    engine text not null,
    lease_until real,
    idempotency text not null,
    result text not null,
    result_bytes integer not null,
    problem text,
    body_bytes integer not null,
    reserved real not null
);
create unique index jobs_by_idempotency on jobs (tenant, idempotency) where idempotency <> '';
create index jobs_by_state on jobs (state, model, sequence);
create index jobs_by_tenant on jobs (tenant, state, sequence, reserved);
create index jobs_by_end on jobs (expires) where expires is not null;
create index jobs_by_body on jobs (body);
create index jobs_by_result on jobs (result) where result <> '';

create table events (
    job integer not null,
    number integer not null,
    kind text not null,
    data text not null,
    primary key (job, number)
) without rowid;

create table grants (
    tenant text not null,
    digest text not null,
    size integer not null,
    used real not null,
    primary key (tenant, digest)
) without rowid;
create index grants_by_digest on grants (digest);

create table needs (
    job integer not null,
    digest text not null,
    primary key (job, digest)
) without rowid;
create index needs_by_digest on needs (digest);

create table spent (
    tenant text not null,
    day integer not null,
    operations real not null default 0,
    seconds real not null default 0,
    received real not null default 0,
    sent real not null default 0,
    primary key (tenant, day)
) without rowid;

create table stored (tenant text primary key, bytes integer not null) without rowid;

create trigger job_added after insert on jobs begin
    insert into stored values (new.tenant, new.body_bytes + new.result_bytes)
        on conflict (tenant) do update set bytes = bytes + excluded.bytes;
end;
create trigger job_changed after update of result_bytes, body_bytes on jobs begin
    update stored
        set bytes = bytes + new.body_bytes + new.result_bytes - old.body_bytes - old.result_bytes
        where tenant = new.tenant;
end;
create trigger job_deleted after delete on jobs begin
    update stored set bytes = bytes - old.body_bytes - old.result_bytes
        where tenant = old.tenant;
end;
create trigger grant_added after insert on grants begin
    insert into stored values (new.tenant, new.size)
        on conflict (tenant) do update set bytes = bytes + excluded.bytes;
end;
create trigger grant_deleted after delete on grants begin
    update stored set bytes = bytes - old.size where tenant = old.tenant;
end;
"""


def opened(path: Path) -> sqlite3.Connection:
    """Opens the file of a store, and makes it if it is not there.

    Args:
        path: the file. It is made so that only this user can read it.

    Returns:
        The connection, in which every statement outside of a transaction is one.

    Raises:
        LoadError: if it is no file of a store, if a newer Insitu has made it, or if its folder is
            on a disk where SQLite cannot keep a log (that of another machine).
    """
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise LoadError(
            f"A server takes SQLite 3.35 or newer, and Python has {sqlite3.sqlite_version} here: "
            "install a newer Python."
        )
    # SQLite gives the files that it makes beside this one the same mode.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    db = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_MILLISECONDS / 1000)
    try:
        _prepare(db, path)
    except sqlite3.DatabaseError as error:
        db.close()
        raise LoadError(f"The store {str(path)!r} cannot be opened: {error}.") from error
    except BaseException:
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    if db.execute("pragma journal_mode = wal").fetchone()[0] != "wal":
        raise LoadError(
            f"SQLite cannot keep a log beside {str(path)!r}: give a data folder on a disk of this "
            "machine with `--data`."
        )
    db.execute("begin immediate")  # two that begin with one file: the second finds the tables
    try:
        (version,) = db.execute("pragma user_version").fetchone()
        (application,) = db.execute("pragma application_id").fetchone()
        (tables,) = db.execute("select count(*) from sqlite_master").fetchone()
        if tables and application != _APPLICATION:
            raise LoadError(f"{str(path)!r} is the database of another program.")
        if version > VERSION:
            raise LoadError(
                f"The store {str(path)!r} is in version {version} of its format, and this Insitu "
                f"reads version {VERSION}: install the Insitu that made it, or give another data "
                "folder with `--data`."
            )
        if not tables:
            # Not `executescript`: it would commit what has begun.
            for statement in statements(_TABLES):
                db.execute(statement)
            db.execute(f"pragma application_id = {_APPLICATION}")
            db.execute(f"pragma user_version = {VERSION}")
        db.execute("commit")
    except BaseException:
        db.execute("rollback")
        raise


def statements(script: str) -> list[str]:
    """Returns the statements of a script.

    Args:
        script: the script; a line with a semicolon at its end may end a statement.
    """
    found: list[str] = []
    pending = ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            found.append(pending.strip())
            pending = ""
    return found
