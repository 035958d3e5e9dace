"""Readouts: what a model makes of what leaves its last block, as something to apply elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from insitu.graph.control import call_module
from insitu.graph.errors import OptionError
from insitu.graph.location import here, mark
from insitu.models.endings import Endings
from insitu.models.language_model import LanguageModel
from insitu.models.vocabulary import Names
from insitu.models.ways import Way, called
from insitu.tracing.vocabulary import Roles


@dataclass(frozen=True, slots=True)
class Readout:
    """What a model makes of what leaves its last block: its final norm, unembedding, and the rest.

    Attributes:
        model: the model.
        way: its operations.
    """

    model: LanguageModel
    way: Way

    def recorded(self, value: Any) -> Any:
        """Returns the logits of a value of an open block, `(..., vocabulary)`.

        Args:
            value: the proxy of hidden states, `(..., d_model)`.
        """
        line = mark()
        return self.way.apply(value, lambda path, args, kw: call_module(path, args, kw, line))

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """Returns the logits of hidden states that are there, `(..., vocabulary)`.

        To be called while the model is in use by nobody else: see `Model.in_use`.

        Args:
            value: `(..., d_model)`.
        """
        return self.way.apply(value, partial(called, self.model.modules))


def endings_of(model: LanguageModel) -> Endings:
    """Returns the facts of how values reach the logits of a model.

    It is loaded, unless a server has it.

    Args:
        model: the model.

    Raises:
        OptionError: if its blocks do not process the prompt.
    """
    if model.away is None:
        model.load()
    names = model.vocabulary
    if not isinstance(names, Names):
        raise OptionError("Only models of Transformers have logits that are known as such.", here())
    if isinstance(names.entry("", "", "encoder_blocks"), Roles):
        raise OptionError(
            "This is for models whose blocks process the prompt itself: in this one they process "
            "what follows a prompt that an encoder has read.",
            here(),
        )
    return names.endings


def readout_of(model: LanguageModel) -> Readout:
    """Returns what a model makes of what leaves its last block, as far as the logits.

    Args:
        model: the model.

    Raises:
        OptionError: if that is not known.
    """
    found = endings_of(model).logits
    if isinstance(found, str):
        raise OptionError(
            f"What this model makes of what leaves its last block is not known: {found}", here()
        )
    return Readout(model, found)
