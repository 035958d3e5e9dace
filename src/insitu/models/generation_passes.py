"""The passes of a generation: a `generate` of one prompt, or of several in one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.generation.stopping_criteria import StopStringCriteria

from insitu.batching.demand import Terms
from insitu.batching.pass_plan import PassPlan, Row
from insitu.batching.shares import Share
from insitu.engine.interpose import Own
from insitu.engine.job_outcome import Outputs
from insitu.engine.model_call import Cut, Deliver, Pass, Steps
from insitu.engine.seams import listened
from insitu.models.attention import OPTION
from insitu.models.choosing import listening, seeded
from insitu.models.generate_calls import GenerateCalls
from insitu.models.given_caches import own_copies
from insitu.models.joined_prompts import join
from insitu.models.prompts import Prompt
from insitu.models.separation import OF_STEPS


class Generated(NamedTuple):
    """What a pass gave, where there are several prompts.

    Attributes:
        result: what `generate` returned.
        steps: how many tokens each prompt of it got, by the number of its invocation; of one that
            is alone, that is not needed.
    """

    result: Any
    steps: Mapping[int, int]


class GenerationPasses:
    """Makes the passes of generations.

    Args:
        calls: how `generate` is called.
    """

    def __init__(self, calls: GenerateCalls) -> None:
        self._calls = calls

    def passes(
        self, plans: Sequence[PassPlan], module: nn.Module, requests: Sequence[Prompt]
    ) -> list[Pass]:
        """Returns generations ready to be called.

        Args:
            plans: what each of them does.
            module: the wrapped module.
            requests: the prompts of all invocations.
        """
        passes: list[Pass] = []
        for single in plans:
            tokens = any(address[2] in OF_STEPS for address in single.reads)
            if single.terms is not None and len(single.rows) > 1:
                passes.append(self._of_several(single.rows, single.terms, tokens, module, requests))
            else:
                passes.append(self._of_one(single, tokens, module, requests))
        return passes

    def _of_one(
        self, single: PassPlan, tokens: bool, module: nn.Module, requests: Sequence[Prompt]
    ) -> Pass:
        """The pass of one prompt."""
        number, among_others = single.rows[0].invocation, len(requests) > 1
        prompt = requests[number]
        self._calls.check_length([prompt])
        kwargs = self._calls.arguments(prompt)
        implementation = kwargs.pop(OPTION, None)

        def call(deliver: Deliver, _: Own) -> Any:
            # In the run, not before: see `forward` in `calls.py`.
            placed = self._calls.model.traits.placement.moved(kwargs)
            if prompt.extras:
                placed |= own_copies({name: placed[name] for name in prompt.extras})
            if tokens or self._tells_tokens():
                placed |= listening(deliver, placed)
            with seeded(prompt.seed):
                result = self._calls.generate(module, implementation, [prompt], placed)
            return Generated(result, {number: 0}) if among_others else result

        steps = Steps(self._calls.model.traits.generating, {})
        return Pass(call, {number: None}, may_stop=False, steps=steps)

    def _of_several(
        self,
        rows: Sequence[Row],
        terms: Terms,
        tokens: bool,
        module: nn.Module,
        requests: Sequence[Prompt],
    ) -> Pass:
        """The pass of several prompts."""
        from insitu.models.decoding import Continued, Decoding  # of no use to one prompt

        prompts = [requests[row.invocation] for row in rows]
        self._calls.check_length(prompts)
        batch = join(prompts, terms.side, self._calls.pad_id)
        given: dict[str, Any] = {"steps": max(row.tokens for row in rows), "demands": terms.options}
        whole = Prompt(batch.ids, prompts[0].mark, batch.mask, **given)
        kwargs, criteria = self._without_criteria(self._calls.arguments(whole))
        implementation = kwargs.pop(OPTION, None)
        steps = Steps(self._calls.model.traits.generating, {})
        continued: list[Continued] = []
        cuts: dict[int, Cut | None] = {}
        for row, prompt, part in zip(rows, prompts, batch.parts, strict=True):
            start = 0 if self._calls.model.traits.is_encoder_decoder else part.positions.start
            own = (row.invocation, part.rows, start, prompt.ids, row.tokens, prompt.seed)
            continued.append(Continued(*own))
            cuts[row.invocation] = Share(terms.layouts, part, later=terms.later)

        def call(deliver: Deliver, _: Own) -> Any:
            # In the run, not before: see `forward` in `calls.py`.
            placed = self._calls.model.traits.placement.moved(kwargs)
            asked = deliver if tokens or self._tells_tokens() else None
            placed["custom_generate"] = Decoding(continued, steps.ended, asked, criteria).run
            result = self._calls.generate(module, implementation, prompts, placed)
            return Generated(result, {number: steps.ended[number] for number in cuts})

        return Pass(call, cuts, may_stop=False, steps=steps)

    def _tells_tokens(self) -> bool:
        """Whether somebody hears which token each step chooses, and steps choose tokens."""
        return listened() and not (self._calls.other_search or self._calls.more_forwards)

    def _without_criteria(
        self, kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], Sequence[Callable[..., Any]]]:
        """Takes out of options the stopping criteria that look at ids, and makes these."""
        strings, tokenizer = kwargs.get("stop_strings"), kwargs.get("tokenizer")
        if strings is None or tokenizer is None:  # which `generate` refuses
            return kwargs, ()
        rest = {n: one for n, one in kwargs.items() if n not in ("stop_strings", "tokenizer")}
        return rest, [StopStringCriteria(tokenizer, strings)]

    def outputs(self, results: Sequence[Any], requests: Sequence[Prompt]) -> Outputs | None:
        """Returns what `generate` gave, as one for all prompts and for each."""
        if len(requests) == 1:
            only = results[0]  # None if it failed, as others of its block did
            return Outputs(only, [None if only is None else _sequences(only)])
        each: dict[int, torch.Tensor] = {}
        for generated in results:
            if generated is None:  # its pass failed
                continue
            if len(generated.steps) == 1:  # it may have other rows than its prompt, as of beams
                each[next(iter(generated.steps))] = _sequences(generated.result)
                continue
            prompts = [requests[number] for number in generated.steps]
            sizes = [
                (prompt.ids.shape[0], self._calls.given(prompt), steps)
                for prompt, steps in zip(prompts, generated.steps.values(), strict=True)
            ]
            rows = _rows_apart(_sequences(generated.result), sizes)
            each.update(zip(generated.steps, rows, strict=True))
        if len(each) < len(requests):
            return Outputs(None, [each.get(number) for number in range(len(requests))])
        ordered = [each[number] for number in range(len(requests))]
        limits = {self._calls.most_of(prompt) for prompt in requests}
        if len(results) == 1 and len(limits) == 1:
            return Outputs(results[0].result, ordered)
        return Outputs(self.whole(ordered, requests), ordered)

    def whole(self, each: Sequence[torch.Tensor], requests: Sequence[Prompt]) -> torch.Tensor:
        """Returns what one `generate` on some prompts would return, from what each returned."""
        if len(each) == 1:
            return each[0]
        given = [self._calls.given(prompt) for prompt in requests]
        return _rows_together(each, given, self._calls.pad_id)


def _sequences(result: Any) -> torch.Tensor:
    """The token ids in what `generate` returned."""
    return result if isinstance(result, torch.Tensor) else result.sequences


def _rows_apart(
    sequences: torch.Tensor, sizes: Sequence[tuple[int, int, int]]
) -> list[torch.Tensor]:
    """Each prompt's rows of a batch, without the padding of its neighbours.

    Args:
        sequences: what was generated, `(rows, position)`, padded on the left.
        sizes: each prompt's rows, how many tokens of them were not generated, and how many were.
    """
    length = max(given for _, given, _ in sizes)
    each: list[torch.Tensor] = []
    first = 0
    for rows, given, steps in sizes:
        each.append(sequences[first : first + rows, length - given : length + steps])
        first += rows
    return each


def _rows_together(each: Sequence[torch.Tensor], given: Sequence[int], pad_id: int) -> torch.Tensor:
    """Rows that were generated one by one as a batch would have padded them.

    Args:
        each: each prompt's rows, `(rows, position)`.
        given: how many tokens of them were not generated.
        pad_id: the id that fills padding.
    """
    before = max(given)
    pairs = list(zip(each, given, strict=True))
    after = max(own.shape[1] - length for own, length in pairs)
    rows: list[torch.Tensor] = []
    for own, length in pairs:
        left = before - length
        right = before + after - left - own.shape[1]
        rows.append(torch.nn.functional.pad(own, (left, right), value=pad_id))
    return torch.cat(rows)
