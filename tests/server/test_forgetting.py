"""What is deleted when its time is over, and what stays."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from insitu.server.forgetting import forget
from insitu.server.records import Tenant
from insitu.server.storage.files import Files, put_result
from insitu.server.storage.sqlite_store import SqliteStore
from tests.server.stores import new_job

pytestmark = pytest.mark.no_wire


def test_all_jobs_whose_time_is_over_go_with_the_files_that_are_theirs_alone(
    tmp_path: Path,
) -> None:
    now = [1000.0]
    files, changed = Files(tmp_path / "data"), list[str]()
    store = SqliteStore(tmp_path / "store", clock=lambda: now[0])
    store.put_tenant(Tenant("ada", "Ada"))
    bodies = [files.put_body(b"job %d" % number) for number in range(3)]
    results = [put_result(files.results, b"results %d" % number) for number in range(3)]
    added = []
    for number in range(2500):  # more than are deleted at once
        kind = 0 if number < 2499 else 1
        job = store.add(replace(new_job(), body=bodies[kind], expires=None))
        store.move(job.id, "queued", "leased", changes={"engine": "e", "lease_until": 1e9})
        store.move(job.id, "leased", "running")
        expires = 2000.0 if kind == 0 else 9000.0
        changes = {"result": results[kind], "result_bytes": 9, "expires": expires}
        store.move(job.id, "running", "done", changes=changes)
        added.append(job)
    for path in (*files.bodies.iterdir(), *files.results.iterdir()):
        if path.name not in (bodies[2], results[2]):
            os.utime(path, (1.0, 1.0))
    now[0] = 3000.0
    asyncio.run(forget(store, files, 1e9, changed.append))
    assert len(changed) == 2499 and [job.id for job in store.jobs()] == [added[-1].id]
    assert {path.name for path in files.bodies.iterdir()} == {bodies[1], bodies[2]}
    assert {path.name for path in files.results.iterdir()} == {results[1], results[2]}
    store.close()
