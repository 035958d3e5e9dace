"""Chats: lists of messages that a template turns into text, to be answered or continued."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

CHOICE = "add_generation_prompt"
"""The option of a chat, by Transformers' name: whether the beginning of an answer is added."""


def is_chat(prompt: Any) -> bool:
    """Returns whether a prompt is a list of messages, dictionaries with 'role' and 'content'."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, str | bytes) or not prompt:
        return False
    messages = cast("Sequence[Any]", prompt)
    return all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages)


def are_chats(prompt: Any) -> bool:
    """Returns whether a prompt is a list of chats."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, str | bytes) or not prompt:
        return False
    return all(map(is_chat, cast("Sequence[Any]", prompt)))


def rendered(render: Callable[..., Any], chat: Sequence[Any], choice: bool | None) -> str:
    """Returns a chat as text.

    Args:
        render: `apply_chat_template` of a tokenizer or a processor.
        chat: the messages.
        choice: whether the beginning of an answer is added. None adds it unless the last message
            is the assistant's, which then stays open, to be continued.

    Raises:
        Exception: of the template, if it refuses the chat.
    """
    chat = list(chat)
    if choice is None and chat[-1]["role"] == "assistant":
        return _open(render, chat)
    return render(chat, add_generation_prompt=choice is not False, tokenize=False)


def _open(render: Callable[..., Any], chat: list[Any]) -> str:
    """A chat whose last message has no end."""
    last = _text_of(chat[-1]["content"])
    try:
        if last.strip():
            return render(chat, continue_final_message=True, tokenize=False)
    except ValueError:
        # The template changes the message, such as by removing what it takes for thoughts.
        pass
    if len(chat) == 1:
        return render(chat, add_generation_prompt=False, tokenize=False)
    return render(chat[:-1], add_generation_prompt=True, tokenize=False) + last


def _text_of(content: Any) -> str:
    """The text at the end of a message, which may have images before it."""
    if isinstance(content, str):
        return content
    texts = [str(block["text"]) for block in content or () if "text" in block]
    return texts[-1] if texts else ""
