"""Events are read from streams in pieces of any length."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.remote.server_sent_events import (
    MOST_EVENT_BYTES,
    SentEvent,
    TooLongError,
    sent_events,
)

STREAM = (
    "\ufeff: here\n\nid: 1\nevent: state\ndata: {}\n\nid:2\r\ndata: a\r\ndata:  é\r\n\r\n"
    ": still here\rid: 3\rdata\revent: token\r\rretry: 5\n\nid: 4\ndata: broken"
).encode()
EVENTS = [SentEvent("1", "state", "{}"), SentEvent("2", "message", "a\n é")]
EVENTS += [SentEvent("3", "token", "")]


def read(*chunks: bytes) -> list[SentEvent]:
    return [event for event in sent_events(chunks) if event is not None]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_pieces_of_any_length_give_the_same(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    chunks = [STREAM[a:b] for a, b in pairwise(places)]
    assert read(*chunks) == EVENTS
    signs = [event for event in sent_events(chunks) if event is None]
    assert len(signs) == 2


@given(st.integers(0, len(STREAM)))
def test_a_stream_that_breaks_gives_whole_events_only(end: int) -> None:
    found = read(STREAM[:end])
    assert found == EVENTS[: len(found)]


@given(st.binary(max_size=300))
def test_any_bytes_are_read(data: bytes) -> None:
    for event in read(data, b"\n\n"):
        assert isinstance(event.data, str)


def test_an_event_that_does_not_end_is_not_kept() -> None:
    with pytest.raises(TooLongError):
        read(*[b"x" * 2**16] * (MOST_EVENT_BYTES // 2**16 + 1))
    with pytest.raises(TooLongError):
        read(*[b"data: x\n" * 2**12] * (MOST_EVENT_BYTES // 2**13))
    lively = [b": " + b"x" * 2**16 + b"\n"] * (MOST_EVENT_BYTES // 2**15)
    assert read(*lively) == []
