"""Which arguments of a block or an invocation are of its prompt, and which are of the whole run.

How a prompt becomes token ids is in `reader.py`, and which options a run takes in `options.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from insitu.graph.errors import OptionError, PromptTypeError
from insitu.graph.location import Location, Mark, here
from insitu.graph.recorded import Recorded
from insitu.models.given_caches import goes_on_from, kept_as_now
from insitu.models.media import MEDIA
from insitu.models.prompts import PROMPTS, WITH_PROMPTS

if TYPE_CHECKING:
    from insitu.models.language_subject import LanguageSubject


def given_to_block(
    model: LanguageSubject, prompt: Any, kwargs: dict[str, Any], method: str
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Returns what a block gives to its one invocation, None if nothing.

    Args:
        model: the model.
        prompt: the block's prompt, None if it is among `kwargs` or there is none.
        kwargs: the block's arguments by keyword. What goes with the prompt is taken out of them.
        method: the one that opens the block, such as "trace".

    Raises:
        OptionError: if an argument belongs to `invoke`, or means nothing to the model.
    """
    keyword = not kwargs.keys().isdisjoint(PROMPTS)
    own: dict[str, Any] = {}
    for name in [*kwargs]:
        goes_with = name in WITH_PROMPTS or name == "seed"
        if goes_on_from(name, kwargs[name]):  # of a block without a prompt, for each in it
            if method != "generate" and model.traits.takes_use_cache:
                kwargs.setdefault("use_cache", True)
            if prompt is not None or keyword:
                own[name] = kept_as_now(kwargs.pop(name))
            continue
        if goes_with and prompt is None and not keyword:
            raise OptionError(f"Each prompt has its own `{name}`: give it to `invoke`.", here())
        if name in MEDIA and name not in model.traits.reader.media:
            raise OptionError(_lacks_media(model, name), here())
        if goes_with or name in PROMPTS:
            own[name] = kwargs.pop(name)
    if kwargs:
        model.traits.options.check(kwargs, method, here)
    return None if prompt is None and not keyword else ((prompt,) * (prompt is not None), own)


def given_to_invocation(
    model: LanguageSubject, args: tuple[Any, ...], kwargs: dict[str, Any], method: str, mark: Mark
) -> dict[str, Any]:
    """Returns what an invocation was given with its prompt, or as its prompt, by keyword.

    Args:
        model: the model.
        args: what it was given by place.
        kwargs: what it was given by keyword.
        method: the one that opened the block, such as "trace".
        mark: the user's line.

    Raises:
        PromptTypeError: if it was given no prompt, or several.
        OptionError: if something does not belong there.
    """
    if not args and not kwargs:
        raise PromptTypeError(
            "`invoke()` without a prompt does not mean those of the others. Read a value of each "
            "in its own invocation, or give them as one: `tracer.invoke([first, second])` has both "
            "as rows.",
            Location(*mark),
        )
    if len(args) > 1 or (not args and kwargs.keys().isdisjoint(PROMPTS)):
        raise PromptTypeError(
            "An invocation takes one prompt, as `invoke(prompt)`, `invoke(input_ids=...)` or "
            "`invoke(inputs_embeds=...)`. Options of the run are given to "
            f"`{method}`.",
            Location(*mark),
        )
    for name, value in kwargs.items():
        if name in MEDIA and name not in model.traits.reader.media:
            raise OptionError(_lacks_media(model, name), Location(*mark))
        if name in WITH_PROMPTS or name in PROMPTS:
            continue
        model.traits.options.check([name], method, lambda: Location(*mark))
        if goes_on_from(name, value):
            kwargs = {**kwargs, name: kept_as_now(value)}
        elif not isinstance(value, torch.Tensor | Recorded):
            raise OptionError(
                f"`{name}` is an option of the whole run: give it to `{method}`.", Location(*mark)
            )
    return kwargs


def checked_seed(seed: Any, location: Location) -> int | None:
    """Returns the seed that was given with a prompt.

    Args:
        seed: what was given, None if nothing was.
        location: the user's line.

    Raises:
        PromptTypeError: if it is no integer.
    """
    if seed is None or (type(seed) is int and -(2**63) <= seed < 2**63):
        return seed
    raise PromptTypeError(
        "`seed` is an integer of at most 64 bits, from which the draws for a prompt start, "
        f"not {seed!r:.100}.",
        location,
    )


def check_budget(tokens: Any) -> None:
    """Raises if a number of tokens in a pass is none.

    Args:
        tokens: the number, None if none was given.

    Raises:
        OptionError: if it is no whole number from 1.
    """
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        raise OptionError(
            f"`max_tokens_per_pass` is a whole number from 1, not {tokens!r}.", here()
        )


def _lacks_media(model: LanguageSubject, name: str) -> str:
    """What to say where a model of text is given images, videos or audio."""
    return f"A {type(model).__name__} takes no `{name}`: load it as a `VisionLanguageModel`."
