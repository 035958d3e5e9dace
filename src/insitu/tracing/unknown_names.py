"""What to write in the place of a name that a module does not have, as the error's message.

Where a name is looked up is in `handle.py`.
"""

# What a user gives is checked, whatever its type is said to be.
# pyright: reportPrivateUsage=false, reportUnnecessaryIsInstance=false

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from insitu.batching.procedure import Subject
from insitu.graph.errors import nearest
from insitu.graph.node import readable
from insitu.habits import OF_MODULES, habit


def no_child(model: Subject, path: str, module: nn.Module, name: str) -> str:
    """Returns the message for a name that no child of a module has.

    Args:
        model: the model.
        path: the module's path, "" for the whole model.
        module: the module.
        name: what was asked for; Python gives a string, and users may index with anything.
    """
    written = readable(path) if path else "model"
    own = getattr(module, name, None) if isinstance(name, str) else None
    if isinstance(own, torch.Tensor):
        return (
            f"`{written}.{name}` is a parameter or buffer, not a module: reach it as "
            f"`{written}.module.{name}`."
        )
    if name in OF_MODULES:
        return f"`{written}` has no `{name}`{habit(name, OF_MODULES)}."
    children = list(module._modules)
    elsewhere = [
        readable(other)
        for other in model.modules
        if other.rpartition(".")[2] == name and not any(map(str.isdigit, other))
    ]
    what = f"`{written}` has no module {name!r}"
    if elsewhere:
        return f"{what}: write {', '.join(f'`model.{other}`' for other in elsewhere[:3])}."
    asked = isinstance(name, str) and not name.startswith("_")  # by the user, not by Python
    instead = model.vocabulary.line_instead(path, name) if asked else ""
    found = instead or nearest(name, children)
    if not found and children:
        listed = ", ".join(map(repr, children[:6])) + (", ..." if len(children) > 6 else "")
        blocks = model.vocabulary.whereabouts() if asked and not path else ""
        found = f" (it has: {listed}{blocks})"
    return f"{what}{found}."


def not_in_part(model: Subject, path: str, part: str, name: str, known: Iterable[str]) -> str:
    """Returns the message for an unknown name of a part of a block that has no module of its own.

    Args:
        model: the model.
        path: the path of the block.
        part: the name of the part.
        name: what was asked for.
        known: the names that it has.
    """
    written = readable(path) if path else "model"
    instead = model.vocabulary.line_instead(path, name)
    if instead:
        return f"`{written}.{part}` has no {name!r}{instead}."
    return (
        f"The {part} of `{written}` is no module of its own, so it has no {name!r}: its layers "
        f"are the block's. It has values by name: {', '.join(map(repr, known))}."
    )
