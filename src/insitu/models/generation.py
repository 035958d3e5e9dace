"""`generate` on a language model: prompts continued by Hugging Face's own `generate`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.generation.stopping_criteria import StopStringCriteria

from insitu.graph.errors import OptionError, PromptTypeError
from insitu.graph.location import Location, Mark
from insitu.graph.node import Address, Site
from insitu.models.attention import OPTION, attending
from insitu.models.batching import cuts, is_ragged, join
from insitu.models.calls import default_budget
from insitu.models.choosing import listening, only, seeded
from insitu.models.configuration import all_said, text_config
from insitu.models.generated_rows import rows_apart, rows_together
from insitu.models.generated_together import (
    Together,
    divided,
    drawing,
    entries_used,
    unlike_alone,
)
from insitu.models.later_steps import LaterSteps
from insitu.models.padding import padding_shows, positioned, warn_of_counting
from insitu.models.prompt_arguments import given_to_invocation
from insitu.models.prompts import Prompt, Side
from insitu.models.rotary import forgetting_lengths
from insitu.models.sent_prompts import received, sent
from insitu.models.separation import OF_STEPS
from insitu.models.trial import undisturbed
from insitu.runtime.fallback import SEEN_ALONE, Fallback, logger, tried, uncut
from insitu.runtime.layout import Axis, Layouts, TensorLayout
from insitu.runtime.order import uses
from insitu.runtime.passes import Deliver, Own, Pass, Steps
from insitu.runtime.probe import Call
from insitu.runtime.procedure import Outputs, Schedule, Work
from insitu.runtime.summary import Summary, unknown

if TYPE_CHECKING:
    from insitu.models.language_model import LanguageModel
    from insitu.runtime.job_parts import JobPrompt, ProcedureName

_DEFAULT_STEPS = 20  # of Transformers, where nothing says how many
_NO_EXTRAS: Mapping[str, Any] = {}
# Settings that count padding as tokens of the shorter rows of one prompt, and when they are off.
_COUNTING: Mapping[str, tuple[Any, ...]] = {
    "min_length": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "repetition_penalty": (None, 1.0),
}


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
        model: LanguageModel,
        options: dict[str, Any],
        location: Location,
        budget: int | None = None,
    ) -> None:
        self._model = model
        self._location = location
        self._options = options
        self._budget = budget
        steps = options.get("max_new_tokens", self._setting(model.module, "max_new_tokens"))
        unknown = steps is None and "max_new_tokens" not in options  # a length in all, or no limit
        if not unknown:
            _check_steps(steps, location)
        self.steps: int | None = steps
        # Who goes on behind the last token has padding before the first. An encoder counts its
        # positions, so there it stands behind, and the decoder has a beginning of its own.
        self._side: Side = "right" if model.is_encoder_decoder else "left"
        self._cached = bool(self._setting(model.module, "use_cache"))
        self.views = model.block_views[self._cached]
        plain = all(type(value) in (bool, int, float, str) for value in options.values())
        self._fixed = (steps, self._cached, *options.items()) if plain else None

    def demanding(self, request: Prompt, options: Mapping[str, Any]) -> Prompt:
        """Returns the prompt of an invocation with options that its values take."""
        return request.demanding(options)

    @property
    def given(self) -> Mapping[str, Any]:
        """The options of `generate`, without the model's own tokenizer."""
        own = self._model.has_tokenizer(self._options.get("tokenizer"))
        given = {n: one for n, one in self._options.items() if not (own and n == "tokenizer")}
        return given if self._budget is None else {**given, "max_tokens_per_pass": self._budget}

    def prompt(self, request: Prompt) -> JobPrompt:
        """Returns a prompt as a job holds it."""
        return sent(request)

    def received(self, prompt: JobPrompt) -> Prompt:
        """Returns the prompt that a job holds.

        Raises:
            InsituError: if the model cannot take it.
        """
        read = received(self._model, prompt, self._side, "generate")
        return read._replace(seed=prompt.seed, steps=prompt.steps)

    def request(self, args: tuple[Any, ...], kwargs: dict[str, Any], mark: Mark) -> Prompt:
        """Returns the prompt of an invocation as token ids, with its seed and number of steps."""
        steps = kwargs.pop("max_new_tokens", None)
        if steps is not None:
            _check_steps(steps, Location(*mark))
        seed = kwargs.pop("seed", None)
        if not (seed is None or isinstance(seed, int)):
            raise PromptTypeError(
                f"`seed` is an integer, from which the sampling of a prompt starts, not {seed!r}.",
                Location(*mark),
            )
        model = self._model
        if "inputs" in kwargs:  # as `generate` calls token ids
            kwargs["input_ids"] = kwargs.pop("inputs")
        if len(args) != 1 or kwargs:
            kwargs = given_to_invocation(model, args, kwargs, "generate", mark)
        prompt = model.reader.read(args[0] if args else None, self._side, mark, kwargs)
        if prompt.extras:
            model.options.check(prompt.extras, "generate", lambda: Location(*mark))
        return prompt._replace(seed=seed, steps=steps)

    def example(self, request: Prompt) -> Call:
        """Returns the forward that `generate` begins with for a prompt alone."""
        return self._first_forward(request.ids, request.extras, request.demands)

    def steps_of(self, request: Prompt) -> int | None:
        """Returns how many steps an invocation may have, None if nothing says so."""
        return request.steps or self.steps

    def check_tokens(self, location: Location) -> None:
        """Raises if the steps choose no token for each row.

        Raises:
            OptionError: under beam search, which goes back on what it chose.
        """
        if self._setting(self._model.module, "num_beams") not in (None, 1):
            raise OptionError(
                "Beam search chooses no tokens step by step: read them from `generator.output`.",
                location,
            )

    def key(self, module: nn.Module, requests: Sequence[Prompt]) -> Hashable | None:
        """Returns the form of a prompt that is alone and has no padding, with the options."""
        prompt = requests[0]
        if self._fixed is None or len(requests) > 1 or prompt.extras or prompt.mask is not None:
            return None
        demands = (*prompt.demands.items(),)
        return ("generate", prompt.ids.shape, module.training, self._fixed, demands)

    def schedule(self, module: nn.Module, requests: Sequence[Prompt], work: Work) -> Schedule:
        """Returns what gives one pass for all prompts if each goes on in it as alone, else more."""
        for prompt in requests:
            if prompt.mask is not None:
                most = self._most_of(prompt) or _DEFAULT_STEPS
                positioned(self._model, prompt, not self._model.loaded, most)
                self._warn_of_counting(module, prompt.mask)
        tokens = any(address[2] in OF_STEPS for address in work.plan.reads)
        if len(requests) == 1:
            return partial(self._passes, [Together([0])], [_NO_LAYOUTS], tokens)
        parts, layouts = self._divided(module, requests, work)
        if len(parts) > 1 and self._setting(module, "return_dict_in_generate"):
            raise OptionError(
                "`return_dict_in_generate` takes one invocation in a block, because these "
                "have to be generated one by one."
            )
        for why in {part.apart.why: None for part in parts if part.apart is not None}:
            count = sum(part.apart is not None and part.apart.why == why for part in parts)
            logger.info("%d prompts are generated one by one: %s", count, why)
        return partial(self._passes, parts, layouts, tokens)

    def _divided(
        self, module: nn.Module, requests: Sequence[Prompt], work: Work
    ) -> tuple[list[Together], Sequence[_Layouts]]:
        """Which prompts share a pass, and how to cut what each reads out of it."""
        layouts = [_NO_LAYOUTS] * len(requests)
        why = self._unbatchable(module)
        whys: list[Fallback | None] = [why] * len(requests)
        keys: list[Hashable] = [None] * len(requests)
        if why is None:
            whys, layouts = self._uncut(requests, work)
            keys = self._sharing(requests)
        steps = [self._most_of(prompt) or _DEFAULT_STEPS for prompt in requests]
        crossing = uses(work.graph, work.plan, work.moments)
        tokens = sum(
            p.ids.numel() + n * p.ids.shape[0] for p, n in zip(requests, steps, strict=True)
        )
        budget = self._budget or default_budget(self._model, tokens)
        return divided(requests, whys, keys, crossing, steps, budget), layouts

    def _uncut(
        self, requests: Sequence[Prompt], work: Work
    ) -> tuple[list[Fallback | None], list[_Layouts]]:
        """Why each prompt cannot be cut out of a batch, None if it can; and how values are cut."""
        whys: list[Fallback | None] = [None] * len(requests)
        layouts = [_NO_LAYOUTS] * len(requests)
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
    ) -> tuple[list[Fallback | None], _Layouts]:
        """The same for prompts whose values take the same options."""
        from insitu.models.separation import later_obstacle
        from insitu.models.sharing import separation_of  # of no use to one prompt

        demands = requests[numbers[0]].demands
        separation = separation_of(
            self._model,
            lambda batch, length: self._first_forward(
                torch.zeros(batch, length).long(), demands=demands
            ),
            lambda module, prompt: self._begin(module, prompt.demanding(demands)),
            self.views,
            self._side,
            lambda module, prompt, tokens: self._go_on(module, prompt.demanding(demands), tokens),
        )
        if isinstance(separation, Fallback):
            return [separation] * len(numbers), _NO_LAYOUTS
        reads: dict[int, list[Address]] = {number: [] for number in numbers}
        for address in work.plan.reads:
            if address[0] in reads:
                reads[address[0]].append(address)
        later = separation.later_steps([address for own in reads.values() for address in own])
        used = partial(entries_used, work.graph, work.plan)
        written = set(work.written)
        most = max(self._most_of(prompt) or _DEFAULT_STEPS for prompt in requests)
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
        return whys, _Layouts(first, after)

    def outputs(self, results: Sequence[Any], requests: Sequence[Prompt]) -> Outputs | None:
        """Returns what `generate` gave, as one for all prompts and for each."""
        if len(requests) == 1:
            return Outputs(results[0], [_sequences(results[0])])
        each: dict[int, torch.Tensor] = {}
        for generated in results:
            if len(generated.steps) == 1:  # it may have other rows than its prompt, as of beams
                each[next(iter(generated.steps))] = _sequences(generated.result)
                continue
            prompts = [requests[number] for number in generated.steps]
            sizes = [
                (prompt.ids.shape[0], self._given(prompt), steps)
                for prompt, steps in zip(prompts, generated.steps.values(), strict=True)
            ]
            rows = rows_apart(_sequences(generated.result), sizes)
            each.update(zip(generated.steps, rows, strict=True))
        ordered = [each[number] for number in range(len(requests))]
        limits = {self._most_of(prompt) for prompt in requests}
        if len(results) == 1 and len(limits) == 1:
            return Outputs(results[0].result, ordered)
        given = [self._given(prompt) for prompt in requests]
        return Outputs(rows_together(ordered, given, self._pad_id), ordered)

    def _passes(
        self,
        parts: Sequence[Together],
        layouts: Sequence[_Layouts],
        tokens: bool,
        module: nn.Module,
        requests: Sequence[Prompt],
    ) -> list[Pass]:
        """The passes of some prompts."""
        passes: list[Pass] = []
        for numbers, apart in parts:
            if len(numbers) > 1:
                passes.append(
                    self._of_several(numbers, layouts[numbers[0]], tokens, module, requests)
                )
            else:
                prompt = requests[numbers[0]]
                passes.append(
                    self._of_one(numbers[0], prompt, tokens, apart, module, len(requests) > 1)
                )
        return passes

    def _of_one(
        self,
        number: int,
        prompt: Prompt,
        tokens: bool,
        apart: Fallback | None,
        module: nn.Module,
        among_others: bool,
    ) -> Pass:
        """The pass of one prompt."""
        self._check_length([prompt])
        kwargs = self._arguments(prompt)
        implementation = kwargs.pop(OPTION, None)

        def call(deliver: Deliver, _: Own) -> Any:
            # In the run, not before: see `forward` in `calls.py`.
            placed = self._model.placement.moved(kwargs)
            if tokens:
                placed |= listening(deliver, placed)
            with seeded(prompt.seed):
                result = self._generate(module, implementation, [prompt], placed)
            return Generated(result, {number: 0}) if among_others else result

        told = partial(unknown, [number], apart)
        steps = Steps(self._model.generating, {})
        return Pass(call, {number: None}, may_stop=False, told=told, steps=steps, apart=apart)

    def _of_several(
        self,
        numbers: Sequence[int],
        layouts: _Layouts,
        tokens: bool,
        module: nn.Module,
        requests: Sequence[Prompt],
    ) -> Pass:
        """The pass of several prompts."""
        from insitu.models.decoding import Continued, Decoding  # of no use to one prompt

        prompts = [requests[number] for number in numbers]
        self._check_length(prompts)
        batch = join(prompts, self._side, self._pad_id)
        shares = cuts(batch, layouts.first, later=layouts.later)
        limits = [self._most_of(prompt) or _DEFAULT_STEPS for prompt in prompts]
        given = {"steps": max(limits), "demands": prompts[0].demands}
        whole = Prompt(batch.ids, prompts[0].mark, batch.mask, **given)
        kwargs, criteria = self._without_criteria(self._arguments(whole))
        implementation = kwargs.pop(OPTION, None)
        steps = Steps(self._model.generating, {})
        continued: list[Continued] = []
        for number, prompt, part, limit in zip(numbers, prompts, batch.parts, limits, strict=True):
            start = 0 if self._model.is_encoder_decoder else part.positions.start
            continued.append(Continued(number, part.rows, start, prompt.ids, limit, prompt.seed))

        def call(deliver: Deliver, _: Own) -> Any:
            # In the run, not before: see `forward` in `calls.py`.
            placed = self._model.placement.moved(kwargs)
            asked = deliver if tokens else None
            placed["custom_generate"] = Decoding(continued, steps.ended, asked, criteria).run
            result = self._generate(module, implementation, prompts, placed)
            return Generated(result, {number: steps.ended[number] for number in numbers})

        rows, length = batch.ids.shape
        told = partial(self._summary, numbers, rows, length)
        own = dict(zip(numbers, shares, strict=True))
        return Pass(call, own, may_stop=False, told=told, steps=steps)

    def _generate(
        self,
        module: nn.Module,
        implementation: Any,
        prompts: Sequence[Prompt],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Calls the model's own `generate`."""
        try:
            with attending(module, implementation), forgetting_lengths(self._model.growing):
                return module.generate(**kwargs)  # pyright: ignore[reportCallIssue]
        except IndexError:
            for prompt in prompts:
                self._model.reader.check([prompt], self._following(prompt))
            raise

    def _check_length(self, prompts: Sequence[Prompt]) -> None:
        if not self._model.reader.lookups_check:
            for prompt in prompts:
                self._model.reader.check_length(prompt, self._following(prompt))

    def _summary(self, numbers: Sequence[int], rows: int, length: int) -> Summary:
        """The summary of a pass of several prompts."""
        blocks = len(self.views)
        why = "prompts that are generated together"
        return Summary(numbers, rows, length, blocks, 0, 0.0, why, {})

    def _without_criteria(
        self, kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], Sequence[Callable[..., Any]]]:
        """Takes out of options the stopping criteria that look at ids, and makes these."""
        strings = kwargs.pop("stop_strings", None)
        tokenizer = kwargs.pop("tokenizer", None)
        if strings is None:
            return kwargs, ()
        return kwargs, [StopStringCriteria(tokenizer, strings)]

    def _begin(self, module: nn.Module, prompt: Prompt) -> None:
        """Generates one token, with nobody looking."""
        self._go_on(module, prompt, None)

    def _go_on(self, module: nn.Module, prompt: Prompt, tokens: torch.Tensor | None) -> None:
        """Generates given tokens `(rows, step)` behind a prompt, or any one, with nobody looking.

        Of the options only those count on which the values of a forward depend.
        """
        kwargs: dict[str, Any] = {
            "input_ids": prompt.ids,
            "attention_mask": prompt.visible_mask,
            "pad_token_id": self._pad_id,
            "max_new_tokens": 1,
            "min_new_tokens": None,
            "eos_token_id": None,
            "use_cache": self._cached,
            "do_sample": False,
        }
        if tokens is not None:
            start = 1 if self._model.is_encoder_decoder else prompt.ids.shape[1]

            def choose(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                return only(scores, tokens[:, ids.shape[1] - start].to(scores.device))

            kwargs |= {"max_new_tokens": tokens.shape[1], "logits_processor": [choose]}
        with attending(module, self._options.get(OPTION, prompt.demands.get(OPTION))):
            placed = self._model.placement.moved(kwargs)
            module.generate(**placed)  # pyright: ignore[reportCallIssue]

    def _arguments(self, prompt: Prompt) -> dict[str, Any]:
        """The keyword arguments of a prompt's `generate`."""
        kwargs = {
            "input_ids": prompt.ids,
            "attention_mask": prompt.visible_mask,
            "pad_token_id": self._pad_id,
            **prompt.demands,
            **prompt.extras,
            **self._options,
        }
        if "inputs_embeds" in prompt.extras:
            del kwargs["input_ids"]
        if prompt.steps is not None:
            kwargs["max_new_tokens"] = prompt.steps
            kwargs.pop("max_length", None)
        return kwargs

    def _first_forward(
        self,
        ids: torch.Tensor,
        extras: Mapping[str, Any] = _NO_EXTRAS,
        demands: Mapping[str, Any] = _NO_EXTRAS,
    ) -> Call:
        kwargs: dict[str, Any] = {"input_ids": ids, **extras}
        if "inputs_embeds" in extras:
            del kwargs["input_ids"]
        parameters = self._model.forward_parameters
        if "position_ids" in parameters:  # `generate` makes them from the mask
            kwargs["position_ids"] = torch.arange(ids.shape[1]).expand(ids.shape)
        if "use_cache" in parameters:
            kwargs["use_cache"] = self._cached
        if "logits_to_keep" in parameters:  # `generate` wants the last position's only
            kwargs["logits_to_keep"] = 1
        if self._model.is_encoder_decoder:
            given = extras.get("decoder_input_ids", self._options.get("decoder_input_ids"))
            kwargs["decoder_input_ids"] = self._decoder_prompt(ids.shape[0], given)
        options = {**demands, **self._options}
        if OPTION in options:
            kwargs[OPTION] = options[OPTION]
        return Call((), kwargs)

    def _decoder_prompt(self, rows: int, given: torch.Tensor | None) -> torch.Tensor:
        """What a decoder begins with: its start token, and what was given for it, if anything."""
        start = torch.full((rows, 1), self._model.decoder_start or 0)
        if given is None:
            return start
        begun = not bool((given[:, 0] != start[0, 0].to(given.device)).all())
        return given if begun else torch.cat([start.to(given.device), given], 1)

    def _unbatchable(self, module: nn.Module) -> Fallback | None:
        """Why no two prompts go on in a batch as they would alone, None if some do."""
        if self._model.has_hooks:
            return SEEN_ALONE
        if self._model.trains():
            return Fallback("in training mode each prompt has its own random numbers")
        given = self._options.get("generation_config")
        own = getattr(module, "generation_config", None)
        configs = [config for config in (given, own) if config is not None]
        option = unlike_alone(self._options, configs)
        if option is not None:
            return Fallback(f"with `{option}` a prompt may go on otherwise in a batch")
        return self._own_loop(module)

    def _own_loop(self, module: nn.Module) -> Fallback | None:
        """Why a loop cannot be given to the model's `generate`, None if it can."""
        model = self._model
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
        steps = self._most_of(prompt)
        if steps is None:
            return Fallback("without `max_new_tokens` padding counts towards the total length")
        if steps < 1:
            return Fallback("the prompt is longer than `max_length`")
        return None

    def _sharing(self, requests: Sequence[Prompt]) -> list[Hashable]:
        """What is equal for prompts that do not change each other in a batch."""
        lengths = self._model.lengths
        padded = is_ragged(requests) and padding_shows(self._model) is not None
        steps = [self._most_of(prompt) or _DEFAULT_STEPS for prompt in requests]
        most, longest = max(steps), max(prompt.ids.shape[1] for prompt in requests)
        # Rows that have ended take up positions, as long as others go on.
        context = self._model.reader.limits.context
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

    def _most_of(self, prompt: Prompt) -> int | None:
        """How many tokens a prompt gets at most, None if that is not known.

        A length in all says so too, but not which steps there are to be named in the block.
        """
        steps = self.steps_of(prompt)
        if steps is not None:
            return steps
        most = self._options.get("max_length")
        return most - self._given(prompt) if isinstance(most, int) else None

    def _warn_of_counting(self, module: nn.Module, mask: torch.Tensor) -> None:
        """Says which settings of this generation take padding for tokens of the shorter rows."""
        if self._model.is_encoder_decoder or bool(mask.all()):
            return
        counting = [
            name for name in _COUNTING if self._setting(module, name) not in _COUNTING[name]
        ]
        if self.steps is None:
            counting.append("max_length")
        if counting:
            warn_of_counting(counting[0])

    @property
    def _pad_id(self) -> int:
        """The id that fills padding: the user's, or the model's own."""
        given, known = self._setting(self._model.module, "pad_token_id"), self._model.reader.limits
        if not isinstance(given, int) or not 0 <= given < (known.vocabulary or given + 1):
            return self._model.pad_id
        return given

    def _following(self, prompt: Prompt) -> int:
        """How many tokens come where a prompt is."""
        decodes = self._model.is_encoder_decoder
        return 1 if decodes else self.steps_of(prompt) or 1

    def _outgrows_windows(self, requests: Sequence[Prompt], steps: int = 0) -> bool:
        """Whether a cache may hold fewer positions than the longest prompt has after some steps.

        It holds the last, with the padding of the shorter prompts among them.
        """
        text = text_config(self._model.config)
        windows = all_said(text, "sliding_window", "attention_chunk_size")
        longest = max(prompt.ids.shape[1] for prompt in requests)
        return any(isinstance(window, int) and longest + steps >= window for window in windows)

    def _has_cache(self, site: Address) -> bool:
        """Whether keys and values are a part of what is at a site."""
        return self._cached and site[2] == "output" and site[1] in self.views

    def _setting(self, module: nn.Module, name: str) -> Any:
        """An option of the generation: the user's, or the model's own."""
        config = self._options.get("generation_config", getattr(module, "generation_config", None))
        return self._options.get(name, getattr(config, name, None))

    def _given(self, prompt: Prompt) -> int:
        """How many of the tokens that a generation of a prompt returns were not generated."""
        if self._model.is_encoder_decoder:
            return 1
        return 0 if "inputs_embeds" in prompt.extras else prompt.ids.shape[1]


def _check_steps(steps: Any, location: Location) -> None:
    """Raises if a number of tokens to generate is none."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise OptionError(
            f"`max_new_tokens` is the number of tokens to generate, at least 1, not {steps!r}. "
            "To run the prompt alone, use `trace`.",
            location,
        )


class _Layouts(NamedTuple):
    """How values are cut out of a generation.

    Attributes:
        first: in its first step.
        later: in those after.
    """

    first: Layouts
    later: Layouts


class Generated(NamedTuple):
    """What a pass gave, where there are several prompts.

    Attributes:
        result: what `generate` returned.
        steps: how many tokens each prompt of it got, by the number of its invocation; of one that
            is alone, that is not needed.
    """

    result: Any
    steps: Mapping[int, int]


# Of the whole model's places that are no module's.
_BY_ROW: Layouts = {("", kind, 0): TensorLayout((Axis.ROWS,)) for kind in OF_STEPS}
_NO_LAYOUTS = _Layouts({}, {})


def _sequences(result: Any) -> torch.Tensor:
    """The token ids in what `generate` returned."""
    return result if isinstance(result, torch.Tensor) else result.sequences
