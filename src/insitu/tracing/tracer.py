"""Blocks: what `model.trace()` and `model.generate()` give.

A tracer collects invocations and one recording for all of them. When its `with` block ends
without an error the model runs, once, with the experiment inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from insitu.graph.errors import BlockError, NeverRanError, NoValueError, ShapeError, nearest
from insitu.graph.location import Mark, here, mark, user_frame
from insitu.graph.node import Graph, Site, readable
from insitu.graph.recording import Recording
from insitu.runtime.execution import Execution
from insitu.runtime.order import check_order, pass_order
from insitu.runtime.passes import Place, run_pass
from insitu.runtime.plan import make_plan
from insitu.runtime.procedure import Procedure, Subject
from insitu.tracing.invocation import Invocation


class Tracer:
    """A block of recorded lines.

    Attributes:
        model: the model that will run.
        procedure: how it will run.
        promises_output: whether `output` is the result of the run and not a proxy.
        recording: what the lines of the block are recorded in.
        is_open: whether the `with` block is being executed.
    """

    __slots__ = (
        "__weakref__",
        "_done",
        "_implicit",
        "_invocations",
        "_prompt",
        "_request",
        "_result",
        "is_open",
        "model",
        "procedure",
        "promises_output",
        "recording",
    )

    def __init__(
        self,
        model: Subject,
        procedure: Procedure[Any],
        prompt: tuple[tuple[Any, ...], dict[str, Any]] | None,
        promises_output: bool = False,
    ) -> None:
        self.is_open = False
        self.model = model
        self.procedure = procedure
        self.promises_output = promises_output
        self.recording = Recording(self._shapes)
        self._invocations: list[Invocation] = []
        self._implicit: Invocation | None = None
        self._prompt = prompt
        self._request: Any = None
        self._result: Any = None
        self._done = False

    @property
    def graph(self) -> Graph:
        """The recorded graph."""
        return self.recording.graph

    def __enter__(self) -> Tracer:
        if self.is_open or self._done:
            raise BlockError("This block was entered before: make a new one for a new run.", here())
        if self._prompt is not None:
            args, kwargs = self._prompt
            frame = user_frame(2)
            self._implicit = self._add(args, kwargs, (frame.f_code, frame.f_lasti))
            self._request = self._implicit.request
            self._implicit.enter(frame)
        self.is_open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        recording = self.recording
        recording.open = False
        self._done = True
        self.is_open = False
        for invocation in self._invocations:
            if invocation._owner is not None:
                invocation.leave()
        if kind is not None:
            recording.fail(f"its block raised {kind.__name__}, so the model did not run.")
            return
        try:
            self._run()
        except BaseException as failure:
            recording.fail(f"its run raised {type(failure).__name__}.")
            raise
        finally:
            recording.forget()
            # They refer to this: without them what nobody keeps is gone at once.
            self._invocations = []
            self._implicit = None

    def invoke(self, *args: Any, **kwargs: Any) -> Invocation:
        """Adds a prompt, and gives the context in which sites mean its values.

        Args:
            args: the prompt, in any form that the model takes.
            kwargs: options for this prompt.

        Raises:
            PromptError: if the model cannot process the prompt.
            PromptTypeError: if it is no prompt.
            BlockError: outside of the block, or where the block was given a prompt itself.
        """
        if self._prompt is not None:
            raise BlockError(
                "This block was given its prompt already: give it none, and each prompt to an "
                "`invoke`.",
                here(),
            )
        if not self.is_open:
            raise BlockError(
                "`invoke` belongs inside its block: write `with model.trace() as tracer:` first.",
                here(),
            )
        # The model runs later, and what is given here may be filled anew for the next prompt.
        args = tuple(arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args)
        return self._add(args, kwargs, mark())

    @property
    def output(self) -> Any:
        """What the model returned.

        In a generation, what one `generate` of the model on all prompts returns: token ids
        `(rows, position)`, there once the model has run. In a trace of one prompt, a proxy.

        Raises:
            NoValueError: in a generation, before the model has run.
            BlockError: in a trace of several prompts, whose outputs are `invoker.output`.
        """
        if not self.promises_output:
            self._only_request()
            if self._implicit is None:
                raise BlockError(
                    "`tracer.output` is a value of the run: read and save it inside the block.",
                    here(),
                )
            return self._implicit.output
        if self._result is None:
            reason = "its run failed" if self._done else "the model runs when the block ends"
            raise NoValueError(f"`generator.output` has no value: {reason}.", here())
        return self._result

    @property
    def ids(self) -> Any:
        """The token ids of a block's one prompt, `(rows, position)`."""
        return self._only_request().ids

    @property
    def mask(self) -> Any:
        """Which positions of `ids` hold tokens and which padding, `(rows, position)`."""
        return self._only_request().visible_mask

    def never_ran(self, site: Site, ran: set[Place] | None) -> NeverRanError:
        """Returns the error for a site at which nothing arrived.

        Args:
            site: the site.
            ran: where something did arrive, if that is known.
        """
        node = next(node for node in self.graph if node.site == site)
        path = readable(site.path)
        message = f"`{path}` was not called in this run, so `{site}` has no value."
        if isinstance(self.model.modules[site.path], nn.ModuleList | nn.ModuleDict):
            message += f" It only holds modules and is never called: take one, as in `{path}[0]`."
        elif ran is not None:
            message += _relatives(site.path, sorted({path for path, _ in ran if path}))
        return NeverRanError(message, node.location)

    def _only_request(self) -> Any:
        if self._request is None:
            raise BlockError(
                "This block has its prompts in invocations: ask the `invoker` of "
                "`with tracer.invoke(prompt) as invoker:`.",
                here(3),
            )
        return self._request

    def _add(self, args: tuple[Any, ...], kwargs: dict[str, Any], mark: Mark) -> Invocation:
        request = self.procedure.request(args, kwargs, mark)
        invocation = Invocation(self, len(self._invocations), request)
        self._invocations.append(invocation)
        return invocation

    def _shapes(self, site: Site) -> Any:
        return self._invocations[site.invocation].fake(site)

    def _run(self) -> None:
        if not self._invocations:
            raise BlockError(
                "The block has no prompt: give it one, or write `with tracer.invoke(prompt):` "
                "inside.",
                here(3),
            )
        recording = self.recording
        requests = [invocation.request for invocation in self._invocations]
        plan = make_plan(recording.graph, recording.saves, recording.writes)
        module = self.model.load()
        passes = self.procedure.passes(module, requests, plan.reads)
        order: Sequence[int] = range(len(passes))
        if plan.writes:
            if len(passes) > 1:
                order = pass_order(recording.graph, plan, passes)
            check_order(recording.graph, plan, passes, self._moments)
        execution = Execution(recording.graph, plan)
        modules, views = self.model.modules, self.procedure.views
        exclusive = self.model.exclusive
        results: list[Any] = [None] * len(passes)
        missing: list[int] = []
        with exclusive.lock:
            exclusive.begin()
            try:
                for at in order:
                    single = passes[at]
                    results[at], missing = run_pass(execution, plan.reads, single, modules, views)
                    if missing:
                        break
            finally:
                exclusive.running = False
        if missing:
            raise self._missing(min(missing))
        outputs = self.procedure.outputs(results, requests)
        execution.fill(recording.saves)
        if outputs is not None:
            self._result = outputs.whole
            for invocation, result in zip(self._invocations, outputs.each, strict=True):
                invocation._result = result

    def _moments(self, invocation: int) -> Mapping[Place, int] | None:
        """When the sites of an invocation come, or None if that is not known without a run."""
        request = self._invocations[invocation].request
        try:
            probe = self.model.probe(self.procedure.example(request), self.procedure.views)
        except ShapeError:
            return None
        return {place: moment for moment, place in enumerate(probe)}

    def _missing(self, index: int) -> NeverRanError:
        site = self.graph[index].site
        assert site is not None
        try:
            invocation = self._invocations[site.invocation]
            call = self.procedure.example(invocation.request)
            ran = set(self.model.probe(call, self.procedure.views))
        except Exception:  # the probe only adds to the message
            ran = None
        return self.never_ran(site, ran)


def _relatives(path: str, ran: list[str]) -> str:
    """Which of the modules that ran are near a path, as the end of a message."""
    parent = path.rpartition(".")[0]
    near = [other for other in ran if other.startswith(f"{parent}.") or not parent]
    close = nearest(path, near or ran)
    if not close and near:
        close = f" (such as {', '.join(map(repr, near[:3]))})"
    return f" Near it, these were called{close}." if close else ""
