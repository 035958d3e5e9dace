"""The layers with which a part reads the residual stream, through which gradients go back into it.

A gradient at the queries of its heads, or at another thing that a part makes of the stream, is
brought back to the stream for each receiver alone. Autograd takes a backward pass for each, and
each goes through the whole layer that makes all heads. Where these layers are known, each head goes
back through its own weights, and all receivers of a part go through its norm together.
`reading_trial.py` finds for which parts they are known; the others go back by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from insitu.graph.control import call_module, pull_back
from insitu.graph.location import mark
from insitu.methods.sites import site_of
from insitu.methods.wiring import Part
from insitu.models.head_projections import HeadProjection
from insitu.models.language_model import LanguageModel
from insitu.tracing.handle import Handle


@dataclass(frozen=True, slots=True)
class ReadingLayers:
    """The layers with which a part reads the residual stream, and the one that heads add with.

    Attributes:
        norm: the path of the norm that the stream goes through; None if it goes through none.
        heads: the layers that make queries, keys and values of it, with a receiver for each head;
            none of a part that is one receiver.
        module: the path of the module that reads it, of a part that is one receiver.
        out: what the output projection multiplies each head with, `(head, d_head, d_model)`; None
            of a part whose senders are no heads.
    """

    norm: str | None = None
    heads: Sequence[HeadProjection] = ()
    module: str = ""
    out: torch.Tensor | None = None

    @property
    def paths(self) -> list[str]:
        """The modules that read what the norm gives."""
        return [*dict.fromkeys(one.path for one in self.heads)] or [self.module]

    def given(self, model: LanguageModel) -> list[Any]:
        """Returns what these modules read, in an open invocation."""
        return [Handle(model, path).input for path in self.paths]

    def made(self, model: LanguageModel) -> list[Any]:
        """Returns the values whose gradients go back: what layers of heads make, or a module reads.

        Args:
            model: the model, in an open invocation.
        """
        if not self.heads:
            return self.given(model)
        return [Handle(model, path).output for path in self.paths]

    def normed(self, stream: Any) -> Any:
        """Returns what the norm makes of values such as the stream."""
        return stream if self.norm is None else call_module(self.norm, (stream,), {}, mark())

    def by_heads(self, slopes: Sequence[Any]) -> list[Any]:
        """Returns the gradients at queries, at keys and at values, `(head, position, d_head)`.

        Args:
            slopes: the gradients of `made`.
        """
        of_path = dict(zip(self.paths, slopes, strict=True))
        return [of_path[one.path][0][:, one.columns].transpose(0, 1) for one in self.heads]

    def back(self, stream: Any, slopes: Sequence[Any]) -> Any:
        """Returns the gradient at the stream for each receiver, `(receiver, position, d_model)`.

        Args:
            stream: the stream as the part reads it, `(1, position, d_model)`.
            slopes: the gradients of `made`.
        """
        whole = slopes[0]
        if self.heads:
            pairs = zip(self.by_heads(slopes), self.heads, strict=True)
            whole = torch.cat([slope @ one.weight for slope, one in pairs])
        return whole if self.norm is None else pull_back(self.norm, stream, whole, mark())

    def sending(self, model: LanguageModel, part: Part) -> Any:
        """Returns what additions of senders are linear in: what they add, or the `z` of heads.

        Args:
            model: the model, in an open invocation.
            part: the part.
        """
        value = part.added(model) if self.out is None else site_of("z").read(model, part.layer)
        return value[0]

    def sent(self, change: Any) -> Any:
        """Returns by how much what senders add changes, `(sender, position, d_model)`.

        Args:
            change: by how much what `sending` gives does.
        """
        if self.out is None:
            return change
        return (change.to(self.out.dtype) @ self.out).float()
