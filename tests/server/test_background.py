import asyncio
import logging
from pathlib import Path

import pytest
import torch
from starlette.requests import Request
from torch import nn

from insitu.models.weights_digest import weights_digest
from insitu.server.attended import Attended
from insitu.server.background import kept_up
from insitu.server.engines.known_weights import KnownWeights
from insitu.server.engines.sent_batches import Pulse
from insitu.server.http.query_values import asked_of
from insitu.server.storage.data_folder import StorageError
from insitu.server.storage.unwritten import Unwritten
from tests.server.stores import new_job


def test_what_fails_is_noted_and_begun_anew(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("insitu.server.background._PAUSE_SECONDS", 0.0)
    calls: list[int] = []

    async def work() -> None:
        calls.append(1)
        if len(calls) < 3:
            raise StorageError("no room for a secret prompt")

    asyncio.run(_await(work))
    assert len(calls) == 3
    assert [one.levelno for one in caplog.records] == [logging.WARNING] * 2
    assert "secret" not in caplog.text


async def _await(work: object) -> None:
    await kept_up("a test", work)  # pyright: ignore[reportArgumentType]


def test_changes_are_written_in_their_order_as_soon_as_there_is_room() -> None:
    unwritten, done = Unwritten(), list[int]()
    room = False

    def change(number: int) -> None:
        if not room:
            raise StorageError("full")
        done.append(number)
        if number == 1:
            unwritten.write(lambda: change(10))

    for number in (1, 2):
        unwritten.write(lambda number=number: change(number))
    assert not unwritten.again() and len(unwritten) == 2
    room = True
    assert unwritten.again() and done == [1, 2, 10] and not len(unwritten)


def test_a_change_that_cannot_be_made_does_not_hold_up_others() -> None:
    unwritten, done = Unwritten(), list[int]()

    def fail() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        unwritten.write(fail)
    unwritten.write(lambda: done.append(1))
    assert done == [1]


def test_a_client_that_waits_and_is_not_seen_for_a_minute_has_vanished() -> None:
    followed = {"b"}
    attended = Attended(followed.__contains__)
    for id in "abc":
        attended.add(id)
    attended.seen("d")  # nobody waits for it
    for look in range(11):
        assert attended.left_alone() == []
        if look == 5:
            attended.seen("c")
    assert attended.left_alone() == ["a"]
    followed.clear()
    found = [attended.left_alone() for _ in range(12)]
    assert sorted(id for ids in found for id in ids) == ["b", "c"]


def test_time_in_which_nobody_listened_does_not_count_against_an_engine() -> None:
    pulse = Pulse(100.0, moved=90.0)
    pulse.told(1, 101.0)
    pulse.told(1, 105.0)
    pulse.skip(50.0)
    assert (pulse.heard, pulse.moved) == (150.0, 151.0)


def test_other_weights_have_another_digest() -> None:
    module = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300))
    digest = weights_digest(module)
    assert weights_digest(module) == digest
    with torch.no_grad():
        module[0].weight += 1e-3  # pyright: ignore
    other = weights_digest(module)
    assert other != digest
    module[1].running_mean.add_(1)  # pyright: ignore
    assert weights_digest(module) != other
    assert weights_digest(module.half()) != weights_digest(module.float())
    assert len({weights_digest(nn.Linear(*shape, bias=False)) for shape in ((2, 8), (8, 2))}) == 2


def test_jobs_that_were_accepted_for_other_weights_are_outdated(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    old, new = new_job(sequence=3), new_job(sequence=4)
    first = KnownWeights(path, [])
    assert first.outdated("a", [old]) == []
    first.note("a")
    assert KnownWeights(path, [old]).outdated("a", [old, new]) == []
    second = KnownWeights(path, [old])
    assert second.outdated("b", [old, new]) == [old]  # the new one was accepted since the start
    second.note("b")
    assert second.outdated("c", [old, new]) == [old, new]  # exchanged under an engine's feet
    assert second.outdated("", [old, new]) == []


def test_an_engine_hangs_that_is_silent_or_stays_where_it_is() -> None:
    pulse = Pulse(100.0)
    pulse.told(1, 100.0)
    assert not pulse.hangs(130.0, 30.0, 120.0) and pulse.hangs(130.5, 30.0, 120.0)
    pulse.heard = 220.0  # it says every second that it is where it was
    assert not pulse.hangs(220.0, 30.0, 120.0) and pulse.hangs(220.5, 30.0, 120.0)
    assert not pulse.hangs(220.5, 30.0)  # it has nothing to do
    pulse.told(2, 220.5)
    assert not pulse.hangs(220.5, 30.0, 120.0)


@pytest.mark.parametrize("said", [b"attended", b"wait=20, attended", b"Attended; a=b"])
def test_a_client_says_in_a_preference_that_it_waits(said: bytes) -> None:
    scope = {"type": "http", "query_string": b"", "headers": [(b"prefer", said)]}
    assert asked_of(Request(scope)).attended
    assert not asked_of(Request({**scope, "headers": [(b"prefer", b"wait=20")]})).attended
