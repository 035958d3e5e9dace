"""`generate` on a language model: prompts continued by Hugging Face's own `generate`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from insitu.graph.errors import OptionError, PromptTypeError
from insitu.graph.location import Location, Mark
from insitu.graph.node import Address, Site
from insitu.models.attention import OPTION, attending
from insitu.models.batching import cuts, is_ragged, join
from insitu.models.choosing import listening, seeded
from insitu.models.configuration import all_said, text_config
from insitu.models.generated_rows import rows_apart, rows_together
from insitu.models.padding import padding_shows, positioned, warn_of_counting
from insitu.models.prompt_arguments import given_to_invocation
from insitu.models.prompts import Prompt, Side
from insitu.models.rotary import forgetting_lengths
from insitu.runtime.fallback import SEEN_ALONE, Fallback, logger, uncut
from insitu.runtime.hooks import Cut
from insitu.runtime.layout import Layouts
from insitu.runtime.passes import Deliver, Own, Pass
from insitu.runtime.probe import Call
from insitu.runtime.procedure import Outputs, Schedule, Work
from insitu.runtime.summary import unknown

if TYPE_CHECKING:
    from insitu.models.language_model import LanguageModel

_DEFAULT_STEPS = 20  # of Transformers, where nothing says how many
_NO_EXTRAS: Mapping[str, Any] = {}
# Options with which a row of a batch continues as it would alone.
_BATCHABLE = frozenset(
    [
        *("do_sample", "eos_token_id", "max_new_tokens", "min_new_tokens", "pad_token_id"),
        *("use_cache", OPTION),
    ]
)
# Settings of a generation config with which it does not, and the values that mean "off".
_UNBATCHABLE_UNLESS: Mapping[str, tuple[Any, ...]] = {
    "do_sample": (None, False),
    "num_beams": (None, 1),
    "min_length": (None, 0),
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "stop_strings": (None,),
    "prompt_lookup_num_tokens": (None,),
}
_COUNTING = ("repetition_penalty", "no_repeat_ngram_size", "min_length")  # padding, as tokens


class Generation:
    """Generations of a language model.

    Args:
        model: the model.
        options: keyword arguments for its `generate`.
        location: the user's line.

    Raises:
        OptionError: if `max_new_tokens` is no positive number.
    """

    def __init__(self, model: LanguageModel, options: dict[str, Any], location: Location) -> None:
        self._model = model
        self._location = location
        self._options = options
        steps = options.get("max_new_tokens", self._setting(model.module, "max_new_tokens"))
        unknown = steps is None and "max_new_tokens" not in options  # a length in all, or no limit
        if not unknown and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise OptionError(
                f"`max_new_tokens` is the number of tokens to generate, at least 1, not {steps!r}. "
                "To run the prompt alone, use `trace`.",
                location,
            )
        self.steps: int | None = steps
        # Who goes on behind the last token has padding before the first. An encoder counts its
        # positions, so there it stands behind, and the decoder has a beginning of its own.
        self._side: Side = "right" if model.is_encoder_decoder else "left"
        self._cached = bool(self._setting(model.module, "use_cache"))
        self.views = model.block_views[self._cached]
        plain = all(type(value) in (bool, int, float, str) for value in options.values())
        self._fixed = (steps, self._cached, *options.items()) if plain else None

    def demanding(self, options: Mapping[str, Any]) -> Generation:
        """Returns the same with further options, but for those that it was given."""
        if options.keys() <= self._options.keys():
            return self
        return Generation(self._model, {**options, **self._options}, self._location)

    def request(self, args: tuple[Any, ...], kwargs: dict[str, Any], mark: Mark) -> Prompt:
        """Returns the prompt of an invocation as token ids, with its seed."""
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
        return prompt._replace(seed=seed)

    def example(self, request: Prompt) -> Call:
        """Returns the forward that `generate` begins with for a prompt alone."""
        return self._first_forward(request.ids, request.extras)

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
        return ("generate", prompt.ids.shape, module.training, self._fixed)

    def schedule(self, module: nn.Module, requests: Sequence[Prompt], work: Work) -> Schedule:
        """Returns what gives one pass for all prompts if each goes on in it as alone, else more."""
        for prompt in requests:
            if prompt.mask is not None:
                positioned(self._model, prompt, not self._model.loaded, self._most_steps)
                self._warn_of_counting(module, prompt.mask)
        tokens = any(address[2] in ("tokens", "choice") for address in work.plan.reads)
        if len(requests) == 1:
            return partial(self._one_by_one, tokens, None)
        shared = self._shared(module, requests, work)
        if not isinstance(shared, Fallback):
            return partial(self._as_one, shared)
        if self._setting(module, "return_dict_in_generate"):
            raise OptionError(
                "`return_dict_in_generate` takes one invocation in a block, because these "
                "have to be generated one by one."
            )
        logger.info("%d prompts are generated one by one: %s", len(requests), shared.why)
        return partial(self._one_by_one, tokens, shared)

    def _shared(
        self, module: nn.Module, requests: Sequence[Prompt], work: Work
    ) -> Layouts | Fallback:
        """How to cut what is read out of one generation for all."""
        if work.apart is not None:
            return work.apart
        if self._model.has_hooks:
            return SEEN_ALONE
        if (why := self._unbatchable(module, requests)) is not None:
            return Fallback(why)
        from insitu.models.sharing import separation_of  # of no use to one prompt

        separation = separation_of(
            self._model,
            lambda batch, length: self._first_forward(torch.zeros(batch, length).long()),
            self._begin,
            self.views,
            self._side,
        )
        if isinstance(separation, Fallback):
            return separation
        sites = work.plan.reads
        obstacle = separation.obstacle(sites, work.written)
        if obstacle is None and self._outgrows_windows(requests):
            obstacle = next((site for site in sites if self._has_cache(site)), None)
        return separation.layouts if obstacle is None else uncut(Site(*obstacle))

    def outputs(self, results: Sequence[Any], requests: Sequence[Prompt]) -> Outputs | None:
        """Returns what `generate` gave, as one for all prompts and for each."""
        if len(requests) == 1:
            return Outputs(results[0], [_sequences(results[0])])
        if len(results) == 1:
            each = self._apart(_sequences(results[0]), requests)
            return Outputs(results[0], each)
        each = [_sequences(result) for result in results]
        given = [self._given(prompt) for prompt in requests]
        return Outputs(rows_together(each, given, self._pad_id), each)

    def _as_one(
        self, layouts: Layouts, module: nn.Module, requests: Sequence[Prompt]
    ) -> list[Pass]:
        """One pass for all prompts."""
        batch = join(requests, self._side, self._pad_id)
        whole = Prompt(batch.ids, requests[0].mark, batch.mask)
        return [self._pass(module, whole, dict(enumerate(cuts(batch, layouts))), requests)]

    def _one_by_one(
        self,
        tokens: bool,
        apart: Fallback | None,
        module: nn.Module,
        requests: Sequence[Prompt],
    ) -> list[Pass]:
        """A pass for each prompt."""
        return [
            self._pass(module, prompt, {number: None}, [prompt], tokens, apart)
            for number, prompt in enumerate(requests)
        ]

    def _pass(
        self,
        module: nn.Module,
        prompt: Prompt,
        cuts: Mapping[int, Cut | None],
        requests: Sequence[Prompt],
        tokens: bool = False,
        apart: Fallback | None = None,
    ) -> Pass:
        """The pass of a prompt, which may be a batch of several requests."""
        if not self._model.reader.lookups_check:
            for request in requests:
                self._model.reader.check_length(request, self._following)
        kwargs = self._arguments(prompt)
        implementation = kwargs.pop(OPTION, None)

        def call(deliver: Deliver, _: Own) -> Any:
            # In the run, not before: see `forward` in `calls.py`.
            placed = self._model.placement.moved(kwargs)
            if tokens:
                placed |= listening(deliver, placed)
            try:
                with (
                    seeded(prompt.seed),
                    attending(module, implementation),
                    forgetting_lengths(self._model.growing),
                ):
                    return module.generate(**placed)  # pyright: ignore[reportCallIssue]
            except IndexError:
                self._model.reader.check(requests, self._following)
                raise

        told = partial(unknown, sorted(cuts), apart)
        stepped = self._model.generating
        return Pass(call, cuts, may_stop=False, told=told, stepped=stepped, apart=apart)

    def _begin(self, module: nn.Module, prompt: Prompt) -> None:
        """Generates one token, with nobody looking."""
        kwargs = {**self._arguments(prompt), "max_new_tokens": 1, "min_new_tokens": None}
        with attending(module, kwargs.pop(OPTION, None)):
            placed = self._model.placement.moved(kwargs)
            module.generate(**placed)  # pyright: ignore[reportCallIssue]

    def _arguments(self, prompt: Prompt) -> dict[str, Any]:
        """The keyword arguments of a prompt's `generate`."""
        kwargs = {
            "input_ids": prompt.ids,
            "attention_mask": prompt.visible_mask,
            "pad_token_id": self._pad_id,
            **prompt.extras,
            **self._options,
        }
        if "inputs_embeds" in prompt.extras:
            del kwargs["input_ids"]
        return kwargs

    def _first_forward(self, ids: torch.Tensor, extras: Mapping[str, Any] = _NO_EXTRAS) -> Call:
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
        if OPTION in self._options:
            kwargs[OPTION] = self._options[OPTION]
        return Call((), kwargs)

    def _decoder_prompt(self, rows: int, given: torch.Tensor | None) -> torch.Tensor:
        """What a decoder begins with: its start token, and what was given for it, if anything."""
        start = torch.full((rows, 1), self._model.decoder_start or 0)
        if given is None:
            return start
        begun = not bool((given[:, 0] != start[0, 0].to(given.device)).all())
        return given if begun else torch.cat([start.to(given.device), given], 1)

    def _unbatchable(self, module: nn.Module, requests: Sequence[Prompt]) -> str | None:
        """Why a prompt does not go on in a batch as it would alone, None if each does."""
        if self._model.trains():
            return "in training mode each prompt has its own random numbers"
        further = sorted(self._options.keys() - _BATCHABLE)
        extras = [name for prompt in requests for name in prompt.extras]
        settings = _UNBATCHABLE_UNLESS.items()
        further += [name for name, off in settings if self._setting(module, name) not in off]
        if further:
            return f"with `{further[0]}` a prompt may go on otherwise in a batch"
        if extras:
            return f"`{extras[0]}` is of one prompt at a time"
        if "max_new_tokens" not in self._options:
            return "without `max_new_tokens` padding counts towards the total length"
        if len({self._sharing(prompt) for prompt in requests}) > 1:
            return "rotary embeddings of the shorter prompts depend on the longest"
        return padding_shows(self._model) if is_ragged(requests) else None

    def _warn_of_counting(self, module: nn.Module, mask: torch.Tensor) -> None:
        """Says which settings of this generation take padding for tokens of the shorter rows."""
        if self._model.is_encoder_decoder or bool(mask.all()):
            return
        counting = [
            name
            for name in _COUNTING
            if self._setting(module, name) not in _UNBATCHABLE_UNLESS[name]
        ]
        if self.steps is None:
            counting.append("max_length")
        if counting:
            warn_of_counting(counting[0])

    def _sharing(self, prompt: Prompt) -> Hashable:
        """What is equal for prompts whose rotary embeddings do not depend on each other."""
        return self._model.lengths.sharing(prompt.ids.shape[1], self._most_steps)

    @property
    def _pad_id(self) -> int:
        """The id that fills padding: the user's, or the model's own."""
        given, known = self._setting(self._model.module, "pad_token_id"), self._model.reader.limits
        if not isinstance(given, int) or not 0 <= given < (known.vocabulary or given + 1):
            return self._model.pad_id
        return given

    @property
    def _most_steps(self) -> int:
        """How many steps there are, at most."""
        return self.steps or self._setting(self._model.module, "max_length") or _DEFAULT_STEPS

    @property
    def _following(self) -> int:
        """How many tokens come where the prompt is."""
        decodes = self._model.is_encoder_decoder
        return 1 if decodes else self.steps or 1

    def _outgrows_windows(self, requests: Sequence[Prompt]) -> bool:
        """Whether a cache may hold fewer positions than the longest prompt has.

        It holds the last, with the padding of the shorter prompts among them.
        """
        text = text_config(self._model.config)
        windows = all_said(text, "sliding_window", "attention_chunk_size")
        longest = max(prompt.ids.shape[1] for prompt in requests)
        return any(isinstance(window, int) and longest >= window for window in windows)

    def _has_cache(self, site: Address) -> bool:
        """Whether keys and values are a part of what is at a site."""
        return self._cached and site[2] == "output" and site[1] in self.views

    def _setting(self, module: nn.Module, name: str) -> Any:
        """An option of the generation: the user's, or the model's own."""
        config = self._options.get("generation_config", getattr(module, "generation_config", None))
        return self._options.get(name, getattr(config, name, None))

    def _apart(self, sequences: torch.Tensor, requests: Sequence[Prompt]) -> list[torch.Tensor]:
        """Each prompt's rows of a batch, without the padding of its neighbours."""
        ends = self._setting(self._model.load(), "eos_token_id")
        sizes = [(prompt.ids.shape[0], self._given(prompt)) for prompt in requests]
        return rows_apart(sequences, sizes, [ends] if isinstance(ends, int) else ends or ())

    def _given(self, prompt: Prompt) -> int:
        """How many of the tokens that a generation of a prompt returns were not generated."""
        if self._model.is_encoder_decoder:
            return 1
        return 0 if "inputs_embeds" in prompt.extras else prompt.ids.shape[1]


def _sequences(result: Any) -> torch.Tensor:
    """The token ids in what `generate` returned."""
    return result if isinstance(result, torch.Tensor) else result.sequences
