"""Modules by number, slice, name or path: what `handle[key]` stands for.

A number means what it means to PyTorch: the module's own `__getitem__` says. A module without one
has named children only, and an error lists them.
"""

# What a module holds is in its `_modules` and `_parameters`, as in `nn.Module` itself.
# pyright: reportPrivateUsage=false, reportUnknownVariableType=false

from __future__ import annotations

import re
from typing import Any

from torch import nn

from insitu.batching.procedure import Subject
from insitu.graph.errors import IndexOutOfRangeError, InsituError, OperationError, PathError
from insitu.graph.location import here
from insitu.graph.node import readable
from insitu.tracing.unknown_names import no_child

_MOST_LISTED = 8
_BY_PLACE = (nn.ModuleList, nn.Sequential)


def names_of(model: Subject, path: str, module: nn.Module, key: Any) -> str | list[str]:
    """Returns the names of the modules that an index means, below the module.

    Args:
        model: the model.
        path: the module's path, "" for the whole model.
        module: the module.
        key: what was written between the brackets.

    Returns:
        A dotted path below the module, or several for a slice.

    Raises:
        PathError: if there is no module of that name or path.
        IndexOutOfRangeError: if there is no module of that number.
        OperationError: if PyTorch does not index the module.
    """
    if isinstance(key, str):
        return _below(model, path, module, key)
    check_indexed(path, module, key)
    written = readable(path) if path else "model"
    if not isinstance(module, _BY_PLACE):
        return _given(model, path, module, key)
    names = list(module._modules)
    try:
        return names[key]
    except TypeError:
        raise PathError(
            f"Modules are reached by number, name or slice, so there is no `{written}[{key!r}]`.",
            here(),
        ) from None
    except IndexError:
        raise IndexOutOfRangeError(
            f"`{written}` holds {len(names)} modules, so there is no `{written}[{key}]`.", here()
        ) from None


def check_indexed(path: str, module: nn.Module, key: Any = None) -> None:
    """Raises if PyTorch does not index a module, and lists its children.

    Args:
        path: its path, "" for the whole model.
        module: the module.
        key: the index, None where its children are counted or gone through.

    Raises:
        OperationError: if it does not.
    """
    # `nn.Module` itself has none of these: a class that has one says what a number means.
    if hasattr(type(module), "__getitem__"):
        return
    written = f"model.{readable(path)}" if path else "model"
    names, weights = list(module._modules), list(module._parameters)
    use = "it has no length and cannot be gone through" if key is None else f"`[{key!r}]` is none"
    what = f"`{written}` is a {type(module).__name__}, which is no list of modules, so {use}."
    if names:
        listed = ", ".join(f"`{written}.{name}`" for name in names[:_MOST_LISTED])
        what += f" Its modules: {listed}{', ...' if len(names) > _MOST_LISTED else ''}."
    else:
        what += " It has no modules."
    if weights:
        what += f" Its weights: {', '.join(f'`{written}.module.{name}`' for name in weights[:4])}."
    raise OperationError(what, here())


def _below(model: Subject, path: str, module: nn.Module, key: str) -> str:
    """A name of a child, or a path below the module."""
    if key in module._modules:
        return key
    found, place, names = module, path, re.sub(r"\[(-?\d+)\]", r".\1", key).split(".")
    for number, name in enumerate(names):
        if re.fullmatch(r"-\d+", name) and isinstance(found, _BY_PLACE):
            children = list(found._modules)
            name = names[number] = children[int(name)] if -int(name) <= len(children) else name
        child = found._modules.get(name)
        if child is None:
            raise PathError(no_child(model, place, found, name), here())
        found, place = child, f"{place}.{name}" if place else name
    return ".".join(names)


def _given(model: Subject, path: str, module: Any, key: Any) -> str | list[str]:
    """What the module's own `__getitem__` gives, if these are modules below it."""
    written = f"model.{readable(path)}" if path else "model"
    try:
        found = module[key]
    except InsituError:
        raise
    except Exception as error:  # whatever its class raises
        names = ", ".join(map(repr, module._modules)) or "none"
        kind = IndexOutOfRangeError if isinstance(error, IndexError) else PathError
        raise kind(
            f"`{written}[{key!r}]` is not there: {type(error).__name__} ({error}). Its modules: "
            f"{names}.",
            here(),
        ) from None
    start = f"{path}." if path else ""
    paths = {
        id(one): place.removeprefix(start)
        for place, one in model.modules.items()
        if place.startswith(start) and place != path
    }
    several = isinstance(key, slice)
    asked: list[Any] = [*found] if several else [found]
    if all(id(one) in paths for one in asked):
        names = [paths[id(one)] for one in asked]
        return names if several else names[0]
    raise PathError(
        f"`{written}[{key!r}]` is a {type(found).__name__} and no module of the model: write "
        f"`{written}.module[{key!r}]`.",
        here(),
    )
