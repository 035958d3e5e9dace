"""Which options of a run may travel in a job: an explicit list, with what each may be.

An option of `generate` can be code in disguise (`custom_generate` runs what a repository holds), so
options that are not listed here stay at home. The forward of a model only computes: what it takes
by name may travel if it is plain data, and the model that runs the job checks the name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import msgspec
import torch

from insitu.graph.errors import WireError

_Ids = int | list[int]
_Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]

_OF_RUNS: Mapping[str, Any] = {
    "attn_implementation": _Attention,
    "output_attentions": bool | None,
    "output_hidden_states": bool | None,
    "use_cache": bool | None,
}

_OF_FORWARDS: Mapping[str, Any] = {
    **_OF_RUNS,
    "max_tokens_per_pass": int | None,
    "return_dict": bool | None,
    "share_prefixes": bool | None,
}

_OF_GENERATIONS: Mapping[str, Any] = {
    **_OF_RUNS,
    # How long it goes on.
    "max_new_tokens": int | None,
    "min_new_tokens": int | None,
    "max_length": int | None,
    "min_length": int | None,
    "max_time": float | int | None,
    "stop_strings": str | list[str] | None,
    "eos_token_id": _Ids | None,
    # How tokens are chosen.
    "do_sample": bool | None,
    "temperature": float | int | None,
    "top_k": int | None,
    "top_p": float | int | None,
    "min_p": float | int | None,
    "typical_p": float | int | None,
    "epsilon_cutoff": float | int | None,
    "eta_cutoff": float | int | None,
    "num_beams": int | None,
    "num_beam_groups": int | None,
    "num_return_sequences": int | None,
    "early_stopping": bool | Literal["never"] | None,
    "length_penalty": float | int | None,
    "diversity_penalty": float | int | None,
    "repetition_penalty": float | int | None,
    "encoder_repetition_penalty": float | int | None,
    "no_repeat_ngram_size": int | None,
    "encoder_no_repeat_ngram_size": int | None,
    "bad_words_ids": list[list[int]] | None,
    "force_words_ids": list[list[int | list[int]]] | None,
    "suppress_tokens": list[int] | None,
    "begin_suppress_tokens": list[int] | None,
    "forced_bos_token_id": int | None,
    "forced_eos_token_id": _Ids | None,
    "renormalize_logits": bool | None,
    "remove_invalid_values": bool | None,
    "guidance_scale": float | int | None,
    "penalty_alpha": float | int | None,
    "prompt_lookup_num_tokens": int | None,
    # What tokens mean, and what is returned.
    "bos_token_id": int | None,
    "pad_token_id": int | None,
    "decoder_start_token_id": _Ids | None,
    "max_tokens_per_pass": int | None,
    "cache_implementation": Literal["dynamic", "static", "offloaded", "quantized"] | None,
    "output_logits": bool | None,
    "output_scores": bool | None,
    "return_dict_in_generate": bool | None,
}

_Plain = None | bool | int | float | str


def check_options(procedure: str, options: Mapping[str, Any]) -> None:
    """Raises if the options of a block may not travel.

    Args:
        procedure: how the model runs, such as "generate".
        options: the options, by name.

    Raises:
        WireError: naming one that may not, and saying what may.
    """
    listed = _OF_GENERATIONS if procedure == "generate" else _OF_FORWARDS
    for name, value in options.items():
        if name in listed:
            _check(name, value, listed[name])
        elif not name.isidentifier():
            raise WireError(f"{name!r:.40} is no option of `{procedure}`")
        elif procedure == "generate" and not isinstance(value, torch.Tensor):
            raise WireError(
                f"the option `{name}={_shown(value)}` of `generate` may not travel: those may that "
                "are numbers, words and truth values in "
                "Hugging Face's list, and tensors for the model's forward"
            )
        elif not _is_data(value):
            raise WireError(
                f"the option `{name}={_shown(value)}` of `{procedure}` is no plain data"
            )


def _check(name: str, value: Any, kind: Any) -> None:
    try:
        msgspec.convert(_as_lists(value), kind, strict=True)
    except msgspec.ValidationError as error:
        said = str(error).partition(" - at")[0]
        raise WireError(f"the option `{name}={_shown(value)}` may not travel: {said}") from None


def _as_lists(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_lists(item) for item in cast("list[Any]", value)]
    return value


def _is_data(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_data, cast("list[Any]", value)))
    return isinstance(value, _Plain | torch.Tensor)


def _shown(value: Any) -> str:
    if isinstance(value, _Plain):
        return f"{value!r:.40}"
    return f"<{type(value).__name__}>"
