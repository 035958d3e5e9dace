"""The template that workers are forked from, killed while it starts."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from insitu import LoadError
from insitu.server.engines.admission import AdmissionSettings
from insitu.server.engines.admission_pool import Admission


def admission(place: str, folder: Path) -> Admission:
    settings = AdmissionSettings("model", place, {}, 10.0, 2**31, str(folder / "skeleton"))
    return Admission(settings, 1, 10.0)


async def started(one: Admission, kills: int) -> int:
    """Starts it while its template is killed so often; returns the number of the last one."""
    starting = asyncio.ensure_future(one.start())
    killed = 0
    try:
        for _ in range(kills):
            while one.template in (None, killed):
                await asyncio.sleep(0.01)
            killed = one.template or 0
            os.kill(killed, signal.SIGKILL)
        await starting
        return one.template or 0
    finally:
        starting.cancel()
        await one.stop()


@pytest.mark.thorough
def test_a_template_that_is_killed_as_it_starts_is_started_again(tmp_path: Path) -> None:
    assert asyncio.run(started(admission("insitu/eiffel", tmp_path), 1)) > 0
    assert (tmp_path / "skeleton").exists()


@pytest.mark.thorough
def test_one_that_is_killed_again_or_ends_by_itself_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="cannot be loaded"):
        asyncio.run(started(admission("insitu/eiffel", tmp_path), 2))
    with pytest.raises(LoadError, match="cannot be loaded"):
        asyncio.run(started(admission(str(tmp_path / "nothing"), tmp_path), 0))
