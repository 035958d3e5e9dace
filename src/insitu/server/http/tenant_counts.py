"""How many things of a kind a tenant has at once, and all tenants together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from insitu.server.http.refusals import refused


class TenantCount:
    """Things of one kind that are under way.

    Args:
        limit: the name of the limit, as of `FrontLimits`.
        most: how many of them a tenant may have.
        in_all: how many there may be of all tenants; None for any number.
    """

    def __init__(self, limit: str, most: int, in_all: int | None = None) -> None:
        self._limit, self._most, self._in_all = limit, most, in_all
        self._count = Counter[str]()

    def __len__(self) -> int:
        return self._count.total()

    def has_room(self, tenant: str) -> bool:
        """Returns whether a tenant may have another one.

        Args:
            tenant: its id.
        """
        full = self._in_all is not None and len(self) >= self._in_all
        return not full and self._count[tenant] < self._most

    def check(self, tenant: str) -> None:
        """Raises if a tenant may not have another one.

        Args:
            tenant: its id.

        Raises:
            ProblemError: 429 if it has as many as it may, 503 if all tenants together have.
        """
        if self.has_room(tenant):
            return
        found = self._count[tenant]
        if found < self._most:
            raise refused(503, "busy", f"The server has too many {self._limit}.", retry_after=2.0)
        raise refused(
            429,
            "busy",
            f"There are {found} {self._limit} under way with this key: wait for one to end.",
            limit=self._limit,
            found=found + 1,
            allowed=self._most,
            retry_after=1.0,
        )

    @contextmanager
    def one_of(self, tenant: str) -> Iterator[None]:
        """Counts one of a tenant for as long as the block lasts.

        Args:
            tenant: its id.

        Raises:
            ProblemError: as of `check`.
        """
        self.check(tenant)
        self._count[tenant] += 1
        try:
            yield
        finally:
            self._count[tenant] -= 1
            if not self._count[tenant]:
                del self._count[tenant]
