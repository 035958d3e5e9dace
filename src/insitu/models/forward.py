"""`trace` on a language model: one forward of all prompts."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from insitu.graph.errors import OptionError
from insitu.graph.location import Location, Mark
from insitu.graph.node import Site
from insitu.models.accounts import Accounts
from insitu.models.attention import OPTION
from insitu.models.calls import arguments, content, default_budget, forward
from insitu.models.padding import padding_of, positioned
from insitu.models.prompt_arguments import given_to_invocation
from insitu.models.prompts import Prompt, Side, counted
from insitu.models.sent_prompts import received, sent
from insitu.runtime.fallback import SEEN_ALONE, Fallback, logger, uncut
from insitu.runtime.layout import Layouts
from insitu.runtime.passes import Pass
from insitu.runtime.probe import Call
from insitu.runtime.procedure import Outputs, Schedule, Work

if TYPE_CHECKING:
    from insitu.models.language_model import LanguageModel
    from insitu.models.separation import Separation
    from insitu.runtime.job_parts import JobPrompt, ProcedureName

# Options of a forward that mean the same for each prompt of a batch as for one alone.
_BATCHABLE = frozenset(
    ["output_attentions", "output_hidden_states", "return_dict", "use_cache", OPTION]
)


class LanguageForward:
    """Forwards of a language model.

    Args:
        model: the model.
        options: keyword arguments for its forward.
        budget: how many tokens a pass may have, where it has several invocations; None for what
            fits into memory.
        share: whether invocations of one prompt share what they have in common; None for where
            that is faster.
        dry: whether the weights are not to be loaded.
    """

    name: ProcedureName = "trace"

    def __init__(
        self,
        model: LanguageModel,
        options: dict[str, Any],
        budget: int | None = None,
        share: bool | None = None,
        dry: bool = False,
    ) -> None:
        self._model = model
        self._dry = dry
        self._budget = budget
        self._share = share
        if model.takes_use_cache:
            options.setdefault("use_cache", False)
        self._options = options
        self.views = model.block_views[bool(options.get("use_cache"))]
        self.steps = 1
        self._separations: dict[tuple[bool, Side, object], Separation | Fallback] = {}
        plain = all(type(value) in (bool, int, float, str) for value in options.values())
        self._fixed = (budget, share, *options.items()) if plain else None

    def steps_of(self, request: Prompt) -> int:
        """Returns that there is one step."""
        return 1

    def demanding(self, options: Mapping[str, Any]) -> LanguageForward:
        """Returns the same with further options, but for those that it was given."""
        if options.keys() <= self._options.keys():
            return self
        options = {**options, **self._options}
        return LanguageForward(self._model, options, self._budget, self._share, self._dry)

    @property
    def given(self) -> Mapping[str, Any]:
        """The options of the forward and our own."""
        own = {"max_tokens_per_pass": self._budget, "share_prefixes": self._share}
        return {**self._options, **{name: one for name, one in own.items() if one is not None}}

    def prompt(self, request: Prompt) -> JobPrompt:
        """Returns a prompt as a job holds it. Position ids are made anew where it runs."""
        return sent(request)

    def received(self, prompt: JobPrompt) -> Prompt:
        """Returns the prompt that a job holds.

        Raises:
            InsituError: if the model cannot take it.
        """
        if prompt.seed is not None:
            raise OptionError("A trace takes no seed.", prompt.location)
        read = received(self._model, prompt, self._side, "trace")
        return read if read.mask is None else positioned(self._model, read, self._dry)

    def request(self, args: tuple[Any, ...], kwargs: dict[str, Any], mark: Mark) -> Prompt:
        """Returns the prompt of an invocation as token ids."""
        model = self._model
        if len(args) == 1 and not kwargs:
            plain = model.reader.read_plain(args[0], mark)
            if plain is not None:
                return plain
        else:
            kwargs = given_to_invocation(model, args, kwargs, "trace", mark)
        prompt = model.reader.read(args[0] if args else None, self._side, mark, kwargs)
        if prompt.extras:
            model.options.check(prompt.extras, "trace", lambda: Location(*mark))
        return prompt if prompt.mask is None else positioned(model, prompt, self._dry)

    def _side(self) -> Side:
        """Where a list of prompts is padded."""
        return padding_of(self._model, self._dry).side

    def example(self, request: Prompt) -> Call:
        """Returns the forward of a prompt alone."""
        return Call((), arguments(self._model, request, self._options))

    def key(self, module: nn.Module, requests: Sequence[Prompt]) -> Hashable | None:
        """Returns the form of the prompts and which of them are equal."""
        if self._fixed is None:
            return None
        if len(requests) == 1:
            prompt = requests[0]
            if prompt.extras:
                return None
            shifted = prompt.positions is not None
            return (prompt.ids.shape, shifted, module.training, self._fixed)
        seen: dict[Hashable, int] = {}
        form: list[Hashable] = []
        tokens = 0
        for number, prompt in enumerate(requests):
            if prompt.extras:
                return None
            tokens += prompt.ids.numel()
            first = seen.setdefault(content(number, prompt), number)
            form.append((prompt.ids.shape, prompt.mask is None, prompt.positions is None, first))
        budget = self._budget or default_budget(self._model, tokens)
        return (tuple(form), budget, self._model.is_training, self._model.has_hooks, self._fixed)

    def schedule(self, module: nn.Module, requests: Sequence[Prompt], work: Work) -> Schedule:
        """Returns what gives the passes: as few, and with as little work, as it takes."""
        sizes = [(prompt.ids.shape[0], prompt.ids.shape[1]) for prompt in requests]
        accounts = Accounts(self._model, work, sizes)
        if len(requests) == 1:
            return self._alone(accounts, 1, None)
        shared = self._shared(module, requests, work)
        if isinstance(shared, Fallback):
            logger.info("%d prompts run one by one: %s", len(requests), shared.why)
            return self._alone(accounts, len(requests), shared)
        layouts, side = shared
        tokens = sum(prompt.ids.numel() for prompt in requests)
        budget = self._budget or default_budget(self._model, tokens)
        from insitu.models.batches import Batches  # takes a while, and one prompt needs none

        options = (self._model, self._options, layouts, module)
        return Batches(*options, requests, work, budget, self._share, side).passes

    def check_tokens(self, location: Location) -> None:
        """Raises: a forward chooses no tokens."""
        raise OptionError("A trace chooses no tokens: use `generate`.", location)

    def outputs(self, results: Sequence[Any], requests: Sequence[Prompt]) -> Outputs | None:
        """Returns nothing: the output of a forward is a site."""
        return None

    def _shared(
        self, module: nn.Module, requests: Sequence[Prompt], work: Work
    ) -> tuple[Layouts, Side] | Fallback:
        """How to cut what is read out of one pass for all, and where that is padded."""
        side = _side_of_batch(requests)
        if work.apart is not None:
            return work.apart
        if self._model.trains():
            return Fallback("in training mode each prompt has its own random numbers")
        if self._model.has_hooks:
            return SEEN_ALONE
        if further := sorted(self._options.keys() - _BATCHABLE):
            return Fallback(f"`{further[0]}` may mean something else for a batch")
        if extra := next((name for prompt in requests for name in prompt.extras), None):
            return Fallback(f"`{extra}` is of one prompt at a time")
        if side is None:
            return Fallback("one has several rows without padding, and another has padding")
        key = (self._model.loaded, side, self._model.snapshot)
        if key not in self._separations:
            mark = requests[0].mark

            def sample(batch: int, length: int) -> Call:
                ids = torch.zeros(batch, length, dtype=torch.int64)
                return self.example(counted(Prompt(ids, mark), side))

            def run(module: nn.Module, prompt: Prompt) -> None:
                kwargs = arguments(self._model, counted(prompt, side), self._options)
                forward(self._model, module, kwargs, [prompt])

            from insitu.models.sharing import separation_of  # of no use to one prompt

            given = (sample, run, self.views, side)
            self._separations[key] = separation_of(self._model, *given)
        separation = self._separations[key]
        if isinstance(separation, Fallback):
            return separation
        obstacle = separation.obstacle(work.plan.reads, work.written)
        return (separation.layouts, side) if obstacle is None else uncut(Site(*obstacle))

    def _alone(self, accounts: Accounts, count: int, apart: Fallback | None) -> Schedule:
        """Gives a pass to each prompt; `apart` is why several have no pass together."""
        model, options = self._model, self._options
        why = "one prompt" if apart is None else apart.why
        told = [partial(accounts.alone, number, why) for number in range(count)]
        cuts = [{number: None} for number in range(count)]

        def schedule(module: nn.Module, requests: Sequence[Prompt]) -> list[Pass]:
            passes: list[Pass] = []
            for prompt, own, tell in zip(requests, cuts, told, strict=True):
                kwargs = arguments(model, prompt, options)
                call = partial(forward, model, module, kwargs, [prompt])
                # `Pass(...)`, in a third of the time.
                fields = (call, own, True, tell, None, None, None, apart)
                passes.append(tuple.__new__(Pass, fields))
            return passes

        return schedule


def _side_of_batch(requests: Sequence[Prompt]) -> Side | None:
    """Where the prompts of a batch are padded, None if they cannot be together.

    Prompts with padding before them need position ids, and then all have some. Several rows
    without padding share theirs when they are alone.
    """
    if all(prompt.positions is None for prompt in requests):
        return "right"
    apart = any(prompt.positions is None and prompt.ids.shape[0] > 1 for prompt in requests)
    return None if apart else "left"
