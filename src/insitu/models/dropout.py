"""Whether dropout is on in a module: then its values are random.

Dropout that is no module, but a function that a forward calls, is known by a number that the module
keeps under a name with "drop" in it: `attention_dropout`, `attn_pdrop`, `layerdrop`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

INDIFFERENT = frozenset(
    [
        *(nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict),
        *(nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Identity),
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid),
    ]
)
"""Kinds of modules for which it makes no difference whether they are in training mode."""


def drops_out(parts: Iterable[nn.Module]) -> bool:
    """Returns whether any of these modules is in training mode and has dropout.

    Args:
        parts: the modules of a model.
    """
    training = [part for part in parts if part.training]
    return any(_has_dropout(part) for part in training)


def say_that_it_drops_out(said: set[str]) -> None:
    """Says once that a model's values are random.

    Args:
        said: what was said of the model before.
    """
    if "dropout" not in said:
        said.update(("dropout", "training"))
        warnings.warn(
            "The model is in training mode, so dropout makes its values random: each run gives "
            "others, and invocations run one by one. `model.module.eval()` turns it off.",
            stacklevel=3,
        )


def say_that_it_trains(said: set[str]) -> None:
    """Says once what follows from training mode, where it is not said that values are random.

    Args:
        said: what was said of the model before.
    """
    if "training" not in said:
        said.add("training")
        warnings.warn(
            "The model, or a part of it, is in training mode, where the rows of a batch may "
            "depend on each other: its invocations run one by one. `model.module.eval()` lets "
            "them run together.",
            stacklevel=3,
        )


def _has_dropout(part: nn.Module) -> bool:
    if type(part) in INDIFFERENT:
        return False
    if isinstance(part, nn.modules.dropout._DropoutNd):  # pyright: ignore[reportPrivateUsage]
        return part.p > 0
    numbers = [value for name, value in vars(part).items() if "drop" in name]
    return any(isinstance(value, float) and 0 < value <= 1 for value in numbers)
