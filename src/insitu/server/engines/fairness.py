"""How much of its share each tenant has had: virtual work, by which tenants take their turns.

The work that was planned for a tenant, divided by its weight. Who has had the least comes first.
Nobody saves up while away: who returns has had as much as the one of those who wait that has had
the least. These are the virtual counters of Sheng et al., "Fairness in serving large language
models" (https://arxiv.org/abs/2401.00588), with floating-point operations for tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

_FORGOTTEN_SECONDS = 3600.0
"""After how long without a job a tenant has had no more than others."""

_LEAST_WEIGHT = 1e-6


class VirtualWork:
    """The virtual work of tenants."""

    def __init__(self) -> None:
        self._work: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._seen: dict[str, float] = {}  # when each last waited, the longest ago first
        self._waiting: frozenset[str] = frozenset()  # after the last turn
        self._last: Collection[str] = ()  # those of the last turn, who tell how far all are
        self._reached = 0.0

    @property
    def all(self) -> Mapping[str, float]:
        """The virtual work of each tenant, in operations."""
        return self._work

    def arrive(self, weights: Mapping[str, float], now: float) -> frozenset[str]:
        """Takes note of who waits, and returns those who did not before.

        Args:
            weights: those who wait, with their weights.
            now: the time in seconds.
        """
        work = self._work
        if self._last:
            least = min(work.get(tenant, 0.0) for tenant in self._last)
            self._reached = max(self._reached, least)
        there = self._waiting & weights.keys()
        least = min((work[tenant] for tenant in there), default=self._reached)
        returned = weights.keys() - there
        for tenant in returned:
            work[tenant] = max(work.get(tenant, 0.0), least)
        for tenant, weight in weights.items():
            self._weights[tenant] = max(weight, _LEAST_WEIGHT)
            self._seen.pop(tenant, None)
            self._seen[tenant] = now
        self._forget(now)
        return frozenset(returned)

    def took_turn(self, taken: Collection[str], left: Collection[str]) -> None:
        """Takes note of a turn.

        Args:
            taken: whose jobs were taken.
            left: who still waits.
        """
        self._waiting = frozenset(left)
        self._last = self._waiting or frozenset(taken) or self._last

    def charge(self, tenant: str, operations: float) -> None:
        """Adds to what a tenant has had.

        Args:
            tenant: the tenant. One that has not waited yet has the weight 1.
            operations: floating-point operations, less than none to take them back.
        """
        self._work[tenant] = self._work.get(tenant, 0.0) + self.share_of(tenant, operations)

    def share_of(self, tenant: str, operations: float) -> float:
        """Returns operations as virtual work of a tenant.

        Args:
            tenant: the tenant.
            operations: floating-point operations.
        """
        return operations / self._weights.get(tenant, 1.0)

    def _forget(self, now: float) -> None:
        """Forgets those who have not waited for long."""
        while self._seen:
            tenant, seen = next(iter(self._seen.items()))
            if now - seen <= _FORGOTTEN_SECONDS:
                return
            del self._seen[tenant]
            self._work.pop(tenant, None)
            self._weights.pop(tenant, None)
