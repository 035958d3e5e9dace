"""`Limits`: what a job may take, for those who run jobs of others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from insitu.graph.errors import LimitError, OptionError
from insitu.graph.location import Location, here
from insitu.graph.node import Graph, Row, Subgraph
from insitu.graph.operations import READ


@dataclass(frozen=True, slots=True)
class Limits:
    """What a job may take; a field that is None has no limit.

    `model.check(job, limits=...)` and `model.run(job, limits=...)` raise a `LimitError` that names
    the limit and the line. They hold before anything is run, as far as sizes are known then, and
    in the run where sizes depend on values.

    Attributes:
        peak_bytes: bytes that are in use at once, without the weights of the model: what a pass
            holds, recorded values, and results. The bytes of the job itself may be no more either.
        operations: floating-point operations of the model and of what was recorded together, as
            `JobCheck.flops` counts them.
        nodes: recorded operations that are run. Those in the function of a `fold` count once for
            each item, also in folds in folds, and those of `every_step` once for each step.
        sites: places at which a value of the model is read or written.
        seconds: of the clock on the wall, from when the model begins to run. It is looked at
            between operations, passes and steps: one operation, and one forward, goes on to its
            end. A check takes no longer either.

    Example:
        >>> from insitu import Job, LanguageModel, Limits
        >>> model = LanguageModel("insitu/eiffel")
        >>> with model.scan("The Eiffel Tower") as tracer:
        ...     logits = model.lm_head.output[0, -1].save("logits")
        >>> limits = Limits(peak_bytes=2**30, operations=1e12, nodes=10_000, seconds=60)
        >>> results = model.run(tracer.job, limits=limits)
    """

    peak_bytes: int | None = None
    operations: float | None = None
    nodes: int | None = None
    sites: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and (isinstance(value, bool) or not value >= 0):
                raise OptionError(
                    f"`Limits({field.name}={value!r})` is no limit: it is a number, or None for "
                    "no limit.",
                    here(),
                )

    @property
    def bounds_costs(self) -> bool:
        """Whether what a run takes has to be known before it."""
        return self.peak_bytes is not None or self.operations is not None

    def check(self, limit: str, found: float, what: str, location: Location | None = None) -> None:
        """Raises if something takes more than it may.

        Args:
            limit: which limit.
            found: how much it takes.
            what: the sentence without its end, such as "the job has 30,000 nodes".
            location: the user's line.

        Raises:
            LimitError: in that case.
        """
        allowed = getattr(self, limit)
        if allowed is not None and found > allowed:
            raise LimitError(
                f"{what}, and `Limits({limit}=...)` is {allowed:,}",
                location,
                limit=limit,
                found=found,
                allowed=allowed,
            )

    def check_graphs(self, graphs: Sequence[Graph]) -> None:
        """Raises if graphs have more nodes or sites than they may.

        Args:
            graphs: the graphs of a job.

        Raises:
            LimitError: in that case, with the first line that is too much.
        """
        nodes = sites = 0
        for graph in graphs:
            for row in rows_of(graph):
                nodes += 1
                sites += row[0] is READ
                if self.nodes is not None and nodes > self.nodes:
                    what = f"The job has more than {self.nodes:,} nodes"
                    self.check("nodes", nodes, what, Location(*row[5]))
                if self.sites is not None and sites > self.sites:
                    what = f"The job is about more than {self.sites:,} sites"
                    self.check("sites", sites, what, Location(*row[5]))


def rows_of(graph: Graph) -> Iterator[Row]:
    """Gives the nodes of a graph and of the functions in it.

    Args:
        graph: the graph.
    """
    for row in graph.rows:
        yield row
        for arg in row[1]:
            if isinstance(arg, Subgraph):
                yield from rows_of(arg.graph)
