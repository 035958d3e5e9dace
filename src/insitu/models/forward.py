"""`trace` on a language model: one forward of all prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from insitu.graph.errors import OptionError, PromptTypeError
from insitu.graph.location import Location, Mark
from insitu.graph.node import Site
from insitu.models.batches import Batches, arguments, forward
from insitu.models.prompts import Prompt
from insitu.models.separation import Separation
from insitu.runtime.hooks import Cut
from insitu.runtime.layout import Layouts
from insitu.runtime.passes import Pass
from insitu.runtime.probe import Call
from insitu.runtime.procedure import Outputs, Work

if TYPE_CHECKING:
    from insitu.models.language_model import LanguageModel

# Options of a forward that mean the same for each prompt of a batch as for one alone.
_BATCHABLE = frozenset(["output_attentions", "output_hidden_states", "return_dict", "use_cache"])


class LanguageForward:
    """Forwards of a language model.

    Args:
        model: the model.
        options: keyword arguments for its forward.
        budget: how many tokens a pass may have, where it has several invocations; None for what
            fits into memory.
        share: whether invocations of one prompt share what they have in common; None for where
            that is faster.
    """

    def __init__(
        self,
        model: LanguageModel,
        options: dict[str, Any],
        budget: int | None = None,
        share: bool | None = None,
    ) -> None:
        self._model = model
        self._budget = budget
        self._share = share
        if model.takes_use_cache:
            options.setdefault("use_cache", False)
        self._options = options
        self.views = model.block_views[bool(options.get("use_cache"))]
        self.steps = 1
        self._separation: tuple[bool, Separation | None] | None = None

    def request(self, args: tuple[Any, ...], kwargs: dict[str, Any], mark: Mark) -> Prompt:
        """Returns the prompt of an invocation as token ids."""
        if len(args) != 1 or kwargs:
            raise PromptTypeError(
                "An invocation of a trace takes one prompt and nothing else; options of the "
                "forward are given to `trace`.",
                Location(*mark),
            )
        return self._model.reader.read(args[0], "right", mark)

    def example(self, request: Prompt) -> Call:
        """Returns the forward of a prompt alone."""
        return Call((), self._kwargs(request))

    def passes(self, module: nn.Module, requests: Sequence[Prompt], work: Work) -> list[Pass]:
        """Returns the passes that process all invocations, ready to be called."""
        if len(requests) == 1:
            return [self._pass(module, requests[0], {0: None}, requests)]
        layouts = self._shared(module, requests, work) if work.together else None
        if layouts is None or isinstance(layouts, Site):
            return [
                self._pass(module, prompt, {number: None}, [prompt], layouts)
                for number, prompt in enumerate(requests)
            ]
        batches = Batches(self._model, self._options, layouts, module, requests, work)
        return batches.passes(self._budget, self._share)

    def check_tokens(self, location: Location) -> None:
        """Raises: a forward chooses no tokens."""
        raise OptionError("A trace chooses no tokens: use `generate`.", location)

    def outputs(self, results: Sequence[Any], requests: Sequence[Prompt]) -> Outputs | None:
        """Returns nothing: the output of a forward is a site."""
        return None

    def _shared(
        self, module: nn.Module, requests: Sequence[Prompt], work: Work
    ) -> Layouts | Site | None:
        """How to cut what is read out of one pass for all; None, or a site, if one does not do."""
        if self._model.trains(module) or not self._options.keys() <= _BATCHABLE:
            return None
        for prompt in requests:
            if prompt.extras:
                return None
        loaded = self._model.loaded
        if self._separation is None or self._separation[0] is not loaded:
            mark = requests[0].mark

            def sample(batch: int, length: int) -> Call:
                ids = torch.zeros(batch, length, dtype=torch.int64)
                return Call((), self._kwargs(Prompt(ids, mark)))

            def run(module: nn.Module, prompt: Prompt) -> None:
                forward(self._model, module, self._kwargs(prompt), [prompt])

            found = self._model.separation(sample, run, self.views, "right")
            self._separation = (loaded, found)
        separation = self._separation[1]
        if separation is None:
            return None
        obstacle = separation.obstacle(work.plan.reads, work.written)
        return separation.layouts if obstacle is None else Site(*obstacle)

    def _pass(
        self,
        module: nn.Module,
        prompt: Prompt,
        cuts: Mapping[int, Cut | None],
        requests: Sequence[Prompt],
        apart: Site | None = None,
    ) -> Pass:
        """The pass of a prompt alone."""
        kwargs = self._kwargs(prompt)
        single = Pass(lambda _: forward(self._model, module, kwargs, requests), cuts, True)
        return single if apart is None else single._replace(apart=apart)

    def _kwargs(self, prompt: Prompt) -> dict[str, Any]:
        return arguments(self._model, prompt, self._options)
