"""The options of a run in which attention computes its softmax where it can be seen.

Fused attention shows no scores and no patterns. Which option makes a model compute them in the
open depends on the model and on the version of Transformers, so they are tried in turn. What the
model then computes must be the same; that is tried once the weights are there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from insitu.engine.fallback import Fallback, tried
from insitu.engine.keeping import evaluating, undisturbed
from insitu.engine.probe import Call
from insitu.graph.errors import UnknownShapeError
from insitu.graph.structure import tensors_of
from insitu.models.attention import OPTION, attending
from insitu.models.parts import Block

if TYPE_CHECKING:
    from insitu.models.wrapped_module import WrappedModule

# With some versions of Transformers a model's attention is chosen when it is made, and eager only
# where it is asked for its weights.
_TRIED: Sequence[Mapping[str, Any]] = (
    {OPTION: "eager"},
    {OPTION: "eager", "output_attentions": True},
    {"output_attentions": True},
)


class VisibleSoftmax:
    """Finds how a model has to run for the softmax of its attention to be seen.

    Args:
        model: the model.
        blocks: finds the blocks of a run with some options.
        sample: gives what the model is called with, once its weights are there; None if that is
            not known, and then nothing is known to agree.
        proven: gives the options that a proof of the model used, None if there are none.
    """

    def __init__(
        self,
        model: WrappedModule,
        blocks: Callable[[Mapping[str, Any]], Mapping[str, Block]],
        sample: Callable[[], Call | None],
        proven: Callable[[], Mapping[str, Any] | None],
    ) -> None:
        self._model, self._blocks, self._sample, self._proven = model, blocks, sample, proven
        self._agreed: dict[tuple[tuple[str, Any], ...], bool] = {}
        # Whether the weights were there, and the options.
        self._found: tuple[bool, Mapping[str, Any]] | None = None

    @property
    def options(self) -> Mapping[str, Any]:
        """The first options with which all attention shows its patterns; empty without any.

        Those of a proof are tried first. All are tried again once the weights are there, when it
        can be seen whether the model computes the same with them.
        """
        loaded = self._model.loaded
        if self._found is None or (loaded and not self._found[0]):
            self._found = (loaded, self._first())
        return self._found[1]

    def _first(self) -> Mapping[str, Any]:
        proven = self._proven()
        for options in _TRIED if proven is None else (proven, *_TRIED):
            with contextlib.suppress(UnknownShapeError):  # not all models can run so
                if _has_softmax(self._blocks(options)) and self.agrees(options):
                    return options
        return {}

    def agrees(self, options: Mapping[str, Any]) -> bool:
        """Returns whether the model computes with some options what it does without, to rounding.

        Without weights it is supposed to.

        Args:
            options: keyword arguments of the forward, or which implementation of attention.
        """
        if not options or not self._model.loaded:
            return True
        key = tuple(options.items())
        if key not in self._agreed:
            call = self._sample()
            self._agreed[key] = call is not None and _alike(
                _computed(self._model, call, {}), _computed(self._model, call, options)
            )
        return self._agreed[key]


def _has_softmax(blocks: Mapping[str, Block]) -> bool:
    """Whether all attention in blocks shows its patterns."""
    heads = [part for b in blocks.values() for part in (b.attention, b.cross_attention) if part]
    return bool(heads) and all(part.pattern is not None for part in heads)


def _computed(model: WrappedModule, call: Call, options: Mapping[str, Any]) -> torch.Tensor | None:
    """What a model returns for a call, None if it cannot run so."""
    kwargs = {**call.kwargs, **options}
    implementation = kwargs.pop(OPTION, None)
    with (
        model.in_use(),
        undisturbed(model.snapshot),
        evaluating(model.snapshot.parts),
        attending(model.module, implementation),
    ):
        returned = tried(lambda: tensors_of(model.module(**kwargs)), "another implementation")
    if isinstance(returned, Fallback):
        return None
    return next((tensor for tensor in returned if tensor.is_floating_point()), None)


def _alike(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    """Whether two implementations of the same may have made two tensors."""
    if first is None or second is None or first.shape != second.shape:
        return False
    scale = float(first.double().norm())
    limit = max(1e-3, 3 * torch.finfo(first.dtype).eps)  # of what is rounded many times on the way
    return float((first.double() - second.double()).norm()) <= limit * max(scale, 1e-3)
