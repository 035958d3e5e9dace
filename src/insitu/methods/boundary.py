"""Where the user's code enters the methods: arguments of a wrong kind are refused there.

All public functions, and public methods of public classes, are wrapped once, when the package is
imported. Where a call fails with an error of Python's or torch's, its arguments are compared with
their annotations, as far as these say plainly what they are: what methods say themselves comes
first. Errors of Insitu's leave with a short traceback. Inside of the package nothing is wrapped.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, wraps
from typing import Any, Literal, Union, get_args, get_origin

import torch

from insitu.deprecation import renames_of
from insitu.graph.errors import InsituError, OptionError, PathError, nearest
from insitu.graph.location import here
from insitu.graph.recorded import AnyRecorded
from insitu.graph.tracebacks import shortened
from insitu.models.language_model import LanguageModel

_OPERATORS = (
    *("__getitem__", "__mul__", "__rmul__", "__truediv__", "__add__", "__radd__", "__sub__"),
    *("__neg__", "__call__", "__enter__"),
)
_RAW = (TypeError, ValueError, AttributeError, LookupError, RuntimeError)
_SAME: tuple[tuple[str, ...], ...] = (
    ("method", "mode", "kind", "rule", "variant"),
    ("part", "component", "sites"),
    ("part", "parts", "what", "senders", "component", "by"),
    ("sites", "site", "hook_name", "hook_point", "hook"),
    ("layers", "layer"),
    ("positions", "position", "pos"),
    ("top", "k", "n", "top_k", "topk", "most"),
    ("metric", "answer", "answers", "target", "loss"),
    ("answer", "answers", "token", "tokens", "target"),
    ("max_tokens_per_pass", "batch_size", "internal_batch_size"),
    ("progress", "verbose", "progress_bar", "show_progress"),
    ("seed", "random_state", "generator"),
    ("error_term", "error", "use_error_term"),
    ("normalised", "normalized", "normalise", "normalize"),
    ("strengths", "strength", "coefficient", "multiplier", "alpha"),
    ("prompts", "prompt", "inputs", "texts", "tokens"),
)
"""Words for one thing. Of a word that a method does not have, it names the first that it has: see
`docs/methods/index.md`. Most are words of other methods, and some of other libraries."""

_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "True or False"}


def guard(namespace: dict[str, Any], names: Collection[str]) -> None:
    """Wraps public functions of a package, and methods of its public classes.

    Args:
        namespace: of the package. The functions in it, and in the modules that they come from,
            are replaced.
        names: their names, and those of the classes.
    """
    for name in names:
        item = namespace[name]
        if inspect.isfunction(item):
            namespace[name] = wrapped = _guarded(item)
            setattr(sys.modules[item.__module__], name, wrapped)  # pickle looks it up there
        elif inspect.isclass(item):
            for own, method in [*vars(item).items()]:
                if own.startswith("_") and own not in _OPERATORS:
                    continue
                if isinstance(method, classmethod | staticmethod):
                    setattr(item, own, type(method)(_guarded(method.__func__)))
                elif inspect.isfunction(method):
                    setattr(item, own, _guarded(method))


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose arguments are checked, and whose errors have a short traceback."""
    renames = renames_of(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            if renames is not None:  # here, so that what follows knows the new names alone
                kwargs = renames.applied(kwargs)
            if any(map(_may_go_unnoticed, (*args, *kwargs.values()))):
                _check(function, args, kwargs, _is_refused_first)
            return function(*args, **kwargs)
        except PathError as error:
            failed = error
            try:  # a bare module has no names that a method asks a language model for
                _check(function, args, kwargs)
            except InsituError as wrong:
                failed = wrong
        except InsituError as error:
            failed = _in_own_words(error, function, kwargs)
        except _RAW as error:
            try:
                _check(function, args, kwargs)
            except InsituError as wrong:
                failed = wrong
            else:
                raise error  # of the user's own functions, or a fault of ours
        try:
            raise shortened(failed)
        finally:
            del failed  # else the error and this frame would keep each other

    return call


def _may_go_unnoticed(value: Any) -> bool:
    """Whether nothing may stumble over a value: a NaN, or a truth value, which counts as 0 or 1."""
    return isinstance(value, bool) or (isinstance(value, float) and math.isnan(value))


def _is_refused_first(value: Any, kind: Any) -> bool:
    """Whether that is so where such a value is wrong.

    Where one index or several may be given, methods refuse truth values in words of their own.
    """
    if isinstance(value, bool):
        kinds = {kind, *get_args(kind)}
        return kind is int or float in kinds or kinds == {kind, int, type(None)}
    return _may_go_unnoticed(value)


def _check(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    looked_at: Callable[[Any, Any], bool] = lambda value, kind: True,
) -> None:
    """Raises an `OptionError` if one of the arguments that are looked at is of a wrong kind."""
    signature, kinds = _known(function)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        wrong = str(error).rpartition("'")[0].rpartition("'")[2]
        hint = _instead(wrong, signature) if "unexpected" in str(error) else ""
        raise OptionError(
            f"`{function.__qualname__}` cannot be called so: {error}{hint}. "
            f"It takes {_taken(signature)}.",
            here(),
        ) from None
    for name, value in given.items():
        kind = kinds.get(name)
        if kind is not None and looked_at(value, kind) and not _fits(value, kind):
            shown = repr(value) if len(repr(value)) < 80 else f"a {type(value).__name__}"
            raise OptionError(
                f"`{name}` of `{function.__qualname__}` is {_told(kind)}, not {shown}.", here()
            )


def _taken(signature: inspect.Signature) -> str:
    """The names of what a function takes, as one would write a call of it."""
    written: list[str] = []
    for name, one in signature.parameters.items():
        if name == "self":
            continue
        by_name = one.kind is one.KEYWORD_ONLY or one.default is not one.empty
        several = {one.VAR_POSITIONAL: f"*{name}", one.VAR_KEYWORD: f"**{name}"}
        written.append(several.get(one.kind) or (f"{name}=" if by_name else name))
    return f"`({', '.join(written)})`"


def _in_own_words(
    error: InsituError, function: Callable[..., Any], kwargs: Mapping[str, Any]
) -> InsituError:
    """The error for an option that was handed on, and is a word for one of the method's own."""
    signature, _ = _known(function)
    for name in kwargs.keys() - signature.parameters.keys():
        hint = _instead(name, signature)
        if hint and isinstance(error, OptionError) and error.option == name:
            what = f"`{function.__qualname__}` has no argument `{name}`{hint}"
            return OptionError(f"{what}, and generation takes none of this name.", here())
    return error


def _instead(wrong: str, signature: inspect.Signature) -> str:
    """What to write for an argument that a function does not have, as the end of a message."""
    for words in _SAME:
        if wrong in words:
            own = [name for name in words if name in signature.parameters]
            if own:
                return f" (nearest: {own[0]!r})"
    return nearest(wrong, signature.parameters)


@cache
def _known(function: Callable[..., Any]) -> tuple[inspect.Signature, Mapping[str, Any]]:
    """A function's signature, and the kinds of its parameters as far as they are known."""
    signature = inspect.signature(function)
    # Annotations mean names of the file that the function stands in, and not of its decorators.
    names = inspect.unwrap(function).__globals__
    kinds: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        kind = parameter.annotation
        if isinstance(kind, str):
            try:
                kind = eval(kind, {**names, "LanguageModel": LanguageModel})
            except Exception:  # of a name that only type checkers import
                continue
        if kind is not inspect.Parameter.empty and kind is not Any:
            kinds[name] = kind
    return signature, kinds


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind, or may be for all that is known of it."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if isinstance(value, AnyRecorded):
        return True  # recorded, or a saved value: what it is counts where it is used
    if kind is None or kind is type(None):
        return value is None
    if origin is Literal:
        return isinstance(value, str) or value in get_args(kind)  # names are checked with a hint
    if kind is str:
        return isinstance(value, str)
    if kind is bool:
        return isinstance(value, bool) or hasattr(value, "dtype")
    if kind is int:
        return hasattr(value, "__index__") and not isinstance(value, bool)
    if kind is float:
        number = hasattr(value, "__float__") or hasattr(value, "__index__")
        return number and not _may_go_unnoticed(value)
    if origin is os.PathLike:
        return isinstance(value, os.PathLike)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Iterable):
        return _iterates(value, origin, get_args(kind))
    if kind is torch.Tensor:
        return hasattr(value, "dtype")
    if isinstance(kind, type) and kind.__module__.startswith("insitu."):
        return isinstance(value, kind)
    return True


def _iterates(value: Any, origin: type, kinds: Sequence[Any]) -> bool:
    """Whether a value may be a container of such a kind."""
    if isinstance(value, str | bytes):
        return str in kinds and not issubclass(origin, Mapping)
    if isinstance(value, list | tuple) and len(kinds) == 1:
        return all(_fits(item, kinds[0]) for item in value)
    if issubclass(origin, Mapping) or isinstance(value, Mapping):
        return issubclass(origin, Mapping) and isinstance(value, Mapping)
    return hasattr(value, "__iter__")


def _told(kind: Any) -> str:
    """A kind in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        words = list(dict.fromkeys(_told(one) for one in inner))
        return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
    if kind is None or kind is type(None):
        return "None"
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is os.PathLike:
        return "a path"
    if origin is not None and isinstance(origin, type) and issubclass(origin, Iterable):
        if issubclass(origin, Mapping):
            return "a dictionary"
        return f"several of them ({_told(inner[0])} each)" if inner else "several"
    if kind in _NAMES:
        return _NAMES[kind]
    name = getattr(kind, "__name__", str(kind))
    return f"{'an' if name[0] in 'AEIOU' else 'a'} `{name}`"
