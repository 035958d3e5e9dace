"""Prompts with images, video or sound: a processor brings them to what the model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from insitu.graph.errors import PromptError, PromptTypeError
from insitu.graph.location import Location, Mark

MEDIA = ("images", "videos", "audio")
"""What goes with a prompt, by the names of the processors' arguments."""


def is_chat(prompt: Any) -> bool:
    """Returns whether a prompt is a list of messages, dictionaries with 'role' and 'content'."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, str | bytes) or not prompt:
        return False
    messages = cast("Sequence[Any]", prompt)
    return all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages)


def processed(
    processor: Any,
    prompt: Any,
    media: Mapping[str, Any],
    side: Literal["left", "right"],
    mark: Mark,
) -> Mapping[str, Any]:
    """Returns what a processor makes of a prompt: `input_ids` and whatever else the model takes.

    Args:
        processor: the model's own, or the error with which loading it failed; None if there is
            none.
        prompt: text with the processor's placeholders, a list of texts, or a chat, whose messages
            may have the images in their content.
        media: images, videos and audio, in any form that the processor takes.
        side: where shorter ones of several texts are padded.
        mark: the user's line.

    Raises:
        PromptTypeError: if the prompt is no text and no chat.
        PromptError: if there is no processor, or it refuses the prompt.
    """
    location = Location(*mark)
    if processor is None or isinstance(processor, Exception):
        reason = f" Loading one failed: {processor}" if processor else ""
        raise PromptError(
            "The prompt has more than text, but the model has no processor: pass `processor=`, or "
            f"give what a processor returned.{reason}",
            location,
        )
    several = not isinstance(prompt, str)
    chat = is_chat(prompt)
    if not chat and several and not _texts(prompt):
        raise PromptTypeError(
            f"What goes with {' or '.join(MEDIA)} is a string, a list of strings or a chat; this "
            f"is a {type(prompt).__name__}. What a processor returned is a prompt by itself.",
            location,
        )
    options: dict[str, Any] = {"return_tensors": "pt"}
    try:
        if chat and not media:
            return processor.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **options
            )
        if chat:
            prompt = processor.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=False
            )
            start = getattr(processor.tokenizer, "bos_token", None)
            options["add_special_tokens"] = start is None or not prompt.startswith(start)
        elif several and len(prompt) > 1:
            options |= {"padding": True, "padding_side": side}
        return processor(text=prompt, **media, **options)
    except Exception as error:
        raise PromptError(
            f"{type(processor).__name__} cannot process the prompt: {type(error).__name__}: "
            f"{error}",
            location,
        ) from error


def _texts(prompt: Any) -> bool:
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        return False
    return all(isinstance(text, str) for text in cast("Sequence[Any]", prompt))
