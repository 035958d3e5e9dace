"""Prompts with images, video or sound: a processor brings them to what the model takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

from insitu.graph.errors import PromptError, PromptTypeError
from insitu.graph.location import Location, Mark
from insitu.models.chats import CHOICE, are_chats, is_chat, rendered

MEDIA = ("images", "videos", "audio")
"""What goes with a prompt, by the names of the processors' arguments."""


def processed(
    processor: Any,
    prompt: Any,
    media: Mapping[str, Any],
    side: Literal["left", "right"] | Callable[[], Literal["left", "right"]],
    mark: Mark,
    choice: bool | None = None,
) -> Mapping[str, Any]:
    """Returns what a processor makes of a prompt: `input_ids` and all else that the model takes.

    Args:
        processor: the model's own, or the error with which loading it failed; None if there is
            none.
        prompt: text with the processor's placeholders, a list of texts, or a chat, whose messages
            may have the images in their content.
        media: images, videos and audio, in any form that the processor takes.
        side: where shorter ones of several texts are padded; a function is asked if there are any.
        mark: the user's line.
        choice: whether the beginning of an answer is added to a chat, None for the usual.

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
    chats: list[Any] = [prompt] if is_chat(prompt) else list(prompt) if are_chats(prompt) else []
    if not chats and several and not _texts(prompt):
        raise PromptTypeError(
            f"What goes with {' or '.join(MEDIA)} is a string, a list of strings or a chat; this "
            f"is a {type(prompt).__name__}. What a processor returned is a prompt by itself.",
            location,
        )
    options: dict[str, Any] = {"return_tensors": "pt"}
    if several and len(chats or prompt) > 1:
        options |= {"padding": True, "padding_side": side() if callable(side) else side}
    try:
        if chats and not media:
            answered = {chat[-1]["role"] == "assistant" for chat in chats}
            if choice is None and len(answered) > 1:
                raise ValueError(
                    "some of the chats end with the assistant's words and some do not: give each "
                    f"an `invoke`, or say `{CHOICE}=`"
                )
            end: dict[str, Any] = {CHOICE: choice is not False}
            if choice is None and True in answered:
                end = {"continue_final_message": True}
            return processor.apply_chat_template(
                prompt, **end, tokenize=True, return_dict=True, **options
            )
        if chats:
            texts = [rendered(processor.apply_chat_template, chat, choice) for chat in chats]
            start = getattr(processor.tokenizer, "bos_token", None)
            options["add_special_tokens"] = start is None or not texts[0].startswith(start)
            prompt = texts if len(texts) > 1 else texts[0]
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
