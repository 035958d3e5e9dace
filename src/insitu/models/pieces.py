"""Models that process a prompt in pieces, and whether padding then changes its tokens.

State-space models compute some positions at a time. That gives what they would give one position
after the other, but for faults: there are models whose pieces depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from insitu.batching.demand import Side
from insitu.engine.fallback import tried
from insitu.engine.keeping import set_attribute, undisturbed
from insitu.graph.location import mark
from insitu.graph.structure import tensors_of
from insitu.models.calls import arguments
from insitu.models.joined_prompts import join
from insitu.models.prompts import Prompt, counted
from insitu.models.rotary import LengthDependence
from insitu.models.tokens import vocabulary_of
from insitu.models.trial import alike

if TYPE_CHECKING:
    from insitu.models.language_subject import LanguageSubject

_SIZE = "chunk_size"
_SHORT = 4  # positions of a piece in a trial, so that short prompts have several
_LENGTHS = (7, 12, 5)
_SIDES: tuple[Side, ...] = ("right", "left")


def lengths_of(model: LanguageSubject) -> LengthDependence:
    """Returns how a prompt's values depend on the longest row of its forward.

    What pieces do is tried out once, with the weights. Without them nothing is, and they are
    supposed to do nothing.

    Args:
        model: the model.
    """
    known = model.traits.lengths
    if known.pieces is None and model.loaded:
        parts = {
            part: vars(part)[_SIZE]
            for part in model.modules.values()
            if type(vars(part).get(_SIZE)) is int and vars(part)[_SIZE] > 1
        }
        found = 0
        if parts:
            with model.in_use():
                hides = tried(lambda: _hide_padding(model, parts), "a trial of padding")
            found = 0 if hides is True else min(parts.values())
        known = known._replace(pieces=found)
        model.traits.lengths = known
    return known


def _hide_padding(model: LanguageSubject, parts: Mapping[nn.Module, int]) -> bool:
    """Whether prompts of several pieces are in a batch what they are alone."""
    vocabulary, draw = vocabulary_of(model.module, model.config), torch.Generator().manual_seed(0)
    line = mark()
    prompts = [
        Prompt(torch.randint(1, vocabulary, (1, length), generator=draw), line)
        for length in _LENGTHS
    ]
    with undisturbed(model.snapshot):
        for part in parts:
            set_attribute(part, _SIZE, _SHORT)
        alone = [_computed(model, prompt) for prompt in prompts]
        for side in _SIDES:
            batch = join(prompts, side, model.traits.pad_id)
            whole = counted(Prompt(batch.ids, line, batch.mask), side)
            together = _computed(model, whole)
            for part, own in zip(batch.parts, alone, strict=True):
                if not alike(together[part.rows, part.positions], own):
                    return False
    return True


def _computed(model: LanguageSubject, prompt: Prompt) -> torch.Tensor:
    """What a forward gives first for each position: logits or hidden states."""
    options = {"use_cache": False} if model.traits.takes_use_cache else {}
    module: Any = model.module
    returned = module(**model.traits.placement.moved(arguments(model, prompt, options)))
    return next(tensor for tensor in tensors_of(returned) if tensor.is_floating_point())
