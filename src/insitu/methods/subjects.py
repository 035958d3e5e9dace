"""Subjects: which tokens of a prompt a piece of its text is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from insitu.graph.errors import OptionError, PromptError
from insitu.graph.location import here
from insitu.methods.prompts import Prompts
from insitu.methods.sites import chosen
from insitu.models.language_model import LanguageModel

Subject = str | int | Sequence[int]
"""A piece of a prompt: its text, or its positions, from the end if negative."""


def positions_of(
    model: LanguageModel, prompts: Prompts, subjects: Subject | Sequence[Subject]
) -> list[list[int]]:
    """Returns the positions of each prompt's subject, in their order.

    Args:
        model: the model.
        prompts: the prompts.
        subjects: of one prompt given alone, its subject; of several, a text that all of them
            have, or a list with a subject for each.

    Raises:
        OptionError: if there are not as many subjects as prompts, or no such positions.
        PromptError: if a text is not in a prompt, or more than once.
    """
    each: Sequence[Any]
    if not prompts.many:
        each = [subjects]
    elif isinstance(subjects, str):
        each = [subjects] * len(prompts)
    else:
        each = list(subjects) if isinstance(subjects, Iterable) else [subjects]
        if len(each) != len(prompts):
            raise OptionError(
                f"There are {len(each)} subjects for {len(prompts)} prompts: give a text that all "
                "of them have, or one for each.",
                here(),
            )
    return [_of(model, prompts, number, subject) for number, subject in enumerate(each)]


def _of(model: LanguageModel, prompts: Prompts, number: int, subject: Subject) -> list[int]:
    if not isinstance(subject, str):
        if subject is None:  # pyright: ignore[reportUnnecessaryComparison]
            raise OptionError("A subject is given as its text or its positions, not None.", here())
        return sorted(set(chosen("position", subject, prompts.lengths[number])))
    ids = prompts.ids[number].tolist()
    # Of the beginning, and not of each token: a character may be made of several.
    ends = [len(_text(model, ids[: count + 1])) for count in range(len(ids))]
    text = _text(model, ids)
    wanted = subject.strip()
    count = text.count(wanted) if wanted else 0
    if count != 1:
        what = "has no" if not count else f"has {count} times the"
        raise PromptError(
            f"The prompt {text!r} {what} subject {subject!r}: give its text as it stands there "
            "once, or its positions.",
            here(),
        )
    begin = text.index(wanted)
    end = begin + len(wanted)
    starts = [0, *ends[:-1]]
    return [at for at in range(len(ids)) if starts[at] < end and ends[at] > begin]


def _text(model: LanguageModel, ids: Sequence[int]) -> str:
    return model.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
