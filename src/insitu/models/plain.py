"""`trace` on any module: one forward for each invocation, with its own arguments."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from insitu.batching.demand import Demand, Demands, Work
from insitu.batching.pass_plan import PassPlan
from insitu.engine.job_outcome import Outputs
from insitu.engine.model_call import Pass
from insitu.engine.places import View
from insitu.engine.probe import Call
from insitu.graph.errors import OptionError, PromptTypeError
from insitu.graph.location import Location, Mark
from insitu.models.attention import OPTION, attending
from insitu.models.given_caches import own_copies, own_copy
from insitu.models.options import check_call

if TYPE_CHECKING:
    from insitu.engine.job_parts import JobPrompt, ProcedureName


class Forward:
    """One forward for each invocation, with its own arguments.

    Args:
        views: how outputs are shown, by path.
        module: the wrapped module.
    """

    name: ProcedureName = "trace"
    steps = 1

    def __init__(self, views: Mapping[str, View], module: nn.Module) -> None:
        self.views = views
        self._module = module

    def steps_of(self, request: Call) -> int:
        """Returns that there is one step."""
        return 1

    def seeds(self, requests: Sequence[Call]) -> Mapping[int, int]:
        """Returns none: the arguments of a forward are its own."""
        return {}

    def demanding(self, request: Call, options: Mapping[str, Any]) -> Call:
        """Returns the arguments of an invocation with options that its values take."""
        if options.items() <= request.kwargs.items():
            return request
        return Call(request.args, {**request.kwargs, **options})

    @property
    def given(self) -> Mapping[str, Any]:
        """The options that all invocations are given: none."""
        return {}

    def prompt(self, request: Call) -> JobPrompt:
        """Returns the arguments of an invocation as a job holds them."""
        from insitu.engine.job_parts import JobPrompt  # of use to jobs only

        kwargs = {name: value for name, value in request.kwargs.items() if name != OPTION}
        return JobPrompt(args=request.args, kwargs=kwargs)

    def received(self, prompt: JobPrompt) -> Call:
        """Returns the arguments that a job holds for an invocation.

        Raises:
            PromptTypeError: if they are token ids.
        """
        if prompt.ids is not None or prompt.seed is not None:
            raise PromptTypeError(
                "The job has prompts of token ids, and this model takes arguments of its forward: "
                "run it on a `LanguageModel`.",
                prompt.location,
            )
        kwargs = dict(prompt.kwargs)
        check_call(self._module, kwargs, lambda: prompt.location)
        return Call(prompt.args, kwargs)

    def request(self, args: tuple[Any, ...], kwargs: dict[str, Any], mark: Mark) -> Call:
        """Returns the arguments of an invocation.

        Raises:
            OptionError: if the module takes none of some name.
        """
        if kwargs:
            check_call(self._module, kwargs, lambda: Location(*mark))
        return Call(args, kwargs)

    def example(self, request: Call) -> Call:
        """Returns the call that an invocation leads to."""
        return request

    def key(self, module: nn.Module, requests: Sequence[Call]) -> Hashable | None:
        """Returns the form of the arguments, where they are tensors, strings and bools."""
        form: list[Hashable] = []
        for args, kwargs in requests:
            for value in (*args, *kwargs.values()):
                if type(value) is torch.Tensor:
                    form.append((value.shape, value.dtype, value.device, value.requires_grad))
                elif type(value) in (bool, str):
                    form.append(value)
                else:
                    return None
            form.append((len(args), *kwargs))
        return (module.training, *form)

    def demands(self, module: nn.Module, requests: Sequence[Call], work: Work) -> Demands:
        """Returns that each invocation has a pass: how to batch arguments is not known."""
        return Demands([Demand(differentiates=own.differentiates) for own in work.asked])

    def passes(
        self, module: nn.Module, plans: Sequence[PassPlan], requests: Sequence[Call]
    ) -> list[Pass]:
        """Returns calls of the module ready to be made."""
        numbers = [single.rows[0].invocation for single in plans]
        return [_alone(module, requests[number], number) for number in numbers]

    @property
    def facts(self) -> None:
        """Nothing is known of the module."""
        return None

    def halved(self, requests: Sequence[Call]) -> None:
        """Returns that its passes cannot be smaller."""

    def check_tokens(self, location: Location) -> None:
        """Raises: a forward chooses no tokens."""
        raise OptionError("A forward chooses no tokens: use `generate`.", location)

    def whole(self, each: Sequence[Any], requests: Sequence[Call]) -> None:
        """Returns nothing: as of `outputs`."""

    def outputs(self, results: Sequence[Any], requests: Sequence[Call]) -> Outputs | None:
        """Returns nothing: the output of a forward is a site."""
        return None


def _alone(module: nn.Module, request: Call, number: int) -> Pass:
    """The pass of one call."""
    args, kwargs = request

    def call(*_: Any) -> Any:
        # Of each run anew: a job may be run again.
        own, others = tuple(map(own_copy, args)), own_copies(kwargs) if kwargs else kwargs
        if OPTION not in others:
            return module(*own, **others)
        with attending(module, others.pop(OPTION)):
            return module(*own, **others)

    return Pass(call, {number: None}, True)


def check_job(kind: str, name: ProcedureName, options: Mapping[str, Any], mark: Mark) -> None:
    """Raises if what a job names is no plain forward.

    Args:
        kind: the class of the model.
        name: the name of the procedure.
        options: its options.
        mark: the user's line.

    Raises:
        OptionError: if it is no forward, or has options.
    """
    if name != "trace":
        raise OptionError(
            f"The job generates, and a {kind} does not: run it on a `LanguageModel`.",
            Location(*mark),
        )
    for option in options:
        raise OptionError(
            f"The job has an option `{option}`, and a {kind} takes none: run it on a "
            "`LanguageModel`.",
            Location(*mark),
        )
