"""Records as rows of tables and back, and what a job becomes when it goes to another state."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import msgspec

from insitu.remote.problems import Problem
from insitu.remote.protocol import JobState
from insitu.server.records import JobRecord, Key, Price, Tenant
from insitu.server.states import has_ended, may_follow

FIELDS = tuple(field.name for field in fields(JobRecord))
COLUMNS = ", ".join(FIELDS)
"""The columns of `job_of`, in their order."""

_FIXED = frozenset(("id", "tenant", "model", "body", "sequence", "created", "idempotency"))
_PRICE, _PROBLEM = FIELDS.index("price"), FIELDS.index("problem")
_MOST = sys.float_info.max

_encode = msgspec.json.Encoder().encode
_limits_of = msgspec.json.Decoder(dict[str, float | None]).decode
_scopes_of = msgspec.json.Decoder(frozenset[str]).decode
_price_of = msgspec.json.Decoder(Price).decode
_problem_of = msgspec.json.Decoder(Problem).decode


def job_of(row: Sequence[Any]) -> JobRecord:
    """Returns the job of a row.

    Args:
        row: its values, in the order of `COLUMNS`.
    """
    values = list(row)
    values[_PRICE] = _price_of(row[_PRICE])
    values[_PROBLEM] = None if row[_PROBLEM] is None else _problem_of(row[_PROBLEM])
    return JobRecord(*values)


def row_of(job: JobRecord) -> dict[str, Any]:
    """Returns the row of a new job: a value for each column, but that of its sequence.

    Args:
        job: the job.
    """
    row = {name: _value(getattr(job, name)) for name in FIELDS if name != "sequence"}
    # A float: a sum of whole numbers that is too large would be an error of SQLite's.
    return {**row, "reserved": float(min(job.price.result_bytes, 2**62))}


def moved(
    job: JobRecord, after: JobState, now: float, changes: Mapping[str, Any] | None = None
) -> JobRecord:
    """Returns what a job becomes when it goes to another state.

    Who takes a job in a lease begins another attempt with it. Who gives it back, or ends it, has
    it no longer.

    Args:
        job: the job as it is.
        after: the state that follows.
        now: the time.
        changes: other fields to set. They go before what the state says: an engine that gives a
            job back which it has not harmed may take the attempt back as well.

    Raises:
        ValueError: if the state may not follow, or if a change is of what stays as it is.
    """
    if not may_follow(job.state, after):
        raise ValueError(f"a job that is {job.state!r} cannot become {after!r}")
    said = dict(changes or {})
    if wrong := (said.keys() & _FIXED) | (said.keys() - set(FIELDS)) | (said.keys() & {"state"}):
        raise ValueError(f"a job that moves keeps, or does not have, {sorted(wrong)}")
    implied: dict[str, Any] = {"state": after}
    if after == "leased":
        implied["attempt"] = job.attempt + 1
    elif after == "running":
        implied["started"] = now
    else:
        implied |= {"engine": "", "lease_until": None}
    if has_ended(after):
        implied["ended"] = now
    return replace(job, **(implied | said))


def tenant_row(tenant: Tenant) -> tuple[Any, ...]:
    """Returns the row of a tenant.

    Args:
        tenant: the tenant.
    """
    # JSON has no infinity, which is no limit: that is null.
    finite = {name: one if math.isfinite(one) else None for name, one in tenant.limits.items()}
    return tenant.id, tenant.name, tenant.weight, text(finite), tenant.strikes


def tenant_of(row: Sequence[Any]) -> Tenant:
    """Returns the tenant of a row.

    Args:
        row: as of `tenant_row`.
    """
    id, name, weight, limits, strikes = row
    found = {key: math.inf if one is None else one for key, one in _limits_of(limits).items()}
    return Tenant(id, name, weight, found, strikes)


def key_row(key: Key) -> tuple[Any, ...]:
    """Returns the row of a key.

    Args:
        key: the key.
    """
    scopes = text(sorted(key.scopes))
    return key.prefix, key.digest, key.tenant, scopes, key.expires, key.revoked


def key_of(row: Sequence[Any]) -> Key:
    """Returns the key of a row.

    Args:
        row: as of `key_row`.
    """
    prefix, digest, tenant, scopes, expires, revoked = row
    return Key(prefix, digest, tenant, _scopes_of(scopes), expires, bool(revoked))


def differences(before: JobRecord, after: JobRecord) -> dict[str, Any]:
    """Returns the columns in which two records of a job differ, with the values of the second.

    Args:
        before: the first.
        after: the second.
    """
    pairs = ((name, getattr(before, name), getattr(after, name)) for name in FIELDS)
    return {name: _value(new) for name, old, new in pairs if old != new}


def _value(value: Any) -> Any:
    """The value of a field as the column has it."""
    if isinstance(value, Problem):
        names = ("found", "allowed", "retry_after")
        return text(
            msgspec.structs.replace(value, **{n: _finite(getattr(value, n)) for n in names})
        )
    if isinstance(value, Price):
        names = ("operations", "peak_bytes")
        return text(replace(value, **{n: _finite(getattr(value, n)) for n in names}))
    return value


def text(value: Any) -> str:
    """Returns a value as JSON.

    Args:
        value: the value.
    """
    return _encode(value).decode()


def _finite(number: float) -> float:
    """A number as JSON has it: a record with another one could not be read again."""
    return 0.0 if math.isnan(number) else min(max(number, -_MOST), _MOST)
