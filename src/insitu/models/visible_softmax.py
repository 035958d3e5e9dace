"""The options of a run in which attention computes its softmax where it can be seen.

Fused attention shows no scores and no patterns. Which option makes a model compute them in the
open depends on the model and on the version of Transformers, so they are tried in turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from insitu.graph.errors import UnknownShapeError
from insitu.models.attention import OPTION
from insitu.models.parts import Block

# With some versions of Transformers a model's attention is chosen when it is made, and eager only
# where it is asked for its weights.
_TRIED: Sequence[Mapping[str, Any]] = (
    {OPTION: "eager"},
    {OPTION: "eager", "output_attentions": True},
    {"output_attentions": True},
)


def showing_options(
    blocks: Callable[[Mapping[str, Any]], Mapping[str, Block]],
    agrees: Callable[[Mapping[str, Any]], bool],
    proven: Mapping[str, Any] | None,
) -> Mapping[str, Any]:
    """Returns the first options with which all attention shows its patterns; empty without any.

    Args:
        blocks: finds the blocks of a run with some options.
        agrees: says whether a run with some options computes the same as one without.
        proven: the options that a proof used, which are tried first; None if there are none.
    """
    for options in _TRIED if proven is None else (proven, *_TRIED):
        with contextlib.suppress(UnknownShapeError):  # not all models can run so
            if _has_softmax(blocks(options)) and agrees(options):
                return options
    return {}


def _has_softmax(blocks: Mapping[str, Block]) -> bool:
    """Whether all attention in blocks shows its patterns."""
    heads = [part for b in blocks.values() for part in (b.attention, b.cross_attention) if part]
    return bool(heads) and all(part.pattern is not None for part in heads)
