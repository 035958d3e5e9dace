"""The id of one token, from its text. How whole prompts become token ids is in `reader.py`."""

from __future__ import annotations

from operator import index

from insitu.graph.errors import OptionError, PromptError
from insitu.graph.location import here
from insitu.models.language_subject import LanguageSubject
from insitu.models.tokens import vocabulary_of


def token_id(model: LanguageSubject, token: str | int) -> int:
    """Returns the id of a token.

    Args:
        model: the model.
        token: its text, as it is written in the middle of a sentence, mostly with a space first:
            " Paris"; or its id.

    Raises:
        PromptError: if it is no one token, or an id that the model does not have.
        OptionError: if it is neither text nor a number.
        LoadError: if the model has no tokenizer, and it is text.
    """
    if not isinstance(token, str | bool) and hasattr(token, "__index__"):
        token = index(token)
        if not 0 <= token < vocabulary_of(model.module, model.config):
            raise PromptError(f"The model has no token {token}.", here())
        return token
    if not isinstance(token, str):
        raise OptionError(f"A token is given as text or as its id, not as {token!r}.", here())
    tokenizer = model.tokenizer
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) == 1:
        return ids[0]
    spaced = tokenizer.encode(" " + token, add_special_tokens=False)
    hint = f" With a space, {' ' + token!r}, it is one." if len(spaced) == 1 else ""
    parts = ", ".join(repr(tokenizer.decode([one])) for one in ids)
    raise PromptError(f"{token!r} is {len(ids)} tokens ({parts}), not one.{hint}", here())
