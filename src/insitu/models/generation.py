"""`generate` on a language model: prompts continued by Hugging Face's own `generate`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from insitu.batching.demand import Demand, Demands, Work
from insitu.batching.pass_plan import PassPlan
from insitu.batching.summary import Facts
from insitu.engine.job_outcome import Outputs
from insitu.engine.model_call import Pass
from insitu.engine.probe import Call
from insitu.graph.errors import OptionError
from insitu.graph.location import Location, Mark, here
from insitu.graph.node import EVERY
from insitu.models.continued_prompts import continued_generation
from insitu.models.generate_calls import GenerateCalls
from insitu.models.generation_obstacles import is_set
from insitu.models.generation_passes import GenerationPasses
from insitu.models.given_caches import taken_out
from insitu.models.padding import positioned, warn_of_counting
from insitu.models.prompt_arguments import (
    check_budget,
    checked_seed,
    given_to_block,
    given_to_invocation,
)
from insitu.models.prompts import Prompt
from insitu.models.sent_prompts import received, sent
from insitu.models.separation import OF_STEPS
from insitu.tracing.block import Block
from insitu.tracing.tracer import Tracer

if TYPE_CHECKING:
    from insitu.engine.job_parts import JobPrompt, ProcedureName
    from insitu.models.language_subject import LanguageSubject

# Settings that count padding as tokens of the shorter rows of one prompt, and when they are off.
_COUNTING: Mapping[str, tuple[Any, ...]] = {
    "min_length": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "repetition_penalty": (None, 1.0),
}

_BRANCHING = ("num_beams", "num_return_sequences")
"""Options with which a row of a prompt becomes several."""


class Generation:
    """Generations of a language model.

    Args:
        model: the model.
        options: keyword arguments for its `generate`.
        location: the user's line.
        budget: how many tokens a pass may have, where it has several invocations; None for what
            fits into memory.

    Raises:
        OptionError: if `max_new_tokens` is no positive number.
    """

    name: ProcedureName = "generate"

    def __init__(
        self,
        model: LanguageSubject,
        options: dict[str, Any],
        location: Location,
        budget: int | None = None,
    ) -> None:
        self._model = model
        self._location = location
        self._options = options
        self._budget = budget
        self._calls = calls = GenerateCalls(model, options)
        self._passes = GenerationPasses(calls)
        steps = calls.steps
        unknown = steps is None and "max_new_tokens" not in options  # a length in all, or no limit
        if not unknown:
            _check_steps(steps, location)
        self.steps: int | None = steps
        self.views = calls.views
        self._caches = taken_out(options)
        plain = all(type(value) in (bool, int, float, str) for value in options.values())
        self._fixed = (steps, calls.cached, *options.items()) if plain else None

    def demanding(self, request: Prompt, options: Mapping[str, Any]) -> Prompt:
        """Returns the prompt of an invocation with options that its values take."""
        return request.demanding(options)

    @property
    def given(self) -> Mapping[str, Any]:
        """The options of `generate`, without the model's own tokenizer."""
        given = dict(self._options)
        if given.get("tokenizer", self) is self._model.traits.tokenizer:
            del given["tokenizer"]
        return given if self._budget is None else {**given, "max_tokens_per_pass": self._budget}

    def prompt(self, request: Prompt) -> JobPrompt:
        """Returns a prompt as a job holds it."""
        return sent(request)

    def received(self, prompt: JobPrompt) -> Prompt:
        """Returns the prompt that a job holds.

        Raises:
            InsituError: if the model cannot take it.
        """
        read = received(self._model, prompt, self._calls.side, "generate")
        return self._continued(read)._replace(seed=prompt.seed, steps=prompt.steps)

    def request(self, args: tuple[Any, ...], kwargs: dict[str, Any], mark: Mark) -> Prompt:
        """Returns the prompt of an invocation as token ids, with its seed and number of steps."""
        steps = kwargs.pop("max_new_tokens", None)
        if steps is not None:
            _check_steps(steps, Location(*mark))
        seed = checked_seed(kwargs.pop("seed", None), Location(*mark))
        model = self._model
        if "inputs" in kwargs:  # as `generate` calls token ids
            kwargs["input_ids"] = kwargs.pop("inputs")
        kwargs = {**self._caches, **kwargs}
        if len(args) != 1 or kwargs:
            kwargs = given_to_invocation(model, args, kwargs, "generate", mark)
        prompt = model.traits.reader.read(args[0] if args else None, self._calls.side, mark, kwargs)
        if prompt.extras:
            model.traits.options.check(prompt.extras, "generate", lambda: Location(*mark))
        prompt = self._continued(prompt) if prompt.extras else prompt
        return prompt._replace(seed=seed, steps=steps)

    def _continued(self, prompt: Prompt) -> Prompt:
        """A prompt that may go on from a cache."""
        module = self._model.module
        beams = any(is_set(name, self._calls.setting(module, name)) for name in _BRANCHING)
        return continued_generation(self._model, prompt, beams)

    def example(self, request: Prompt) -> Call:
        """Returns the forward that `generate` begins with for a prompt alone."""
        return self._calls.first_forward(request.ids, request.extras, request.demands)

    def steps_of(self, request: Prompt) -> int | None:
        """Returns how many steps an invocation may have, None if nothing says so."""
        return self._calls.steps_of(request)

    def seeds(self, requests: Sequence[Prompt]) -> Mapping[int, int]:
        """Returns none: a prompt with a seed whose lines draw has a pass that draws from it."""
        return {}

    def halved(self, requests: Sequence[Prompt]) -> Generation | None:
        """Returns the same with passes of half as many tokens at most.

        Args:
            requests: the prompts of a pass that is too large.
        """
        tokens = sum(prompt.ids.shape[0] for prompt in requests)
        tokens *= max(
            prompt.ids.shape[1] + (self._calls.at_most(prompt) or 0) for prompt in requests
        )
        if self._budget is not None:
            tokens = min(tokens, self._budget)
        if tokens == 1:
            return None
        return Generation(self._model, dict(self._options), self._location, tokens // 2)

    def check_tokens(self, location: Location) -> None:
        """Raises if the steps choose no token for each row.

        Raises:
            OptionError: in a search that goes back on what it chose, or chooses several at once.
        """
        option = self._calls.other_search
        if option is not None:
            search = "Beam search" if option == "num_beams" else f"A generation with `{option}`"
            raise OptionError(
                f"{search} chooses no tokens step by step: read them from `generator.output`.",
                location,
            )

    def key(self, module: nn.Module, requests: Sequence[Prompt]) -> Hashable | None:
        """Returns the form of a prompt that is alone and has no padding, with the options."""
        prompt = requests[0]
        if self._fixed is None or len(requests) > 1 or prompt.extras or prompt.mask is not None:
            return None
        demands = (*prompt.demands.items(),)
        return ("generate", prompt.ids.shape, module.training, self._fixed, demands)

    def demands(self, module: nn.Module, requests: Sequence[Prompt], work: Work) -> Demands:
        """Returns what the prompts demand: one pass for those that go on in it as alone.

        Raises:
            OptionError: if a line is about a step that is not one forward.
        """
        self._check_steps(work)
        for prompt in requests:
            if prompt.mask is not None:
                most = self._calls.at_most(prompt)
                positioned(self._model, prompt, not self._model.loaded, most)
                self._warn_of_counting(module, prompt.mask)
        if len(requests) == 1:
            return Demands([Demand(differentiates=work.asked[0].differentiates)])
        from insitu.models.generation_sharing import GenerationSharing  # of no use to one prompt

        return GenerationSharing(self._calls).demands(module, requests, work, self._budget)

    def passes(
        self, module: nn.Module, plans: Sequence[PassPlan], requests: Sequence[Prompt]
    ) -> list[Pass]:
        """Returns generations ready to be called."""
        if len(plans) > 1 and self._calls.setting(module, "return_dict_in_generate"):
            raise OptionError(
                "`return_dict_in_generate` takes one invocation in a block, because these "
                "have to be generated one by one."
            )
        return self._passes.passes(plans, module, requests)

    @property
    def facts(self) -> Facts:
        """The blocks. What generations cost is not known."""
        return Facts(tuple(self.views))

    def whole(self, each: Sequence[torch.Tensor], requests: Sequence[Prompt]) -> torch.Tensor:
        """Returns what one `generate` on some prompts would return, from what each returned."""
        return self._passes.whole(each, requests)

    def outputs(self, results: Sequence[Any], requests: Sequence[Prompt]) -> Outputs | None:
        """Returns what `generate` gave, as one for all prompts and for each."""
        return self._passes.outputs(results, requests)

    def _check_steps(self, work: Work) -> None:
        """Raises where a site would have been passed other than once in its step."""
        option, repeated = self._calls.more_forwards, work.plan.repeated
        if option is None:
            return
        saves = repeated is not None and repeated.saves
        for (_, _, kind, _, step), index in work.plan.reads.items():
            first = step == 0 and option != "prefill_chunk_size" and kind not in OF_STEPS
            # With guidance all forwards are alike: what is written in each holds in all of them.
            always = step == EVERY and option == "guidance_scale" and not saves
            if not first and not always:
                raise OptionError(
                    f"With `{option}` a step is not one forward of the model, so nothing is read "
                    "or written in single steps: leave it out, or read `generator.output`.",
                    work.graph[index].location,
                )

    def _warn_of_counting(self, module: nn.Module, mask: torch.Tensor) -> None:
        """Says which settings of this generation take padding for tokens of the shorter rows."""
        if self._model.traits.is_encoder_decoder or bool(mask.all()):
            return
        counting = [
            name for name in _COUNTING if self._calls.setting(module, name) not in _COUNTING[name]
        ]
        if self.steps is None:
            counting.append("max_length")
        if counting:
            warn_of_counting(counting[0])


def opened_block(
    model: LanguageSubject, prompt: Any, kwargs: dict[str, Any], budget: int | None, dry: bool
) -> Tracer:
    """Returns a block that generates when it ends: as of `LanguageModel.generate`.

    Args:
        model: the model.
        prompt: the block's prompt, None if it has none or it is among `kwargs`.
        kwargs: keyword arguments of `generate`, and what goes with the prompt.
        budget: how many tokens a pass may have, where it has several invocations; None for what
            fits into memory.
        dry: whether nothing is to run.

    Raises:
        OptionError: if the model generates nothing, or an option means nothing.
    """
    location = here()
    if not getattr(model.module, "can_generate", lambda: False)():
        raise OptionError(
            f"{type(model.module).__name__} does not generate: use `trace`.", location
        )
    if "inputs" in kwargs:  # as `generate` calls token ids
        kwargs["input_ids"] = kwargs.pop("inputs")
    given = given_to_block(model, prompt, kwargs, "generate")
    check_budget(budget)
    return Tracer(Block(model, Generation(model, kwargs, location, budget), given, True, dry))


def _check_steps(steps: Any, location: Location) -> None:
    """Raises if a number of tokens to generate is none."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise OptionError(
            f"`max_new_tokens` is the number of tokens to generate, at least 1, not {steps!r}. "
            "To run the prompt alone, use `trace`.",
            location,
        )
