"""Prompts of language models in jobs: as they are sent, and read where they arrive."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from insitu.batching.demand import Side
from insitu.graph.errors import PromptError, PromptTypeError
from insitu.graph.location import here, mark
from insitu.models.chats import CHOICE
from insitu.models.media import MEDIA
from insitu.models.prompts import Prompt

if TYPE_CHECKING:
    from insitu.engine.job_parts import JobPrompt
    from insitu.models.language_subject import LanguageSubject


def sent(prompt: Prompt) -> JobPrompt:
    """Returns a prompt as a job holds it.

    Position ids that were made for it are left out: where it runs they are made anew.

    Args:
        prompt: the prompt.
    """
    from insitu.engine.job_parts import JobPrompt  # of use to jobs only

    embedded = "inputs_embeds" in prompt.extras
    ids = None if embedded else prompt.ids
    kwargs = dict(prompt.extras)
    if embedded and prompt.mask is not None:
        kwargs["attention_mask"] = prompt.mask
    # One that is of cached positions too is among the arguments.
    mask = None if embedded or "attention_mask" in kwargs else prompt.mask
    return JobPrompt(ids, mask, (), kwargs, prompt.seed, prompt.mark, prompt.steps, prompt.padded)


def received(
    model: LanguageSubject, prompt: JobPrompt, side: Side | Callable[[], Side], method: str
) -> Prompt:
    """Returns the prompt that a job holds, checked as if the user had given it by keyword.

    Args:
        model: the model that runs it.
        prompt: what the job holds.
        side: as of `Reader.read`.
        method: the method of the model that takes such prompts, such as "trace".

    Raises:
        PromptTypeError: if it is no prompt.
        PromptError: if the model cannot process it, or pads lists of prompts on another side.
        OptionError: if what goes with it means nothing to the model.
    """
    location = prompt.location or here()
    beside: dict[str, Any] = dict(prompt.kwargs)
    if prompt.args or beside.keys() & {CHOICE, *MEDIA}:
        raise PromptTypeError(
            "The job has arguments of a forward, and this model takes prompts: run it on a "
            "`Model` of the module.",
            location,
        )
    if beside:
        model.traits.options.check([*beside], method, lambda: location)
    if prompt.ids is not None:
        beside["input_ids"] = prompt.ids
    elif "inputs_embeds" not in beside:
        raise PromptTypeError("The job has a prompt without token ids.", location)
    if prompt.mask is not None:
        beside["attention_mask"] = prompt.mask
    if prompt.padded is not None:
        # It may have been supposed without weights, and lines such as `x[:, -1]` depend on it.
        own = side() if callable(side) else side
        if own != prompt.padded:
            raise PromptError(
                f"The list of prompts was padded on the {prompt.padded} when it was recorded, and "
                f"short runs of this model show that it is padded on the {own}. Give each prompt "
                "its own `invoke`, or pad the list with a tokenizer.",
                location,
            )
    read = model.traits.reader.read(None, side, prompt.mark or mark(), beside)
    return read._replace(padded=prompt.padded)
