"""What a server measures. `metric_families.py` writes it as Prometheus reads it.

The server calls the methods of `Metrics`, and the HTTP front those of `FrontMetrics`, both from
the event loop.
"""

from __future__ import annotations

from collections.abc import Mapping

from insitu.server.metric_families import ROWS, Counter, Gauge, Histogram, text_of


class Metrics:
    """What the server measures beside HTTP. Each method says that something has happened."""

    def __init__(self) -> None:
        model, by_class = ("model",), ("model", "priority")
        self._accepted = Counter("insitu_jobs_accepted_total", "Jobs that were accepted.", by_class)
        self._ended = Counter(
            "insitu_jobs_ended_total", "Jobs that have ended, by state.", ("model", "state")
        )
        self._refused = Counter("insitu_refused_total", "What was refused, by code.", ("code",))
        self._waiting = Gauge("insitu_jobs_waiting", "Jobs that wait.", by_class)
        self._oldest = Gauge(
            "insitu_oldest_waiting_seconds", "Age of the oldest job that waits.", by_class
        )
        self._in_state = Histogram(
            "insitu_job_state_seconds", "How long jobs were in a state.", ("state",)
        )
        self._jobs = Histogram("insitu_batch_jobs", "Jobs that shared a batch.", model, ROWS)
        self._prompts = Histogram("insitu_batch_prompts", "Prompts of a batch.", model, ROWS)
        self._passes = Counter("insitu_passes_total", "Passes of a model.", model)
        self._operations = Counter(
            "insitu_planned_operations_total", "Planned operations of what was run.", model
        )
        self._seconds = Counter(
            "insitu_engine_seconds_total", "Seconds in which they were run.", model
        )
        self._deaths = Counter("insitu_engine_deaths_total", "Engines that have died.", model)
        self._work = Gauge(
            "insitu_tenant_virtual_work", "Operations by weight, for fairness.", ("tenant",)
        )
        self._memory = Gauge("insitu_memory_bytes", "Resident bytes of a process.", ("process",))
        self._stored = Gauge("insitu_stored_bytes", "Bytes in the data folder.", ("what",))

    def accepted(self, model: str, priority: str) -> None:
        """Counts a job that was accepted.

        Args:
            model: the id of its model.
            priority: its class.
        """
        self._accepted.add(model=model, priority=priority)

    def refused(self, code: str) -> None:
        """Counts what was refused.

        Args:
            code: that of the problem.
        """
        self._refused.add(code=code)

    def ended(self, model: str, state: str) -> None:
        """Counts a job that has ended.

        Args:
            model: the id of its model.
            state: its end.
        """
        self._ended.add(model=model, state=state)

    def in_state(self, state: str, seconds: float) -> None:
        """Counts a job that goes on to another state.

        Args:
            state: the one that it was in.
            seconds: for how long.
        """
        self._in_state.see(seconds, state=state)

    def queue(self, model: str, priority: str, waiting: int, oldest: float) -> None:
        """Takes how long a queue is now.

        Args:
            model: the id of the model.
            priority: the class.
            waiting: how many jobs wait.
            oldest: the age of the oldest of them in seconds, 0 if there is none.
        """
        self._waiting.set(waiting, model=model, priority=priority)
        self._oldest.set(oldest, model=model, priority=priority)

    def batch(self, model: str, jobs: int) -> None:
        """Counts a batch that is given to an engine.

        Args:
            model: the id of the model.
            jobs: how many jobs share it.
        """
        self._jobs.see(jobs, model=model)

    def batch_ended(
        self, model: str, seconds: float, passes: int, operations: float, prompts: int
    ) -> None:
        """Counts a batch that was run.

        Args:
            model: the id of the model.
            seconds: how long it took.
            passes: how many passes of the model it took.
            operations: the operations that were planned for it.
            prompts: how many prompts it had.
        """
        self._seconds.add(max(seconds, 0.0), model=model)
        self._passes.add(passes, model=model)
        self._operations.add(operations, model=model)
        self._prompts.see(prompts, model=model)

    def engine_died(self, model: str) -> None:
        """Counts an engine that has died.

        Args:
            model: the id of its model.
        """
        self._deaths.add(model=model)

    def tenants(self, work: Mapping[str, float]) -> None:
        """Takes the virtual work of all tenants, by which it is decided who is next.

        Args:
            work: operations by weight, by the id of the tenant.
        """
        self._work.clear()
        for tenant, amount in work.items():
            self._work.set(amount, tenant=tenant)

    def memory(self, process: str, resident: float) -> None:
        """Takes the memory of a process.

        Args:
            process: what it is: the id of the model of an engine, or "front".
            resident: its resident bytes.
        """
        self._memory.set(resident, process=process)

    def stored(self, what: str, size: float) -> None:
        """Takes how much there is in the data folder.

        Args:
            what: "bodies", "results" or "blobs".
            size: bytes.
        """
        self._stored.set(size, what=what)

    def text(self) -> str:
        """Returns all of it as Prometheus reads it."""
        return text_of(self)


class FrontMetrics:
    """What the HTTP front measures.

    Attributes:
        requests: requests that were answered, by method, route and status.
        refusals: problems that were answered, by code.
        streams: event streams that are open.
    """

    def __init__(self) -> None:
        self.requests = Counter(
            "insitu_http_requests_total", "Requests.", ("method", "route", "status")
        )
        self.refusals = Counter(
            "insitu_http_problems_total", "Problems that were answered, by code.", ("code",)
        )
        self.streams = Gauge("insitu_http_streams", "Event streams that are open.")

    def text(self) -> str:
        """Returns all of it as Prometheus reads it."""
        return text_of(self)
