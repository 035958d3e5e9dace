"""Endings: what a model makes of its last residual, and what blocks make of heads and neurons.

They are found together in one small forward of the model with its weights, or, where these are
somewhere else, in one without data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from insitu.engine.dataflow import Dataflow, watch
from insitu.graph.node import SEPARATOR
from insitu.models.blocks import CACHES
from insitu.models.norms import norm_of
from insitu.models.parts import Spot
from insitu.models.ways import Way, find_way

if TYPE_CHECKING:
    from insitu.models.body import Body


_UNKNOWN = "it is not known what this model is called with, or it has no list of blocks."


@dataclass(frozen=True, slots=True)
class Endings:
    """What a model makes of values by which they reach the logits; or why that is not known.

    Attributes:
        logits: what the model makes of what leaves its last block.
        unembedded: the same as far as its unembedding: without what caps logits behind it.
        heads: what each block makes of its heads' `z`, as far as what attention adds; by path.
        neurons: what each block makes of its MLP's `post`, as far as what the MLP adds; by path.
    """

    logits: Way | str
    unembedded: Way | str
    heads: Mapping[str, Way | str]
    neurons: Mapping[str, Way | str]


def find_endings(body: Body) -> Endings:
    """Returns the endings of a model.

    Args:
        body: the facts of its parts.
    """
    model = body.model
    if model.away is not None:
        return _endings_without_weights(body)
    call = body.placed_sample()
    if call is None or not body.stacks:
        return Endings(_UNKNOWN, _UNKNOWN, {}, {})
    with model.in_use():
        flow = watch(model.module, model.modules, call, fake=False, keeping=True, caches=CACHES)
        return _endings(body, _Ways(flow, model.modules))


def _endings_without_weights(body: Body) -> Endings:
    """The endings of a model whose weights are somewhere else.

    They are found in a forward without data. What they compute is verified in a small random model
    of the same class, with as many blocks; where the way there is another one, it is not known.
    """
    model, call, proofs = body.model, body.sample(), body.proofs
    small = "nothing is proven of it." if proofs is None else proofs.small()
    if isinstance(small, str) or call is None or not body.stacks:
        why = f"its weights are somewhere else: {small}" if isinstance(small, str) else _UNKNOWN
        return Endings(why, why, {}, {})
    with model.in_use():
        flow = watch(model.module, model.modules, call, fake=True, keeping=True, caches=CACHES)
        found = _endings(body, _Ways(flow, model.modules, verified=False))
    names: Any = small.vocabulary
    known: Endings = names.endings
    return Endings(
        _alike(found.logits, known.logits),
        _alike(found.unembedded, known.unembedded),
        {path: _alike(way, known.heads.get(path)) for path, way in found.heads.items()},
        {path: _alike(way, known.neurons.get(path)) for path, way in found.neurons.items()},
    )


def _alike(found: Way | str, small: Way | str | None) -> Way | str:
    """A way that was found without data, if a small model has the same."""
    if not isinstance(found, Way) or not isinstance(small, Way):
        return small if isinstance(small, str) else "it is not known without the weights."
    if found.outline == small.outline and not small.constants:
        return found
    return "it takes weights of the model, which are not here."


def _endings(body: Body, ways: _Ways) -> Endings:
    """The endings that a forward of a model shows."""
    flow = ways.flow
    last = next(flow.calls(body.stacks[-1][-1]), None)
    final = None if last is None else flow.events[last].outputs[0]
    head = body.unembedding
    made = None if head is None else Spot(head, "output", 0, (), ())
    heads, neurons = {}, {}
    for path, block in body.blocks().items():
        z = None if block.attention is None else block.attention.z
        post = None if block.mlp is None else block.mlp.post
        heads[path] = ways.between(ways.value(z), block.added.get("attention_out"))
        neurons[path] = ways.between(ways.value(post), block.added.get("mlp_out"))
    spot = body.logits()
    return Endings(
        "it gives no logits." if spot is None else ways.between(final, spot),
        ways.between(final, made),
        heads,
        neurons,
    )


class _Ways:
    """The ways between values of a forward."""

    def __init__(
        self, flow: Dataflow, modules: Mapping[str, nn.Module], verified: bool = True
    ) -> None:
        self.flow = flow
        self._modules = modules
        self._verified = verified

    def between(self, start: int | None, spot: Spot | None) -> Way | str:
        """The way from a value to another, or why there is none."""
        end = self.value(spot)
        if start is None or end is None:
            return "one of them is not known."
        return find_way(self.flow, self._modules, start, end, self._is_unit, self._verified)

    def value(self, spot: Spot | None) -> int | None:
        """The value at a spot, None if nothing came there."""
        if spot is None:
            return None
        path, _, function = spot.path.partition(SEPARATOR)
        for index, event in enumerate(self.flow.events):
            if (event.path, event.function, event.call) != (path, function, spot.call):
                continue
            if function:
                values = event.outputs if spot.kind == "output" else event.inputs
                return values[spot.item[0] if spot.item else 0]  # pyright: ignore[reportArgumentType, reportCallIssue]
            if spot.kind != "output":
                return event.inputs[0]
            found = self.flow.results[index]
            for at in spot.item:
                found = found[at]
            return found if type(found) is int else None
        return None

    def _is_unit(self, path: str) -> bool:
        """Whether a module is called as a whole: a layer, a norm, what has no modules in it."""
        module = self._modules[path]
        plain = next(module.children(), None) is None
        return plain or "Linear" in type(module).__name__ or is_norm(module)


def is_norm(module: nn.Module) -> bool:
    """Returns whether a module is a norm over the last axis, by its only weights.

    Args:
        module: the module.
    """
    weights = [part for part in module.parameters() if part.ndim == 1]
    if len(weights) != len(list(module.parameters())) or not weights:
        return False
    return norm_of(module, "", weights[0].numel()) is not None
