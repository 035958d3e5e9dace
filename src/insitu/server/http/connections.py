"""The connections of a server: how many there are, and which of them makes room for another.

Where there are too many, the one that has waited longest for its client is ended. So slow clients
cannot keep out those that say at once what they want, not even from their own address. What tells
this file about connections is in `bounded_protocol.py`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, MutableMapping
from typing import Any, Protocol

from insitu.server.http.front_limits import FrontLimits

EXTENSION = "insitu.connection"
"""Where a request has its connection, among the extensions of ASGI."""


class Connection(Protocol):
    """The connection of a request, as what answers it sees it.

    Attributes:
        stopped: set once the server stops.
    """

    stopped: asyncio.Event

    @property
    def stops(self) -> bool:
        """Whether the server stops."""
        ...

    def abort(self) -> None:
        """Ends the connection at once, with what was not taken yet."""
        ...

    def waits(self) -> None:
        """Says that its client is waited for: it can be ended for others."""
        ...

    def goes_on(self) -> None:
        """Says that its client is not waited for any more."""
        ...

    def becomes_stream(self) -> None:
        """Takes it out of the count, as streams are counted apart."""
        ...


def connection_of(scope: MutableMapping[str, Any]) -> Connection | None:
    """Returns the connection of a request, None if it did not come over one of these.

    Args:
        scope: of ASGI.
    """
    return scope.get("extensions", {}).get(EXTENSION)


class Place:
    """A connection as it is counted.

    Args:
        address: from where it is.
        close: ends it at once.
    """

    def __init__(self, address: str, close: Callable[[], None]) -> None:
        self.address, self.close = address, close


class Connections:
    """All connections of a server but streams.

    Args:
        limits: how many there may be.
        by_address: whether those of an address are bounded. Behind a proxy, all are from there.
    """

    def __init__(self, limits: FrontLimits, by_address: bool = True) -> None:
        self._limits, self._by_address = limits, by_address
        self._count = Counter[str]()
        self._places = set[Place]()
        self._waiting = dict[Place, None]()  # in the order in which they began to wait

    def __len__(self) -> int:
        return len(self._places)

    def enter(self, address: str, close: Callable[[], None]) -> Place | None:
        """Counts a new connection, which waits; None if there is no room for it.

        Args:
            address: from where it is.
            close: ends it at once.
        """
        if not self._has_room(address):
            return None
        place = Place(address, close)
        self._places.add(place)
        self._count[address] += 1
        self.waits(place)
        return place

    def waits(self, place: Place) -> None:
        """Says that a connection waits for its client: to send something, or to take it."""
        self._waiting.pop(place, None)
        if place in self._places:
            self._waiting[place] = None

    def works(self, place: Place) -> None:
        """Says that a connection does not wait for its client."""
        self._waiting.pop(place, None)

    def leave(self, place: Place) -> None:
        """Says that a connection has ended, or is a stream."""
        self._waiting.pop(place, None)
        if place in self._places:
            self._places.remove(place)
            self._count[place.address] -= 1
            if not self._count[place.address]:
                del self._count[place.address]

    def end_waiting(self) -> None:
        """Ends all connections without a request."""
        for place in [*self._waiting]:
            place.close()

    def _has_room(self, address: str) -> bool:
        """Returns whether there is room for one more of an address, or makes it."""
        bounded = self._by_address and self._count[address] >= self._limits.connections_of_address
        if not bounded and len(self._places) < self._limits.connections:
            return True
        # Too many of all: those of the address that has most of them go first.
        whose = address if bounded else max(self._count, key=self._count.__getitem__)
        oldest = next((one for one in self._waiting if one.address == whose), None)
        if oldest is None and not bounded:
            oldest = next(iter(self._waiting), None)
        if oldest is None:
            return False
        self.leave(oldest)
        oldest.close()
        return True
