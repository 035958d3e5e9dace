"""The experiments: each written as plain invocations with Insitu, and with hooks by hand.

Every function takes a `Subject` and returns its cases by name. A case runs the whole experiment and
returns its results, in the same order as the other cases do, so that they can be compared. A case
"bare", if there is one, is one forward of the model, and compared with nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from subjects import Parts, parts
from torch import nn

from insitu import LanguageModel

Case = Callable[[], list[torch.Tensor]]
Cases = dict[str, Case]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that experiments are made on: as a module, and as Insitu wraps it."""

    name: str
    module: nn.Module
    model: LanguageModel
    modules: Parts
    handles: Parts


def subject(name: str, module: nn.Module) -> Subject:
    """Wraps a module."""
    model = LanguageModel(module)
    family = module.config.model_type
    return Subject(name, module, model, parts(module, family), parts(model, family))
