"""How several prompts of one generation choose their tokens: each as it would alone.

`generate` of Transformers prepares a batch and hands its loop to us (`custom_generate`). The loop
is Transformers' own; what it asks in each step is answered here for each prompt. Logits processors
and stopping criteria see the prompt's own rows without padding. Sampling draws from its own seed. A
prompt whose rows have all ended has no further steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import MaxLengthCriteria

from insitu.engine.model_call import Deliver
from insitu.models.choosing import NO_CHOICE, only

# Logits processors that look at one row of scores at a time, and at nothing else.
_ROW_BY_ROW = """
    EpsilonLogitsWarper EtaLogitsWarper InfNanRemoveLogitsProcessor LogitNormalization
    MinPLogitsWarper SuppressTokensLogitsProcessor TemperatureLogitsWarper TopHLogitsWarper
    TopKLogitsWarper TopPLogitsWarper TypicalLogitsWarper
"""
_BY_ROW = frozenset(_ROW_BY_ROW.split())


class Continued(NamedTuple):
    """A prompt in a batch that is continued.

    Attributes:
        number: the number of its invocation.
        rows: its rows in the batch.
        start: at which position of the batch its ids begin.
        ids: its own ids, which an encoder may have processed.
        steps: how many tokens it has, at most.
        seed: where its sampling starts; None for what comes next of the random state.
    """

    number: int
    rows: slice
    start: int
    ids: torch.Tensor
    steps: int
    seed: int | None


class _Processor(Protocol):
    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor: ...


class Decoding:
    """The loop of one generation of several prompts.

    Args:
        prompts: the prompts.
        ended: gets the invocations that have ended, with how many steps each had.
        deliver: is given the tokens of each step, and returns those that are to be chosen; None if
            nobody asks for them.
        criteria: further stopping criteria, which look at the ids alone.
    """

    def __init__(
        self,
        prompts: Sequence[Continued],
        ended: dict[int, int],
        deliver: Deliver | None,
        criteria: Sequence[Callable[..., Any]],
    ) -> None:
        self._prompts = prompts
        self._ended = ended
        self._deliver = deliver
        self._criteria = criteria

    def run(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Is the loop of a `generate`, as `custom_generate` takes one.

        Args:
            model: what generates.
            input_ids: the prompts, padded.
            logits_processor: those of the batch.
            stopping_criteria: those of the batch.
            generation_config: the options.
            model_kwargs: what its forwards are called with.
        """
        groups = self._groups()
        stages = [_stage(processor, groups) for processor in logits_processor]
        if len(groups) > 1 and any(type(one).__name__ not in _BY_ROW for one in logits_processor):
            made = [
                _processors(model, group, input_ids, generation_config, model_kwargs)
                for group in groups
            ]
            stages = [
                _stage(whole, groups, own)
                for whole, *own in zip(logits_processor, *made, strict=True)
            ]
        chooser = _Chooser(stages, self._prompts, self._deliver, generation_config.do_sample)
        ending = _Ending(
            [*stopping_criteria, *self._criteria], groups, self._prompts, self._ended, self._deliver
        )
        limits = [one for one in stopping_criteria if isinstance(one, MaxLengthCriteria)]
        config = copy.copy(generation_config)
        config.do_sample = False  # drawn in the chooser
        return type(model)._sample(
            model,
            input_ids,
            logits_processor=LogitsProcessorList([chooser]),
            stopping_criteria=StoppingCriteriaList([*limits, ending]),
            generation_config=config,
            **model_kwargs,
        )

    def _groups(self) -> list[_Group]:
        """The prompts whose ids begin at one position and have as many tokens, together."""
        found: dict[tuple[int, int, int], list[Continued]] = {}
        for prompt in self._prompts:
            key = (prompt.start, prompt.ids.shape[1], prompt.steps)
            found.setdefault(key, []).append(prompt)
        return [_Group(prompts) for prompts in found.values()]


class _Group:
    """Prompts that logits processors and stopping criteria may see as one batch.

    Args:
        prompts: prompts of one length, with as many steps.
    """

    def __init__(self, prompts: Sequence[Continued]) -> None:
        self.prompts = prompts
        self.start = prompts[0].start
        self.steps = prompts[0].steps
        self.rows = [row for one in prompts for row in range(one.rows.start, one.rows.stop)]

    def ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns their ids without padding, from those of the batch."""
        return ids[self.rows, self.start :]


def _processors(
    model: Any,
    group: _Group,
    input_ids: torch.Tensor,
    generation_config: Any,
    model_kwargs: Mapping[str, Any],
) -> Any:
    """The logits processors that `generate` makes for a group alone."""
    own = group.ids(input_ids)
    length = own.shape[1]
    config = copy.copy(generation_config)
    config.max_length = length + group.steps
    if config.min_new_tokens is not None:  # which `generate` has made a length of the batch's
        config.min_length = length + config.min_new_tokens
    given = dict(model_kwargs)
    for name, offset in (("attention_mask", group.start), ("decoder_attention_mask", 0)):
        mask = given.get(name)
        if isinstance(mask, torch.Tensor):
            given[name] = mask[group.rows, offset:]
    encoded = torch.cat([prompt.ids for prompt in group.prompts]).to(input_ids.device)
    return model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=length,
        encoder_input_ids=encoded,
        prefix_allowed_tokens_fn=None,
        logits_processor=LogitsProcessorList(),
        device=input_ids.device,
        model_kwargs=given,
    )


def _stage(
    whole: _Processor, groups: Sequence[_Group], own: Sequence[_Processor] = ()
) -> _Processor:
    """A logits processor of a batch, which sees each group on its own if it looks at ids."""
    if not own or type(whole).__name__ in _BY_ROW:
        return whole

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for group, processor in zip(groups, own, strict=True):
            scores[group.rows] = processor(group.ids(ids), scores[group.rows])
        return scores

    return process


class _Chooser:
    """A logits processor that leaves each row the token that its prompt chooses.

    Args:
        stages: the logits processors.
        prompts: the prompts.
        deliver: as of `Decoding`.
        draws: whether tokens are drawn, and not the most probable ones.
    """

    def __init__(
        self,
        stages: Sequence[_Processor],
        prompts: Sequence[Continued],
        deliver: Deliver | None,
        draws: bool,
    ) -> None:
        self._stages = stages
        self._deliver = deliver
        self._draws = draws
        self._seeded = [prompt for prompt in prompts if prompt.seed is not None]
        self._others = [
            row
            for prompt in prompts
            if prompt.seed is None
            for row in range(prompt.rows.start, prompt.rows.stop)
        ]
        self._generators: list[torch.Generator] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for stage in self._stages:
            scores = stage(ids, scores)
        tokens = self._drawn(scores) if self._draws else None
        if self._deliver is not None:
            asked = torch.full_like(ids[:, -1], NO_CHOICE)
            chosen = self._deliver("choice", asked, vocabulary=scores.shape[-1])
            if chosen is not asked:
                tokens = scores.argmax(-1) if tokens is None else tokens
                tokens = torch.where(chosen == NO_CHOICE, tokens, chosen)
        return scores if tokens is None else only(scores, tokens)

    def _drawn(self, scores: torch.Tensor) -> torch.Tensor:
        """A token for each row: of prompts with a seed from it, of the others at once."""
        chances = torch.nn.functional.softmax(scores, dim=-1)
        if not self._seeded:
            return torch.multinomial(chances, 1).squeeze(1)
        if not self._generators:
            for prompt in self._seeded:
                generator = torch.Generator(scores.device)
                self._generators.append(generator.manual_seed(prompt.seed))  # pyright: ignore[reportArgumentType]
        tokens = torch.empty(scores.shape[0], dtype=torch.int64, device=scores.device)
        if self._others:
            tokens[self._others] = torch.multinomial(chances[self._others], 1).squeeze(1)
        for prompt, generator in zip(self._seeded, self._generators, strict=True):
            drawn = torch.multinomial(chances[prompt.rows], 1, generator=generator)
            tokens[prompt.rows] = drawn.squeeze(1)
        return tokens


class _Ending:
    """A stopping criterion that ends each row as its prompt's own criteria do.

    Args:
        criteria: the stopping criteria of the batch, and further ones.
        groups: the prompts, by length.
        prompts: the prompts.
        ended: as of `Decoding`.
        deliver: as of `Decoding`.
    """

    def __init__(
        self,
        criteria: Sequence[Any],
        groups: Sequence[_Group],
        prompts: Sequence[Continued],
        ended: dict[int, int],
        deliver: Deliver | None,
    ) -> None:
        self._groups = groups
        self._prompts = prompts
        self._ended = ended
        self._deliver = deliver
        self._steps = 0
        self._finished: torch.Tensor | None = None
        self._by_row = [one for one in criteria if hasattr(one, "eos_token_id")]
        self._others = [
            one
            for one in criteria
            if one not in self._by_row and not isinstance(one, MaxLengthCriteria)
        ]
        for one in self._by_row:  # by which `generate` tells whether ended rows are padded
            self.eos_token_id = one.eos_token_id

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self._deliver is not None:
            self._deliver("tokens", ids[:, -1])
        self._steps += 1
        if self._finished is None:
            self._finished = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        finished = self._finished
        for one in self._by_row:
            finished |= one(ids, scores)
        for group in self._groups:
            if self._steps >= group.steps:
                finished[group.rows] = True
            for one in self._others:
                finished[group.rows] |= one(group.ids(ids), scores)
        rows = finished.tolist()
        for prompt in self._prompts:
            if prompt.number not in self._ended and all(rows[prompt.rows]):
                self._ended[prompt.number] = self._steps
        return finished.clone()
