"""Readouts: what a model makes of what leaves its last block, as something to apply elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from insitu.graph.control import call_module
from insitu.graph.errors import OptionError
from insitu.graph.location import here, mark
from insitu.methods.prompts import Prompts
from insitu.models.endings import Endings
from insitu.models.language_model import LanguageModel
from insitu.models.vocabulary import Names
from insitu.models.ways import Way, called
from insitu.tracing.vocabulary import Roles

_ROUNDING = 1e-3  # between logits that are equal but for rounding, as a share of the largest
_COARSE = 0.05  # in 16 bits


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


def check_edits(
    model: LanguageModel, prompts: Prompts, max_tokens_per_pass: int | None = None
) -> None:
    """Raises if edits change what a model makes of what leaves its last block.

    A readout calls the modules there by themselves, where edits are not in force.

    Args:
        model: the model.
        prompts: the prompts that are looked at.
        max_tokens_per_pass: as of `model.trace`.

    Raises:
        OptionError: in that case.
    """
    found = endings_of(model).logits
    if not model.edits or isinstance(found, str):
        return
    readout = Readout(model, found)
    with model.trace(max_tokens_per_pass=max_tokens_per_pass) as tracer:
        shares: list[Any] = []  # of the largest logit, in their dtype
        for ids in prompts.ids:
            with tracer.invoke(ids):
                logits: Any = model.logits
                apart = (readout.recorded(model.blocks[-1].block_out) - logits).abs().max()
                shares.append((apart / logits.abs().max()).type_as(logits).save(to="cpu"))
    for share in shares:
        limit = _COARSE if share.dtype.itemsize < 4 else _ROUNDING
        if not bool(share.value < limit):
            raise OptionError(
                "An edit of this model changes what it makes of what leaves its last block, and "
                "here that is computed without edits: take the model without that edit.",
                here(),
            )
