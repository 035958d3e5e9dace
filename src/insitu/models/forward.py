"""`trace` on a language model: one forward of all prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from insitu.batching.arrangement import rings
from insitu.batching.procedure import Schedule, Work
from insitu.graph.errors import OptionError
from insitu.graph.location import Location, Mark
from insitu.graph.node import Address, Site
from insitu.models.accounts import Accounts
from insitu.models.attention import OPTION
from insitu.models.calls import alone, arguments, content, default_budget, forward
from insitu.models.padding import padding_of, positioned
from insitu.models.prompt_arguments import given_to_invocation
from insitu.models.prompts import Prompt, Side, counted
from insitu.models.sent_prompts import received, sent
from insitu.runtime.fallback import SEEN_ALONE, Fallback, logger, uncut
from insitu.runtime.order import uses
from insitu.runtime.passes import Outputs, Pass
from insitu.runtime.probe import Call

if TYPE_CHECKING:
    from insitu.models.language_model import LanguageModel
    from insitu.models.separation import Separation
    from insitu.models.terms import Terms
    from insitu.runtime.job_parts import JobPrompt, ProcedureName

# Options of a forward that mean the same for each prompt of a batch as for one alone.
_BATCHABLE = frozenset(
    ["output_attentions", "output_hidden_states", "return_dict", "use_cache", OPTION]
)


_NOT_CUT = Fallback("gradients of a batch are not what each prompt has alone")


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
        self._separations: dict[Hashable, Separation | Fallback] = {}
        plain = all(type(value) in (bool, int, float, str) for value in options.values())
        self._fixed = (budget, share, *options.items()) if plain else None

    def steps_of(self, request: Prompt) -> int:
        """Returns that there is one step."""
        return 1

    def demanding(self, request: Prompt, options: Mapping[str, Any]) -> Prompt:
        """Returns the prompt of an invocation with options that its values take."""
        return request.demanding(options)

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
            alone = (prompt.ids.shape, shifted, module.training, self._fixed)
            return (*alone, *prompt.demands.items()) if prompt.demands else alone
        seen: dict[Hashable, int] = {}
        form: list[Hashable] = []
        tokens = 0
        for number, prompt in enumerate(requests):
            if prompt.extras:
                return None
            tokens += prompt.ids.numel()
            first = seen.setdefault(content(number, prompt), number)
            padded = (prompt.mask is None, prompt.positions is None)
            form.append((prompt.ids.shape, *padded, first, *prompt.demands.items()))
        budget = self._budget or default_budget(self._model, tokens)
        return (tuple(form), budget, self._model.is_training, self._model.has_hooks, self._fixed)

    def schedule(self, module: nn.Module, requests: Sequence[Prompt], work: Work) -> Schedule:
        """Returns what gives the passes: as few, and with as little work, as it takes."""
        if len(requests) == 1:
            return self._one_by_one(requests, work, None)
        obstacle = self._obstacle()
        if obstacle is not None:
            logger.info("%d prompts run one by one: %s", len(requests), obstacle.why)
            return self._one_by_one(requests, work, obstacle)
        terms = self._terms(requests, work)
        apart = Counter(term.why for term in terms if isinstance(term, Fallback))
        for why, count in apart.items():
            logger.info("%d of %d prompts run one by one: %s", count, len(requests), why)
        tokens = sum(prompt.ids.numel() for prompt in requests)
        budget = self._budget or default_budget(self._model, tokens)
        from insitu.models.batches import Batches  # takes a while, and one prompt needs none

        options = (self._model, self._options, terms, module)
        return Batches(*options, requests, work, budget, self._share).passes

    def halved(self, requests: Sequence[Prompt]) -> LanguageForward | None:
        """Returns the same with passes of half as many tokens at most, in which nothing is shared.

        Args:
            requests: the prompts of a pass that is too large.
        """
        tokens = sum(prompt.ids.shape[0] for prompt in requests)
        tokens *= max(prompt.ids.shape[1] for prompt in requests)
        if self._budget is not None:
            tokens = min(tokens, self._budget)
        if tokens == 1:
            return None
        options = dict(self._options)
        return LanguageForward(self._model, options, tokens // 2, False, self._dry)

    def check_tokens(self, location: Location) -> None:
        """Raises: a forward chooses no tokens."""
        raise OptionError("A trace chooses no tokens: use `generate`.", location)

    def outputs(self, results: Sequence[Any], requests: Sequence[Prompt]) -> Outputs | None:
        """Returns nothing: the output of a forward is a site."""
        return None

    def _obstacle(self) -> Fallback | None:
        """Why no invocation shares a pass, None if some may."""
        if self._model.trains():
            return Fallback("in training mode each prompt has its own random numbers")
        if self._model.has_hooks:
            return SEEN_ALONE
        if further := sorted(self._options.keys() - _BATCHABLE):
            return Fallback(f"`{further[0]}` may mean something else for a batch")
        return None

    def _terms(self, requests: Sequence[Prompt], work: Work) -> list[Terms | Fallback]:
        """On which terms each invocation shares a pass, or why it shares none."""
        from insitu.models.terms import Terms, sides_of  # of no use to one prompt

        demands = _joint_demands(requests, work)
        separations: list[Separation | Fallback] = []
        sites: list[list[Address]] = [[] for _ in requests]
        written: list[list[Address]] = [[] for _ in requests]
        for address, index in work.plan.reads.items():
            number, path, _, call, step = address
            if index in work.plan.skips:
                written[number].append((number, path, "output", call, step))
            if not work.plan.only_skips(index):
                sites[number].append(address)
        for address in work.written:
            written[address[0]].append(address)
        differentiated: list[list[Address]] = [[] for _ in requests]
        for address in work.differentiated:
            differentiated[address[0]].append(address)
        sides = sides_of(requests)
        for number, prompt in enumerate(requests):
            found = work.asked[number].alone or self._separation(
                prompt, demands[number], sides[number]
            )
            if not isinstance(found, Fallback):
                obstacle = found.obstacle(sites[number], written[number])
                obstacle = obstacle or found.shared_by_rows(differentiated[number])
                found = found if obstacle is None else uncut(Site(*obstacle))
            if not isinstance(found, Fallback) and work.asked[number].differentiates:
                found = found if found.differentiates() else _NOT_CUT
            separations.append(found)
        known: dict[Hashable, int] = {}
        terms: list[Terms | Fallback] = []
        for found, asked, own, side in zip(separations, work.asked, demands, sides, strict=True):
            if isinstance(found, Fallback):
                terms.append(found)
                continue
            number = known.setdefault((side, asked, *own.items()), len(known))
            # All have been looked into by now, for functions inside of forwards.
            terms.append(Terms(number, {**own, **self._options}, found.layouts, side, asked))
        return terms

    def _separation(
        self, prompt: Prompt, demands: Mapping[str, Any], side: Side
    ) -> Separation | Fallback:
        """How to cut what a prompt's invocation reads out of a pass that it shares."""
        if extra := next(iter(prompt.extras), None):
            return Fallback(f"`{extra}` is of one prompt at a time")
        key = (self._model.loaded, side, (*demands.items(),), self._model.snapshot)
        if key not in self._separations:
            mark = prompt.mark

            def sample(batch: int, length: int) -> Call:
                ids = torch.zeros(batch, length, dtype=torch.int64)
                return self.example(counted(Prompt(ids, mark, demands=demands), side))

            def run(module: nn.Module, prompt: Prompt) -> None:
                options = {**demands, **self._options}
                kwargs = arguments(self._model, counted(prompt, side), options)
                forward(self._model, module, kwargs, [prompt])

            from insitu.models.sharing import separation_of  # of no use to one prompt

            given = (sample, run, self.views, side)
            self._separations[key] = separation_of(self._model, *given)
        return self._separations[key]

    def _one_by_one(
        self, requests: Sequence[Prompt], work: Work, apart: Fallback | None
    ) -> Schedule:
        """Gives a pass to each prompt; `apart` is why several have no pass together."""
        model, options = self._model, self._options
        sizes = [(prompt.ids.shape[0], prompt.ids.shape[1]) for prompt in requests]
        accounts = Accounts(model, work, sizes)
        why = "one prompt" if apart is None else apart.why
        passes = [
            alone(model, n, options, partial(accounts.alone, n, why), apart, asked.differentiates)
            for n, asked in enumerate(work.asked)
        ]
        if len(passes) == 1:
            only = passes[0]
            return lambda module, requests: [only(module, requests[0])]

        def schedule(module: nn.Module, requests: Sequence[Prompt]) -> list[Pass]:
            pairs = zip(passes, requests, strict=True)
            return [single(module, prompt) for single, prompt in pairs]

        return schedule


def _joint_demands(requests: Sequence[Prompt], work: Work) -> list[Mapping[str, Any]]:
    """The options that each invocation demands, and those that cannot run without it."""
    demands = [prompt.demands for prompt in requests]
    if len({(*each.items(),) for each in demands}) > 1 and work.plan.crosses:
        edges = uses(work.graph, work.plan, work.moments)
        firsts = rings(edges, len(requests))
        for number, first in enumerate(firsts):
            demands[first] = {**demands[first], **demands[number]}
        demands = [demands[first] for first in firsts]
    return demands
