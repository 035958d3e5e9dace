"""The models that commands are about: how they are opened, and how their tokens are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from insitu.command_answers import first_line
from insitu.command_options import check_dtype

if TYPE_CHECKING:
    from insitu.models.language_model import LanguageModel
    from insitu.models.model import Model

_AnyModel = TypeVar("_AnyModel", bound="Model")
Loading = dict[str, Any]
"""How a model is loaded: what was given of the options that every command has which loads one."""


def language_model(name: str, loading: Loading) -> LanguageModel:
    """Returns a language model with its weights.

    Args:
        name: a repo id, a folder, or a bundled model.
        loading: how it is loaded.
    """
    from insitu import LanguageModel

    return _loaded(LanguageModel, name, loading)


def any_model(name: str, loading: Loading, load: bool = True) -> Model:
    """Returns a model of any kind: a language model if it is one.

    Args:
        name: as of `language_model`.
        loading: how it is loaded.
        load: whether its weights are needed.
    """
    from insitu import LanguageModel, Model
    from insitu.graph.errors import InsituError

    try:
        return _loaded(LanguageModel, name, loading, load)
    except InsituError as error:
        if "remote" in loading:
            raise
        try:
            return _loaded(Model.from_pretrained, name, loading, load)
        except InsituError:
            raise error from None


def _loaded(
    opener: Callable[..., _AnyModel], name: str, loading: Loading, load: bool = True
) -> _AnyModel:
    """What opens it as a model, with an error that says which model it was."""
    from insitu.graph.errors import InsituError, LoadError

    check_dtype(loading.get("dtype"))
    try:
        model = opener(name, **loading)
        if load and "remote" not in loading:  # else the server has its weights
            model.load()
    except InsituError:
        raise
    except Exception as error:  # whatever a library makes of files that are wrong
        raise LoadError(f"{name!r} cannot be loaded: {first_line(error)}") from error
    return model


def token(model: LanguageModel, text: str) -> str:
    """Returns a token as it is written in the middle of a sentence, if it is none as it is given.

    Args:
        model: the model.
        text: the token.
    """
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    return text if not text or len(ids) == 1 or text.startswith(" ") else f" {text}"
