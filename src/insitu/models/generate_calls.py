"""How a language model's own `generate` is called: with which options, and on what.

Which prompts a call has is decided in `generation_sharing.py`, and what a pass does with it in
`generation_passes.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from insitu.batching.demand import Side
from insitu.engine.probe import Call
from insitu.models.attention import OPTION, attending
from insitu.models.choosing import only
from insitu.models.continued_prompts import without_cached
from insitu.models.generation_obstacles import is_set
from insitu.models.given_caches import PAST
from insitu.models.prompts import Prompt
from insitu.models.rotary import forgetting_lengths

if TYPE_CHECKING:
    from insitu.models.language_subject import LanguageSubject

_DEFAULT_STEPS = 20  # of Transformers, where nothing says how many
_NO_EXTRAS: Mapping[str, Any] = {}

_OTHER_SEARCHES = (
    *("assistant_early_exit", "assistant_model", "constraints", "custom_generate", "dola_layers"),
    *("force_words_ids", "num_beams", "penalty_alpha", "prompt_lookup_num_tokens"),
)
"""Options with which `generate` chooses other than step by step."""

_MORE_FORWARDS = (
    *("assistant_early_exit", "assistant_model", "guidance_scale", "penalty_alpha"),
    *("prefill_chunk_size", "prompt_lookup_num_tokens"),
)
"""Options with which `generate` runs the model more than once for a token, or for several."""


class GenerateCalls:
    """Calls of a model's `generate`.

    Args:
        model: the model.
        options: keyword arguments for its `generate`.

    Attributes:
        model: the model.
        options: keyword arguments for its `generate`.
        steps: how many tokens a prompt gets at most, None if nothing says so.
        side: where shorter prompts of a batch are padded.
        cached: whether keys and values are cached.
        views: how outputs are shown, by path.
    """

    def __init__(self, model: LanguageSubject, options: dict[str, Any]) -> None:
        self.model = model
        self.options = options
        self.steps: Any = options.get(
            "max_new_tokens", self.setting(model.module, "max_new_tokens")
        )
        # Who goes on behind the last token has padding before the first. An encoder counts its
        # positions, so there it stands behind, and the decoder has a beginning of its own.
        self.side: Side = "right" if model.traits.is_encoder_decoder else "left"
        cached = self.setting(model.module, "use_cache")
        self.cached = cached is None or bool(cached)  # on, where nothing says so
        self.views = model.traits.block_views[self.cached]

    def steps_of(self, prompt: Prompt) -> int | None:
        """Returns how many steps a prompt may have, None if nothing says so."""
        return prompt.steps or self.steps

    def at_most(self, prompt: Prompt) -> int:
        """Returns how many tokens a prompt gets at most, a usual number if nothing says so."""
        return self.most_of(prompt) or _DEFAULT_STEPS

    def most_of(self, prompt: Prompt) -> int | None:
        """Returns how many tokens a prompt gets at most, None if that is not known.

        A length in all says so too, but not which steps there are to be named in the block.
        """
        steps = self.steps_of(prompt)
        if steps is not None:
            return steps
        most = self.options.get("max_length")
        return most - self.given(prompt) if isinstance(most, int) else None

    @property
    def pad_id(self) -> int:
        """The id that fills padding: the user's, or what `generate` takes, or the model's own."""
        module, limits = self.model.module, self.model.traits.reader.limits
        given = self.setting(module, "pad_token_id")
        if given is None:
            ends = self.setting(module, "eos_token_id")
            given = ends[0] if isinstance(ends, list | tuple) and ends else ends
        if not isinstance(given, int) or not 0 <= given < (limits.vocabulary or given + 1):
            return self.model.traits.pad_id
        return given

    def following(self, prompt: Prompt) -> int:
        """Returns how many tokens come where a prompt is."""
        decodes = self.model.traits.is_encoder_decoder
        return 1 if decodes else self.steps_of(prompt) or 1

    def setting(self, module: nn.Module, name: str) -> Any:
        """Returns an option of the generation: the user's, or the model's own."""
        config = self.options.get("generation_config", getattr(module, "generation_config", None))
        return self.options.get(name, getattr(config, name, None))

    @property
    def other_search(self) -> str | None:
        """The option with which steps do not choose one token for each row, for good; else None."""
        return self._first_set(_OTHER_SEARCHES)

    @property
    def more_forwards(self) -> str | None:
        """The option with which a step is not one forward for one token more; else None."""
        return self._first_set(_MORE_FORWARDS)

    def _first_set(self, names: Sequence[str]) -> str | None:
        """The first of some options that says something, None if none does."""
        module = self.model.module
        return next((name for name in names if is_set(name, self.setting(module, name))), None)

    def given(self, prompt: Prompt) -> int:
        """Returns how many tokens that a generation returns of a prompt were not generated."""
        if self.model.traits.is_encoder_decoder:
            return 1
        return 0 if "inputs_embeds" in prompt.extras else prompt.ids.shape[1]

    def arguments(self, prompt: Prompt) -> dict[str, Any]:
        """Returns the keyword arguments of a prompt's `generate`."""
        kwargs = {
            "input_ids": prompt.ids,
            "attention_mask": prompt.visible_mask,
            "pad_token_id": self.pad_id,
            **prompt.demands,
            **prompt.extras,
            **self.options,
        }
        if "inputs_embeds" in prompt.extras:
            del kwargs["input_ids"]
        if prompt.steps is not None:
            kwargs["max_new_tokens"] = prompt.steps
            kwargs.pop("max_length", None)
        return kwargs

    def first_forward(
        self,
        ids: torch.Tensor,
        extras: Mapping[str, Any] = _NO_EXTRAS,
        demands: Mapping[str, Any] = _NO_EXTRAS,
    ) -> Call:
        """Returns the forward that `generate` begins with for a prompt."""
        kwargs: dict[str, Any] = {"input_ids": ids, **extras}
        if "inputs_embeds" in extras:
            del kwargs["input_ids"]
        parameters = self.model.traits.forward_parameters
        if "position_ids" in parameters:  # `generate` makes them from the mask
            kwargs["position_ids"] = torch.arange(ids.shape[1]).expand(ids.shape)
        if "use_cache" in parameters:
            kwargs["use_cache"] = self.cached
        if "logits_to_keep" in parameters:  # `generate` wants the last position's only
            kwargs["logits_to_keep"] = 1
        if self.model.traits.is_encoder_decoder:
            given = extras.get("decoder_input_ids", self.options.get("decoder_input_ids"))
            kwargs["decoder_input_ids"] = self._decoder_prompt(ids.shape[0], given)
        options = {**demands, **self.options}
        if OPTION in options:
            kwargs[OPTION] = options[OPTION]
        return Call((), without_cached(kwargs) if PAST in kwargs else kwargs)

    def _decoder_prompt(self, rows: int, given: torch.Tensor | None) -> torch.Tensor:
        """What a decoder begins with: its start token, and what was given for it, if anything."""
        start = torch.full((rows, 1), self.model.traits.decoder_start or 0)
        if given is None:
            return start
        begun = not bool((given[:, 0] != start[0, 0].to(given.device)).all())
        return given if begun else torch.cat([start.to(given.device), given], 1)

    def generate(
        self,
        module: nn.Module,
        implementation: Any,
        prompts: Sequence[Prompt],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Calls the model's own `generate`."""
        try:
            with attending(module, implementation), forgetting_lengths(self.model.traits.growing):
                return module.generate(**kwargs)  # pyright: ignore[reportCallIssue]
        except IndexError:
            for prompt in prompts:
                self.model.traits.reader.check([prompt], self.following(prompt))
            raise

    def check_length(self, prompts: Sequence[Prompt]) -> None:
        """Raises if a prompt is too long for the model, where the model does not say so."""
        # Without weights nothing runs: where a job runs on a CPU, an end token may come before.
        if self.model.loaded and not self.model.traits.reader.lookups_check:
            for prompt in prompts:
                self.model.traits.reader.check_length(prompt, self.following(prompt))

    def begin(self, module: nn.Module, prompt: Prompt) -> None:
        """Generates one token, with nobody looking."""
        self.go_on(module, prompt, None)

    def go_on(self, module: nn.Module, prompt: Prompt, tokens: torch.Tensor | None) -> None:
        """Generates given tokens `(rows, step)` behind a prompt, or any one, with nobody looking.

        Of the options only those count on which the values of a forward depend.
        """
        kwargs: dict[str, Any] = {
            "input_ids": prompt.ids,
            "attention_mask": prompt.visible_mask,
            "pad_token_id": self.pad_id,
            "max_new_tokens": 1,
            "min_new_tokens": None,
            "eos_token_id": None,
            "use_cache": self.cached,
            "do_sample": False,
        }
        if tokens is not None:
            start = 1 if self.model.traits.is_encoder_decoder else prompt.ids.shape[1]

            def choose(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                chosen = tokens[:, ids.shape[1] - start].to(scores.device)
                # There may be more embeddings than logits, as of an image's token.
                return only(scores, chosen.clamp_max(scores.shape[-1] - 1))

            kwargs |= {"max_new_tokens": tokens.shape[1], "logits_processor": [choose]}
        with attending(module, self.options.get(OPTION, prompt.demands.get(OPTION))):
            placed = self.model.traits.placement.moved(kwargs)
            module.generate(**placed)  # pyright: ignore[reportCallIssue]
