"""What a run must be told about a kind of model; `models/` tells it.

This is the one interface between what works on any `nn.Module` and what knows how prompts become
a batch, what a transformer block returns or what `generate` does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from torch import nn

from insitu.batching.demand import Demands, Work
from insitu.batching.pass_plan import PassPlan
from insitu.engine.counting import Counts
from insitu.engine.exclusive import Exclusive
from insitu.engine.job_outcome import Outputs
from insitu.engine.model_call import Pass
from insitu.engine.places import View
from insitu.engine.plan_cache import PlanCache
from insitu.engine.probe import Call, Probe
from insitu.engine.tree import Looks, Tree
from insitu.graph.location import Location, Mark
from insitu.graph.node import Graph, Place

if TYPE_CHECKING:
    from insitu.batching.summary import Facts
    from insitu.engine.job_parts import JobModel, JobPrompt, ProcedureName

Request = TypeVar("Request")


class Procedure(Protocol, Generic[Request]):
    """One way to run a model, with its options: a forward, or a generation."""

    @property
    def views(self) -> Mapping[str, View]:
        """How outputs are shown, by path, where that is not as the modules return them."""
        ...

    @property
    def name(self) -> ProcedureName:
        """What it is called in a job."""
        ...

    @property
    def given(self) -> Mapping[str, Any]:
        """The options that make it what it is, for a job: `Subject.procedure` makes it of them."""
        ...

    def request(self, args: tuple[Any, ...], kwargs: dict[str, Any], mark: Mark) -> Request:
        """Checks what an invocation was given and returns it in the form to keep."""
        ...

    def prompt(self, request: Request) -> JobPrompt:
        """Returns what an invocation was given as a job holds it."""
        ...

    def received(self, prompt: JobPrompt) -> Request:
        """Checks what a job holds for an invocation and returns it in the form to run.

        Raises:
            InsituError: if the model cannot take it.
        """
        ...

    def example(self, request: Request) -> Call:
        """Returns the first call of the module that an invocation alone would lead to."""
        ...

    @property
    def steps(self) -> int | None:
        """How many steps a run may have: one, if it is a forward. None if nothing says so."""
        ...

    def steps_of(self, request: Request) -> int | None:
        """Returns how many steps an invocation may have, None if nothing says so.

        Args:
            request: what it was given.
        """
        ...

    def seeds(self, requests: Sequence[Request]) -> Mapping[int, int]:
        """Returns the seeds from which the lines of invocations draw, by their numbers.

        What a pass draws from a seed by itself has none here.

        Args:
            requests: what the invocations were given.
        """
        ...

    def demanding(self, request: Request, options: Mapping[str, Any]) -> Request:
        """Returns what an invocation was given, with options that its values take.

        The procedure's own options go before them.

        Args:
            request: what it was given.
            options: such as which implementation of attention.
        """
        ...

    def check_tokens(self, location: Location) -> None:
        """Raises an `OptionError` if the steps of a run choose no tokens."""
        ...

    def key(self, module: nn.Module, requests: Sequence[Request]) -> Hashable | None:
        """Returns what the passes depend on beside the graph, None if they serve one run only.

        Args:
            module: the wrapped module.
            requests: what each invocation was given.
        """
        ...

    def demands(self, module: nn.Module, requests: Sequence[Request], work: Work) -> Demands:
        """Returns what the invocations demand of their passes, for the planner.

        It may serve again for a graph of the same shape, so it holds none of the graph.

        Args:
            module: the wrapped module, with its weights.
            requests: what each invocation was given.
            work: what the passes are for.
        """
        ...

    def halved(self, requests: Sequence[Request]) -> Procedure[Request] | None:
        """Returns the same with passes of half as much at most; None if they cannot be smaller.

        Args:
            requests: what the invocations of a pass that is too large were given.
        """
        ...

    def passes(
        self, module: nn.Module, plans: Sequence[PassPlan], requests: Sequence[Request]
    ) -> list[Pass]:
        """Returns passes ready to be called, in their order.

        Args:
            module: the wrapped module.
            plans: what each of them does. If rows of one begin where another leaves off, that
                one is among them, and comes before.
            requests: what each invocation was given.
        """
        ...

    @property
    def facts(self) -> Facts | None:
        """The facts of the model that its passes are told with; None if a pass is just a call."""
        ...

    def whole(self, each: Sequence[Any], requests: Sequence[Request]) -> Any:
        """Returns what one call on some invocations would return, from what each returned.

        Args:
            each: that; of the invocations, only those of a procedure that promises an output.
            requests: what each was given.
        """
        ...

    def outputs(self, results: Sequence[Any], requests: Sequence[Request]) -> Outputs | None:
        """Returns what the passes' calls returned as one, if the procedure promises an output.

        Of a pass that failed that is None, and so is then what all of them returned as one.
        """
        ...


class Subject(Protocol):
    """A model as the layers below `models/` see it."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """All modules by path, with or without weights."""
        ...

    @property
    def snapshot(self) -> Tree:
        """Its modules when they were last looked at."""
        ...

    @property
    def origin(self) -> Subject:
        """The model that its edits are of; itself if it has none."""
        ...

    def procedure(
        self, name: ProcedureName, options: Mapping[str, Any], mark: Mark, dry: bool = False
    ) -> Procedure[Any]:
        """Returns the procedure that a job names.

        Args:
            name: its name.
            options: its options, as `Procedure.given` has them.
            mark: the user's line.
            dry: whether nothing is to run, and no weights are to be loaded.

        Raises:
            OptionError: if the model does not run so, or an option means nothing to it.
        """
        ...

    def depends_on_contents(self, call: Call) -> bool:
        """Returns whether a probe of a call was found to depend on what its tensors hold.

        Args:
            call: the call. It was probed before.
        """
        ...

    def count(self, call: Call) -> Counts:
        """Returns what a call of the module takes, counted in a run on fake tensors.

        Raises:
            UnknownShapeError: if it cannot be run so.
        """
        ...

    @property
    def described(self) -> JobModel:
        """What a job says of the model that it is for."""
        ...

    def look(self, closely: bool = False) -> bool:
        """Takes the module's tree as it is now; returns whether it had changed.

        Args:
            closely: whether to look also in an open block that was looked at before, and for
                changes that are seldom made to a module.
        """
        ...

    def look_at_weights(self) -> bool:
        """Takes dtypes and shapes of weights as they are now; returns whether they had changed."""
        ...

    def warn_of_noise(self) -> None:
        """Says once that its values are random, if they are."""
        ...

    @property
    def looks(self) -> Looks:
        """What a block of it that is open has looked at: blocks reset it."""
        ...

    @property
    def edits(self) -> Sequence[Graph]:
        """What holds in every run, in the order in which it was recorded."""
        ...

    @property
    def has_hooks(self) -> bool:
        """Whether hooks of the user's own hang on its modules."""
        ...

    @property
    def is_training(self) -> bool:
        """Whether any of its modules is in training mode in which that makes a difference."""
        ...

    @property
    def away(self) -> Any:
        """Where its blocks are run, if not here: see `insitu.tracing.away`."""
        ...

    @property
    def exclusive(self) -> Exclusive:
        """Who may use the wrapped module."""
        ...

    @property
    def caches(self) -> Collection[str]:
        """The Python modules of caches: what these call are no functions of a forward's own."""
        ...

    @property
    def plans(self) -> PlanCache[Any]:
        """What was planned before, for graphs of the same shape."""
        ...

    @property
    def vocabulary(self) -> Any:
        """The standard names of its values: a `tracing.vocabulary.Vocabulary`."""
        ...

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        ...

    @property
    def knows_dtypes(self) -> bool:
        """Whether the dtypes of weights that are not loaded yet are certain."""
        ...

    def load(self) -> nn.Module:
        """Returns the wrapped module with its weights."""
        ...

    def fake_module(self, path: str) -> Callable[..., Any]:
        """Returns a module as a function on fake tensors."""
        ...

    def probe(self, call: Call, views: Mapping[str, View], inside: str | None = None) -> Probe:
        """Returns fake values of what passes every site in a call, shown by these views.

        With `inside`, also the torch functions that the module with this path calls.
        """
        ...

    def probe_inside(
        self, call: Call, views: Mapping[str, View], owners: Collection[str]
    ) -> Mapping[Place, Any]:
        """Returns fake values of what passes the functions in forwards of modules, by path."""
        ...
