"""Whose a hook on a module is: the model's, which it needs, or the user's, who wants to see runs.

The library's own runs, which find something out, leave the user's hooks alone: these see the runs
of blocks, once each, and never a tensor without data. Hooks without which a model would not be
itself stay: they fetch weights, apply parametrisations and collect outputs.

A user's hook may change what passes, by rows and positions that a batch has elsewhere than a prompt
alone. So prompts share nothing where there is one.
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any, TypeAlias, cast

from torch import nn
from torch.nn.modules import module as everywhere

_Tables: TypeAlias = Sequence[dict[Any, Any]]
"""Tables of hooks, as torch keeps them on a module and for all modules."""

# What takes the tables of hooks that are called in a forward from `vars(module)`.
_SEEING_FORWARDS = itemgetter("_forward_hooks"), itemgetter("_forward_pre_hooks")

# What these hang on modules belongs to the model.
_LIBRARIES = frozenset(
    [
        *("accelerate", "bitsandbytes", "deepspeed", "optimum", "peft", "torch", "torchao"),
        *("transformers", "transformers_modules"),
    ]
)


def is_the_models(hook: Any, module: nn.Module) -> bool:
    """Returns whether a hook is one without which the model would not be itself.

    It is if a library that makes models wrote it, or the installed package that wrote the module,
    or if it is a method of a module.

    Args:
        hook: the hook.
        module: the module that it hangs on.
    """
    # Libraries hang partials of their functions, too, whose module is that of `functools`.
    while isinstance(hook, partial):
        hook = hook.func
    # A method of a module is code that the model was made with.
    if isinstance(getattr(hook, "__self__", None), nn.Module):
        return True
    library = _library(getattr(hook, "__module__", None))
    if library in _LIBRARIES:
        return True
    # A model's own package may hang hooks on its modules. A user's script defines both, too, and is
    # no package.
    return library == _library(type(module).__module__) and _is_installed(library)


def users_hooks_hang_on(parts: Sequence[nn.Module]) -> bool:
    """Returns whether hooks of the user's see the forwards of a model.

    Args:
        parts: the modules of the model.
    """
    # In C: each block of several prompts asks, and few models have any.
    states = [*map(vars, parts)]
    some = any(any(map(table, states)) for table in _SEEING_FORWARDS)
    return next(users_hooks(parts if some else ()), None) is not None


def users_hooks(parts: Iterable[nn.Module]) -> Iterator[tuple[dict[Any, Any], Any, Any]]:
    """Yields the user's hooks: the table that each is in, its key and the hook.

    Args:
        parts: the modules of the model.
    """
    for part in parts:
        state = part.__dict__
        if state["_forward_hooks"] or state["_forward_pre_hooks"]:
            for table in cast("_Tables", (part._forward_pre_hooks, part._forward_hooks)):
                for key, hook in [*table.items()]:
                    if not is_the_models(hook, part):
                        yield table, key, hook
    for table in _global_tables():
        for key, hook in [*table.items()]:
            if _is_the_users(hook):
                yield table, key, hook


def _global_tables() -> _Tables:
    """The tables of the hooks that hold for all modules."""
    found: Any = (everywhere._global_forward_pre_hooks, everywhere._global_forward_hooks)
    return found


def _is_the_users(hook: Any) -> bool:
    """Whether a hook that holds for all modules is none of a library that makes models."""
    return _library(getattr(hook, "__module__", None)) not in _LIBRARIES


def _library(name: Any) -> str:
    return name.partition(".")[0] if isinstance(name, str) else ""


@lru_cache(maxsize=64)
def _is_installed(library: str) -> bool:
    """Whether a package is somebody else's, and no code of the user's."""
    file = getattr(sys.modules.get(library), "__file__", None)
    return file is not None and "site-packages" in file
