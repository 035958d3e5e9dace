"""Which options of a run a server takes from anybody, and what they make a run take.

Some that may travel make libraries compile code, or fetch it, or look at every letter for every
token. A check without data sees nothing of that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from insitu.engine.job import Job
from insitu.engine.job_parts import JobBlock
from insitu.graph.errors import LimitError, OptionError

_TAKEN: Mapping[str, frozenset[Any]] = {
    # The others fetch kernels, or compile.
    "attn_implementation": frozenset((None, "eager", "sdpa")),
    "cache_implementation": frozenset((None, "dynamic")),
}
_MOST_TEXT = 1_000
"""Letters of `stop_strings`: each is compared with every token of the vocabulary."""
_MOST_IDS = 10_000
"""Token ids in lists: they are looked through for every token that is chosen."""
_USUAL_LENGTH = 20
"""How many tokens there are in all where nothing says so: the default of Transformers."""
_LISTS = (
    *("bad_words_ids", "force_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("eos_token_id", "forced_eos_token_id", "decoder_start_token_id"),
)


def check_options(job: Job) -> None:
    """Raises if a job has options that a server does not take.

    Args:
        job: the job.

    Raises:
        OptionError: for one that makes a library do more than compute, at the line of the prompt.
        LimitError: for one that is too long, at the line of the prompt.
    """
    for block in job.blocks:
        given = [block.options, *(prompt.kwargs for prompt in block.prompts)]
        given += [] if block.demanded is None else [block.demanded.options]
        for options in given:
            for name, taken in _TAKEN.items():
                value = options.get(name)
                if not isinstance(value, str | None) or value not in taken:
                    listed = ", ".join(sorted(repr(one) for one in taken if one))
                    raise OptionError(
                        f"A server does not take `{name}={value!r:.40}`, but {listed}.",
                        block.prompts[0].location,
                    )
    for block in _generations(job):
        texts = block.options.get("stop_strings")
        letters = sum(len(text) for text in _leaves(texts) if isinstance(text, str))
        ids = sum(1 for name in _LISTS for _ in _leaves(block.options.get(name)))
        for found, most, what in (
            (letters, _MOST_TEXT, "letters in `stop_strings`"),
            (ids, _MOST_IDS, "token ids in options"),
        ):
            if found > most:
                raise LimitError(
                    f"The generation has {found:,} {what}, and a server takes {most:,}.",
                    block.prompts[0].location,
                    limit="values",
                    found=found,
                    allowed=most,
                )


def times_counted(job: Job) -> float:
    """Returns how many times as much as was counted generations of a job may take.

    Each row goes on as many rows with some options. Where nothing says how many tokens there are
    to come, one was counted.

    Args:
        job: the job.
    """
    found = [_rows(block.options) * _uncounted_steps(block) for block in _generations(job)]
    return max(found, default=1.0)


def _generations(job: Job) -> Iterator[JobBlock]:
    return (block for block in job.blocks if block.procedure == "generate")


def _rows(options: Mapping[str, Any]) -> float:
    """How many rows each row of a prompt becomes."""
    beams, several = (options.get(name) for name in ("num_beams", "num_return_sequences"))
    # Contrastive search looks at so many continuations at once.
    looks = options.get("top_k") if options.get("penalty_alpha") else 1
    guided = 2 if options.get("guidance_scale") else 1
    counts = [one for one in (beams, several, looks) if isinstance(one, int)]
    return float(max(1, *counts, 1) * guided)


def _uncounted_steps(block: JobBlock) -> float:
    """How many steps there may be for each that was counted."""
    options = block.options
    if options.get("max_new_tokens") is not None or all(one.steps for one in block.prompts):
        return 1.0
    most = options.get("max_length")
    least = options.get("min_length"), options.get("min_new_tokens")
    known = [one for one in (most, *least, _USUAL_LENGTH) if isinstance(one, int)]
    return float(max(known))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in cast("list[Any]", value):
            yield from _leaves(item)
    elif value is not None:
        yield value
