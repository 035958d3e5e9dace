"""Which prompts of a generation go on in one batch as they would alone, on a model.

The model's settings, its trials and the lines of each prompt say so. Which of those that may share
a pass do is decided by the planner (`batching/`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin

from insitu.batching.asked import NOTHING
from insitu.batching.demand import Demand, Demands, Terms, Work
from insitu.batching.layout import Axis, Layouts, TensorLayout
from insitu.engine.fallback import SEEN_ALONE, Fallback, tried, uncut
from insitu.engine.keeping import undisturbed
from insitu.graph.node import Address, Site
from insitu.models.calls import default_budget
from insitu.models.configuration import all_said, text_config
from insitu.models.generate_calls import GenerateCalls
from insitu.models.generation_obstacles import entries_used, unlike_alone
from insitu.models.joined_prompts import is_ragged
from insitu.models.later_steps import LaterSteps
from insitu.models.padding import padding_shows
from insitu.models.pieces import lengths_of
from insitu.models.prompts import Prompt
from insitu.models.separation import OF_STEPS, later_obstacle
from insitu.models.sharing import separation_of

# Of the whole model's places that are no module's.
_BY_ROW: Layouts = {("", kind, 0): TensorLayout((Axis.ROWS,)) for kind in OF_STEPS}


class GenerationSharing:
    """Finds out what several prompts of a `generate` demand.

    Args:
        calls: how `generate` is called.
    """

    def __init__(self, calls: GenerateCalls) -> None:
        self._calls = calls

    def demands(
        self, module: nn.Module, requests: Sequence[Prompt], work: Work, budget: int | None
    ) -> Demands:
        """Returns what prompts demand.

        Args:
            module: the wrapped module, with its weights.
            requests: the prompts.
            work: what the passes are for.
            budget: how many tokens a pass may have, where it has several prompts; None for what
                fits into memory.
        """
        found = self._terms(module, requests, work)
        steps = [self._calls.at_most(prompt) for prompt in requests]
        some = any(isinstance(terms, Terms) for terms in found)
        likes = self._likes(requests) if some else []
        each: list[Demand] = []
        tokens = 0
        for number, prompt in enumerate(requests):
            rows, length = prompt.ids.shape
            tokens += rows * (length + steps[number])
            terms, differentiates = found[number], work.asked[number].differentiates
            if isinstance(terms, Fallback):
                given = (None, terms, differentiates, None, None)
            else:
                given = (terms, None, differentiates, likes[number], None)
            each.append(Demand(rows, length, *given, steps[number]))
        most = budget or default_budget(self._calls.model, tokens)
        return Demands(each, most, blocks=tuple(self._calls.views))

    def _terms(
        self, module: nn.Module, requests: Sequence[Prompt], work: Work
    ) -> list[Terms | Fallback]:
        """On which terms each prompt shares a pass, or why it shares none."""
        why = self._unbatchable(module)
        if why is not None:
            return [why] * len(requests)
        found: dict[int, Terms | Fallback] = {}
        alike: dict[Hashable, list[int]] = {}
        for number, prompt in enumerate(requests):
            alike.setdefault((*prompt.demands.items(),), []).append(number)
        for number, numbers in enumerate(alike.values()):
            found |= self._terms_alike(number, numbers, requests, work)
        return [found[number] for number in range(len(requests))]

    def _terms_alike(
        self, terms: int, numbers: Sequence[int], requests: Sequence[Prompt], work: Work
    ) -> dict[int, Terms | Fallback]:
        """The same for prompts whose values take the same options.

        Args:
            terms: the number of the terms of those that share a pass.
            numbers: the prompts.
            requests: all prompts of the block.
            work: what the passes are for.
        """
        demands = requests[numbers[0]].demands
        separation = separation_of(
            self._calls.model,
            lambda batch, length: self._calls.first_forward(
                torch.zeros(batch, length).long(), demands=demands
            ),
            lambda module, prompt: self._calls.begin(module, prompt.demanding(demands)),
            self._calls.views,
            self._calls.side,
            lambda module, prompt, tokens: self._calls.go_on(
                module, prompt.demanding(demands), tokens
            ),
        )
        if isinstance(separation, Fallback):
            return dict.fromkeys(numbers, separation)
        reads: dict[int, list[Address]] = {number: [] for number in numbers}
        for address in work.plan.reads:
            if address[0] in reads:
                reads[address[0]].append(address)
        later = separation.later_steps([address for own in reads.values() for address in own])
        used = partial(entries_used, work.graph, work.plan)
        written = set(work.written)
        most = max(self._calls.at_most(prompt) for prompt in requests)
        draw = set[int]().union(*work.plan.drawing.values())
        whys: list[Fallback | None] = []
        for number, own in reads.items():
            prompt = requests[number]
            obstacle = separation.obstacle(own, written.intersection(own), used)
            why = work.asked[number].apart or self._unlike_others(prompt)
            if why is None and prompt.seed is not None and number in draw:
                why = Fallback("what its lines draw comes from its seed too")
            if obstacle is None and self._outgrows_windows(requests):
                obstacle = next((site for site in own if self._has_cache(site)), None)
            if obstacle is None and isinstance(later, LaterSteps):
                obstacle = later_obstacle(later, own, written, used)
                if obstacle is None and self._outgrows_windows(requests, most):
                    obstacle = next((at for at in own if at[4] and later.grows(at)), None)
            if why is None and obstacle is not None:
                why = uncut(Site(*obstacle))
            if why is None and isinstance(later, Fallback) and any(at[4] for at in own):
                why = later
            whys.append(why)
        # All have been looked into by now, for functions inside of forwards.
        layouts = {**separation.layouts, **separation.some, **_BY_ROW}
        after = {**later.layouts, **_BY_ROW} if isinstance(later, LaterSteps) else _BY_ROW
        shared = Terms(terms, demands, layouts, self._calls.side, NOTHING, after)
        return {
            number: shared if why is None else why
            for number, why in zip(numbers, whys, strict=True)
        }

    def _unbatchable(self, module: nn.Module) -> Fallback | None:
        """Why no two prompts go on in a batch as they would alone, None if some do."""
        if self._calls.model.has_hooks:
            return SEEN_ALONE
        if self._calls.model.trains():
            return Fallback("in training mode each prompt has its own random numbers")
        given = self._calls.options.get("generation_config")
        own = getattr(module, "generation_config", None)
        configs = [config for config in (given, own) if config is not None]
        option = unlike_alone(self._calls.options, configs)
        if option is not None:
            return Fallback(f"with `{option}` a prompt may go on otherwise in a batch")
        return self._own_loop(module)

    def _own_loop(self, module: nn.Module) -> Fallback | None:
        """Why a loop cannot be given to the model's `generate`, None if it can."""
        model = self._calls.model
        generating: Any = model.modules[model.traits.generating]
        plain: Any = GenerationMixin
        if type(generating).generate is plain.generate or not model.loaded:
            return None
        taken: list[bool] = []

        def loop(model: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            taken.append(True)
            return input_ids

        def generate() -> None:
            ids = torch.full((1, 1), model.traits.pad_id + 1 if model.traits.pad_id == 0 else 0)
            mask = torch.ones_like(ids)
            kwargs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 1}
            with undisturbed(model.snapshot):
                module.generate(**model.traits.placement.moved(kwargs), custom_generate=loop)  # pyright: ignore[reportCallIssue]

        with model.in_use():
            failed = tried(generate, "a generation")
        if failed is None and not taken:
            return Fallback(f"{type(generating).__name__} generates in a way of its own")
        return failed

    def _unlike_others(self, prompt: Prompt) -> Fallback | None:
        """Why a prompt does not go on in a batch as it would alone, None if it does."""
        if prompt.extras:
            return Fallback(f"`{next(iter(prompt.extras))}` is of one prompt at a time")
        option = unlike_alone(prompt.demands, ())
        if option is not None:
            return Fallback(f"with `{option}` a prompt may go on otherwise in a batch")
        steps = self._calls.most_of(prompt)
        if steps is None:
            return Fallback("without `max_new_tokens` padding counts towards the total length")
        if steps < 1:
            return Fallback("the prompt is longer than `max_length`")
        return None

    def _likes(self, requests: Sequence[Prompt]) -> list[Hashable]:
        """Keys that are equal for prompts that do not change each other in a batch."""
        lengths = lengths_of(self._calls.model)
        padded = is_ragged(requests) and padding_shows(self._calls.model) is not None
        steps = [self._calls.at_most(prompt) for prompt in requests]
        most, longest = max(steps), max(prompt.ids.shape[1] for prompt in requests)
        # Rows that have ended take up positions, as long as others go on.
        context = self._calls.model.traits.reader.limits.context
        crowded = context is not None and longest + most > context
        return [
            (
                lengths.sharing(prompt.ids.shape[1], most),
                prompt.ids.shape[1] if padded else None,
                own if crowded else None,
            )
            for prompt, own in zip(requests, steps, strict=True)
        ]

    def _outgrows_windows(self, requests: Sequence[Prompt], steps: int = 0) -> bool:
        """Whether a cache may hold fewer positions than the longest prompt has after some steps.

        It holds the last, with the padding of the shorter prompts among them.
        """
        text = text_config(self._calls.model.config)
        windows = all_said(text, "sliding_window", "attention_chunk_size")
        longest = max(prompt.ids.shape[1] for prompt in requests)
        return any(isinstance(window, int) and longest + steps >= window for window in windows)

    def _has_cache(self, site: Address) -> bool:
        """Whether keys and values are a part of the value at a site."""
        return self._calls.cached and site[2] == "output" and site[1] in self._calls.views
