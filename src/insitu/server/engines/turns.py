"""Turns of tenants at scarce things, such as workers that look at jobs.

Who has kept them for the shortest time is next, even if others have sent something before. So
somebody whose jobs take long to look at waits for himself, and others wait for one of them at most.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

from insitu.server.engines.fairness import VirtualWork

T = TypeVar("T")


class Turns(Generic[T]):
    """Things that tenants have one after the other.

    Args:
        things: the things.
    """

    def __init__(self, things: Iterable[T]) -> None:
        self._free = deque(things)
        self._waiting: dict[str, deque[asyncio.Future[T]]] = {}
        self._kept = VirtualWork()

    async def get(self, tenant: str) -> T:
        """Waits for a thing, and takes it.

        Args:
            tenant: who takes it.
        """
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(future)
        self._hand_out()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():  # it was handed out in the same moment
                self.put(future.result(), tenant, 0.0)
            raise

    def put(self, thing: T, tenant: str, seconds: float) -> None:
        """Gives a thing back, or another one in its place.

        Args:
            thing: the thing.
            tenant: who had it.
            seconds: for how long.
        """
        self._kept.charge(tenant, seconds)
        self._free.append(thing)
        self._hand_out()

    def _hand_out(self) -> None:
        while self._free and self._waiting:
            self._kept.arrive(dict.fromkeys(self._waiting, 1.0), time.monotonic())
            tenant = min(self._waiting, key=lambda one: self._kept.all[one])
            line = self._waiting[tenant]
            future = line.popleft()
            if not line:
                del self._waiting[tenant]
            if not future.done():  # nobody waits for it any more
                future.set_result(self._free.popleft())
                self._kept.took_turn((tenant,), self._waiting.keys())
