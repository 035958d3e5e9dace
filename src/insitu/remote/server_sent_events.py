"""Server-sent events, as they are in a stream of bytes: the format of the HTML standard.

An event that the stream breaks off is none: it comes again after the next connection.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

MOST_EVENT_BYTES = 2**20
"""How long an event may be."""


class SentEvent(NamedTuple):
    """An event as it came.

    Attributes:
        id: its id, "" if it has none.
        kind: its name, "message" if it has none.
        data: its content.
    """

    id: str
    kind: str
    data: str


class TooLongError(Exception):
    """An event that is longer than any may be."""


def sent_events(chunks: Iterable[bytes]) -> Iterator[SentEvent | None]:
    """Gives the events in a stream, and None for each sign of life between them.

    Args:
        chunks: the stream, in pieces of any length.

    Raises:
        TooLongError: if an event does not end.
    """
    fields: dict[str, list[str]] = {}
    size = 0
    for line in _lines(chunks):
        size += len(line)
        if size > MOST_EVENT_BYTES:
            raise TooLongError
        if line.startswith(b":"):  # a comment, which only says that somebody is there
            size -= len(line)
            yield None
        elif line:
            name, _, value = line.decode(errors="replace").partition(":")
            fields.setdefault(name, []).append(value.removeprefix(" "))
        else:
            if "data" in fields:
                kind = fields.get("event", ["message"])[-1]
                yield SentEvent(fields.get("id", [""])[-1], kind, "\n".join(fields["data"]))
            fields, size = {}, 0


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a stream that are complete, without their ends: CR, LF, or both."""
    rest, after_cr, first = bytearray(), False, True
    for chunk in filter(None, chunks):
        data = chunk.removeprefix(b"\n") if after_cr else chunk
        after_cr = chunk.endswith(b"\r")
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        rest += data
        if b"\n" in data:
            *lines, rest = rest.split(b"\n")
            for line in lines:
                yield bytes(line.removeprefix(b"\xef\xbb\xbf") if first else line)
                first = False
        if len(rest) > MOST_EVENT_BYTES:
            raise TooLongError
