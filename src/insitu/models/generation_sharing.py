"""Which prompts of a generation go on in one batch as they would alone, on a model.

The model's settings, its trials and the lines of each prompt say so. How prompts that may share a
pass are divided is in `generated_together.py`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin

from insitu.batching.layout import Axis, Layouts, TensorLayout
from insitu.batching.procedure import Work
from insitu.engine.keeping import undisturbed
from insitu.graph.node import Address, Site
from insitu.models.batching import is_ragged
from insitu.models.calls import default_budget
from insitu.models.configuration import all_said, text_config
from insitu.models.generate_calls import GenerateCalls
from insitu.models.generated_together import (
    Together,
    divided,
    drawing,
    entries_used,
    unlike_alone,
)
from insitu.models.generation_passes import NO_LAYOUTS, StepLayouts
from insitu.models.later_steps import LaterSteps
from insitu.models.padding import padding_shows
from insitu.models.pieces import lengths_of
from insitu.models.prompts import Prompt
from insitu.models.separation import OF_STEPS, later_obstacle
from insitu.models.sharing import separation_of
from insitu.runtime.fallback import SEEN_ALONE, Fallback, tried, uncut
from insitu.runtime.order import uses

# Of the whole model's places that are no module's.
_BY_ROW: Layouts = {("", kind, 0): TensorLayout((Axis.ROWS,)) for kind in OF_STEPS}


class GenerationSharing:
    """Decides which prompts share a generation.

    Args:
        calls: how `generate` is called.
    """

    def __init__(self, calls: GenerateCalls) -> None:
        self._calls = calls

    def divided(
        self, module: nn.Module, requests: Sequence[Prompt], work: Work, budget: int | None
    ) -> tuple[list[Together], Sequence[StepLayouts]]:
        """Which prompts share a pass, and how to cut what each reads out of it."""
        layouts = [NO_LAYOUTS] * len(requests)
        why = self._unbatchable(module)
        whys: list[Fallback | None] = [why] * len(requests)
        keys: list[Hashable] = [None] * len(requests)
        if why is None:
            whys, layouts = self._uncut(requests, work)
            keys = self._sharing(requests)
        steps = [self._calls.at_most(prompt) for prompt in requests]
        crossing = uses(work.graph, work.plan, work.moments)
        tokens = sum(
            p.ids.numel() + n * p.ids.shape[0] for p, n in zip(requests, steps, strict=True)
        )
        most = budget or default_budget(self._calls.model, tokens)
        return divided(requests, whys, keys, crossing, steps, most), layouts

    def _uncut(
        self, requests: Sequence[Prompt], work: Work
    ) -> tuple[list[Fallback | None], list[StepLayouts]]:
        """Why each prompt cannot be cut out of a batch, None if it can; and how values are cut."""
        whys: list[Fallback | None] = [None] * len(requests)
        layouts = [NO_LAYOUTS] * len(requests)
        alike: dict[Hashable, list[int]] = {}
        for number, prompt in enumerate(requests):
            alike.setdefault((*prompt.demands.items(),), []).append(number)
        for numbers in alike.values():
            found, cut = self._uncut_alike(numbers, requests, work)
            for number, why in zip(numbers, found, strict=True):
                whys[number], layouts[number] = why, cut
        return whys, layouts

    def _uncut_alike(
        self, numbers: Sequence[int], requests: Sequence[Prompt], work: Work
    ) -> tuple[list[Fallback | None], StepLayouts]:
        """The same for prompts whose values take the same options."""
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
            return [separation] * len(numbers), NO_LAYOUTS
        reads: dict[int, list[Address]] = {number: [] for number in numbers}
        for address in work.plan.reads:
            if address[0] in reads:
                reads[address[0]].append(address)
        later = separation.later_steps([address for own in reads.values() for address in own])
        used = partial(entries_used, work.graph, work.plan)
        written = set(work.written)
        most = max(self._calls.at_most(prompt) for prompt in requests)
        draw = drawing(work.graph, work.plan)
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
        first = {**separation.layouts, **separation.some, **_BY_ROW}
        after = {**later.layouts, **_BY_ROW} if isinstance(later, LaterSteps) else _BY_ROW
        return whys, StepLayouts(first, after)

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
        generating: Any = model.modules[model.generating]
        plain: Any = GenerationMixin
        if type(generating).generate is plain.generate or not model.loaded:
            return None
        taken: list[bool] = []

        def loop(model: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            taken.append(True)
            return input_ids

        def generate() -> None:
            ids = torch.full((1, 1), model.pad_id + 1 if model.pad_id == 0 else 0)
            mask = torch.ones_like(ids)
            kwargs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 1}
            with undisturbed(model.modules):
                module.generate(**model.placement.moved(kwargs), custom_generate=loop)  # pyright: ignore[reportCallIssue]

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

    def _sharing(self, requests: Sequence[Prompt]) -> list[Hashable]:
        """What is equal for prompts that do not change each other in a batch."""
        lengths = lengths_of(self._calls.model)
        padded = is_ragged(requests) and padding_shows(self._calls.model) is not None
        steps = [self._calls.at_most(prompt) for prompt in requests]
        most, longest = max(steps), max(prompt.ids.shape[1] for prompt in requests)
        # Rows that have ended take up positions, as long as others go on.
        context = self._calls.model.reader.limits.context
        crowded = context is not None and longest + most > context
        return [
            (
                lengths.sharing(prompt.ids.shape[1], most),
                prompt.ids.shape[1] if padded else None,
                own if crowded else None,
                *prompt.demands.items(),
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
        """Whether keys and values are a part of what is at a site."""
        return self._calls.cached and site[2] == "output" and site[1] in self._calls.views
