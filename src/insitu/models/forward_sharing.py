"""What the prompts of a `trace` demand of their passes: on which terms they share them, or why not.

The model's trials decide it, whose values are compared, and what each prompt's lines read and
write. Which of those that may share a pass do is decided by the planner (`batching/`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from insitu.batching.arrangement import rings
from insitu.batching.asked import NOTHING
from insitu.batching.crossings import uses
from insitu.batching.demand import Chain, Demand, Demands, Side, Terms, Work
from insitu.batching.shared_blocks import may_branch
from insitu.engine.fallback import SEEN_ALONE, Fallback, logger, uncut
from insitu.engine.probe import Call
from insitu.graph.node import Address, Site
from insitu.models.attention import OPTION
from insitu.models.calls import arguments, content, default_budget, forward
from insitu.models.joined_prompts import sides_of
from insitu.models.pieces import lengths_of
from insitu.models.prompts import Prompt, counted
from insitu.models.sharing import chain_of, separation_of

if TYPE_CHECKING:
    from insitu.models.language_subject import LanguageSubject
    from insitu.models.separation import Separation

# Options of a forward that mean the same for each prompt of a batch as for one alone.
_BATCHABLE = frozenset(
    ["output_attentions", "output_hidden_states", "return_dict", "use_cache", OPTION]
)
_NOT_CUT = Fallback("gradients of a batch are not what each prompt has alone")
_SHIFTED = Fallback("positions begin behind the padding of each row")


class ForwardSharing:
    """Finds out what several prompts of a `trace` demand.

    Args:
        model: the model.
        options: keyword arguments for its forward.
        budget: how many tokens a pass may have, as of `LanguageForward`.
        share: whether invocations of one prompt share, as of `LanguageForward`.
    """

    def __init__(
        self,
        model: LanguageSubject,
        options: Mapping[str, Any],
        budget: int | None,
        share: bool | None,
    ) -> None:
        self._model, self._options = model, options
        self._budget, self._share = budget, share
        self._separations: dict[Hashable, Separation | Fallback] = {}

    def demands(self, module: nn.Module, requests: Sequence[Prompt], work: Work) -> Demands:
        """Returns what prompts demand, and what the planner must know of the model.

        Args:
            module: the wrapped module, with its weights.
            requests: the prompts.
            work: what the passes are for.
        """
        model = self._model
        sizes = [(prompt.ids.shape[0], prompt.ids.shape[1]) for prompt in requests]
        obstacle = self._obstacle()
        if obstacle is not None:
            pairs = zip(sizes, work.asked, strict=True)
            return Demands(
                [Demand(*size, None, obstacle, own.differentiates) for size, own in pairs]
            )
        lengths = lengths_of(model)
        each: list[Demand] = []
        for number, found in enumerate(self._terms(requests, work)):
            asked, (rows, length) = work.asked[number], sizes[number]
            if isinstance(found, Fallback):
                each.append(Demand(rows, length, None, found, asked.differentiates))
                continue
            shares = self._share is not False and asked == NOTHING
            equal = content(number, requests[number]) if shares else None
            rest = (None, asked.differentiates, lengths.sharing(length), equal)
            each.append(Demand(rows, length, found, *rest))
        chains = {
            number: self._chain(module, each[first].terms)
            for number, first in may_branch(each, work).items()
        }
        tokens = sum(prompt.ids.numel() for prompt in requests)
        heads = model.traits.unembedding_paths
        chooses = "logits_to_keep" in model.traits.forward_parameters and len(heads) == 1
        return Demands(
            each,
            self._budget or default_budget(model, tokens),
            model.traits.costs,
            self._share is True,
            chains,
            tuple(model.traits.block_views[False]),
            heads[0] if chooses else None,
        )

    def _obstacle(self) -> Fallback | None:
        """Why no invocation shares a pass, None if some may."""
        if self._model.trains():
            return Fallback("in training mode each prompt has its own random numbers")
        if self._model.has_hooks:
            return SEEN_ALONE
        if further := sorted(self._options.keys() - _BATCHABLE):
            return Fallback(f"`{further[0]}` may mean something else for a batch")
        return None

    def _chain(self, module: nn.Module, terms: Terms | None) -> Chain | Fallback:
        """The blocks at which forwards can begin, or why they cannot."""
        assert terms is not None
        found: Chain | Fallback = _SHIFTED
        if terms.side == "right":
            found = chain_of(self._model, module, terms.layouts, terms.options)
        if isinstance(found, Fallback):
            logger.info("Prompts that are equal share no blocks: %s", found.why)
        return found

    def _terms(self, requests: Sequence[Prompt], work: Work) -> list[Terms | Fallback]:
        """On which terms each invocation shares a pass, or why it shares none."""
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
                prompt = counted(Prompt(ids, mark, demands=demands), side)
                return Call((), arguments(self._model, prompt, self._options))

            def run(module: nn.Module, prompt: Prompt) -> None:
                options = {**demands, **self._options}
                kwargs = arguments(self._model, counted(prompt, side), options)
                forward(self._model, module, kwargs, [prompt])

            views = self._model.traits.block_views[bool(self._options.get("use_cache"))]

            given = (sample, run, views, side)
            self._separations[key] = separation_of(self._model, *given)
        return self._separations[key]


def _joint_demands(requests: Sequence[Prompt], work: Work) -> list[Mapping[str, Any]]:
    """The options that each invocation demands, and those that cannot run without it."""
    demands = [prompt.demands for prompt in requests]
    if len({(*each.items(),) for each in demands}) > 1 and work.plan.crosses:
        firsts = rings(uses(work.graph, work.plan), len(requests))
        for number, first in enumerate(firsts):
            demands[first] = {**demands[first], **demands[number]}
        demands = [demands[first] for first in firsts]
    return demands
