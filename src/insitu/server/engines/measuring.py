"""Measurements made when somebody asks, and not when things happen: queues, work of tenants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import get_args

from insitu.remote.protocol import Priority
from insitu.server.engines.hosting import Host
from insitu.server.metrics import Metrics
from insitu.server.storage.store import Store


def measure(metrics: Metrics, store: Store, hosts: Collection[Host]) -> None:
    """Measures the queues of models, and the work of tenants.

    Args:
        metrics: takes it.
        store: has the clock.
        hosts: the models.
    """
    work = Counter[str]()
    for host in hosts:
        work.update(host.scheduler.work)
        for priority in get_args(Priority):
            waiting = [job for job in host.waiting.in_order() if job.priority == priority]
            oldest = store.now() - waiting[0].created if waiting else 0.0
            metrics.queue(host.model.id, priority, len(waiting), oldest)
    metrics.tenants(work)
