"""`trace` on any module: one forward for each invocation, with its own arguments."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from insitu.graph.errors import OptionError, PromptTypeError
from insitu.graph.location import Location, Mark
from insitu.models.attention import OPTION, attending
from insitu.models.options import check_call
from insitu.runtime.hooks import View
from insitu.runtime.passes import Pass
from insitu.runtime.probe import Call
from insitu.runtime.procedure import Outputs, Schedule, Work
from insitu.runtime.summary import unknown

if TYPE_CHECKING:
    from insitu.runtime.job_parts import JobPrompt, ProcedureName


class Forward:
    """One forward for each invocation, with its own arguments.

    Args:
        views: how outputs are shown, by path.
        module: the wrapped module.
        options: what all of them are given beside their arguments.
    """

    name: ProcedureName = "trace"
    steps = 1

    def __init__(
        self,
        views: Mapping[str, View],
        module: nn.Module,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.views = views
        self._module = module
        self._options = options

    def steps_of(self, request: Call) -> int:
        """Returns that there is one step."""
        return 1

    def demanding(self, options: Mapping[str, Any]) -> Forward:
        """Returns the same with further options, but for those that it was given."""
        if options.keys() <= self._options.keys():
            return self
        return Forward(self.views, self._module, {**options, **self._options})

    @property
    def given(self) -> Mapping[str, Any]:
        """The options that all invocations are given."""
        return self._options

    def prompt(self, request: Call) -> JobPrompt:
        """Returns the arguments of an invocation as a job holds them."""
        from insitu.runtime.job_parts import JobPrompt  # of use to jobs only

        return JobPrompt(args=request.args, kwargs=request.kwargs)

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
        return Call(request.args, {**request.kwargs, **self._options})

    def key(self, module: nn.Module, requests: Sequence[Call]) -> Hashable | None:
        """Returns the form of the arguments, where they are tensors and nothing else."""
        form: list[Hashable] = []
        for args, kwargs in requests:
            for value in (*args, *kwargs.values()):
                if type(value) is not torch.Tensor:
                    return None
                form.append((value.shape, value.dtype, value.device, value.requires_grad))
            form.append((len(args), *kwargs))
        return (module.training, *self._options.items(), *form)

    def schedule(self, module: nn.Module, requests: Sequence[Call], work: Work) -> Schedule:
        """Returns what gives a pass for each invocation: how to batch arguments is not known."""
        return partial(_alone, self._options)

    def check_tokens(self, location: Location) -> None:
        """Raises: a forward chooses no tokens."""
        raise OptionError("A forward chooses no tokens: use `generate`.", location)

    def outputs(self, results: Sequence[Any], requests: Sequence[Call]) -> Outputs | None:
        """Returns nothing: the output of a forward is a site."""
        return None


def _alone(options: Mapping[str, Any], module: nn.Module, requests: Sequence[Call]) -> list[Pass]:
    """A pass for each call."""
    others = dict(options)
    implementation = others.pop(OPTION, None)

    def single(request: Call, number: int) -> Pass:
        def call(*_: Any) -> Any:
            if not options:
                return module(*request.args, **request.kwargs)
            with attending(module, implementation):
                return module(*request.args, **{**request.kwargs, **others})

        return Pass(call, {number: None}, True, partial(unknown, [number], None))

    return [single(request, number) for number, request in enumerate(requests)]
