"""Through which layers gradients go back into the stream: found by name, tried against autograd.

The trial is a run of a few tokens. Numbers without a meaning stand for gradients at what parts make
of the stream, and go back in both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from insitu.engine.fallback import Fallback, logger, tried
from insitu.methods.reading_layers import ReadingLayers
from insitu.methods.trial import POSITIONS, difference
from insitu.methods.wiring import Part, Wiring
from insitu.models.head_projections import HeadProjection, head_projection
from insitu.models.language_model import LanguageModel
from insitu.models.parts import Block
from insitu.models.vocabulary import Names
from insitu.tracing.handle import Handle

_ROUNDING = 1e-3  # between what is equal but for rounding, as a share; what is wrong is far from it
_COARSE = 0.05  # in 16 bits

_Found = Mapping[Part, ReadingLayers | Fallback]
_Layers = Mapping[Part, ReadingLayers]


def reading_layers_of(
    model: LanguageModel, wiring: Wiring, ids: torch.Tensor
) -> list[ReadingLayers | None]:
    """Returns the layers through which gradients go back into the stream, for each part of a model.

    None stands for autograd, and why it is needed is logged.

    Args:
        model: the model.
        wiring: its parts.
        ids: a prompt to try them on, `(position,)`.
    """
    parts = [part for part in wiring.parts if part.senders]
    found = dict(_each(partial(_named, model), dict.fromkeys(parts, ReadingLayers())))
    for step in (_with_norms, _verified):
        if known := _known(found):
            found |= _each(partial(step, model, ids[:POSITIONS]), known)
    _say(found)
    layers = (found.get(part) for part in wiring.parts)
    return [one if isinstance(one, ReadingLayers) else None for one in layers]


def _known(found: _Found) -> dict[Part, ReadingLayers]:
    return {part: one for part, one in found.items() if isinstance(one, ReadingLayers)}


def _each(step: Callable[[_Layers], _Found], known: _Layers) -> _Found:
    """What a step finds of some parts; if it fails for one of them, of each by itself."""
    found = tried(partial(step, known), "a trial of it")
    if not isinstance(found, Fallback):
        return found
    if len(known) == 1:
        return dict.fromkeys(known, found)
    return {part: _each(step, {part: layers})[part] for part, layers in known.items()}


def _named(model: LanguageModel, known: _Layers) -> _Found:
    """The layers and modules that parts have by standard names."""
    return {part: _named_of(model, part) for part in known}


def _named_of(model: LanguageModel, part: Part) -> ReadingLayers | Fallback:
    names, block = model.vocabulary, _block(model, part)
    if block is None or not isinstance(names, Names):
        return Fallback("what its block consists of is not known")
    heads, weights = block.attention, names.weights
    if part.by_heads and heads is not None:
        made = [head_projection(names.weights, block, heads, letter) for letter in "qkv"]
        why = next((one for one in made if isinstance(one, str)), None)
        if why is not None:
            return Fallback(why.removesuffix("."))
        out: Any = None
        if part.gives is not None and part.gives.name == "result":
            out = weights.of_heads(block, heads, "W_O")
        known = tuple(one for one in made if isinstance(one, HeadProjection))
        return ReadingLayers(heads=known, out=out if isinstance(out, torch.Tensor) else None)
    if block.mlp is not None and part.gives is not None and part.gives.name == "mlp_out":
        if block.mlp.path is not None:
            return ReadingLayers(module=block.mlp.path)
        return Fallback("its layers are in no module of their own")
    return Fallback("what it first makes of the stream has no name")


def _block(model: LanguageModel, part: Part) -> Block | None:
    names = model.vocabulary
    if not isinstance(names, Names):
        return None
    return names.body.blocks().get(model.blocks[part.layer].path)


def _with_norms(model: LanguageModel, ids: torch.Tensor, known: _Layers) -> _Found:
    """Layers with the norms that make what their modules read, out of those of their blocks.

    Norms that were not trained yet give the same of the same stream. So the norm has to have given
    it in this run; only of one that is called more than once something else may be seen.
    """
    trials: dict[Part, list[tuple[ReadingLayers, _Trial]]] = {}
    with model.trace(ids):
        for part, layers in known.items():
            stream, given = part.reads.read(model, part.layer), layers.given(model)
            block = _block(model, part)
            norms = block.norms if block is not None else ()
            seen = [(norm, Handle(model, norm).output) for norm in norms]
            trials[part] = []
            for norm, own in ((None, stream), *seen, *((norm, None) for norm in norms)):
                one = replace(layers, norm=norm)
                made = [one.normed(stream)] if own is None else [one.normed(stream), own]
                pairs = [(value, other) for value in made for other in given]
                trials[part].append((one, _Trial(stream, pairs)))
    reason = Fallback("what its modules read is made of the stream by no norm of its block")
    return {
        part: next((layers for layers, trial in tries if trial.succeeded), reason)
        for part, tries in trials.items()
    }


def _verified(model: LanguageModel, ids: torch.Tensor, known: _Layers) -> _Found:
    """Layers through which gradients come back to the stream as they do by autograd."""
    trials: dict[Part, _Trial] = {}
    with model.trace(ids.expand(2, -1)):
        for part, layers in known.items():
            stream = part.reads.read(model, part.layer)
            trials[part] = _Trial(stream, _compared(model, part, layers, stream))
    reason = Fallback("gradients through its layers by name are not those of autograd")
    return {part: known[part] if trial.succeeded else reason for part, trial in trials.items()}


def _compared(
    model: LanguageModel, part: Part, layers: ReadingLayers, stream: Any
) -> list[tuple[Any, Any]]:
    """Gradients through some layers and those of autograd, in an open invocation of two equal rows.

    What comes back to the stream is compared for all receivers together, in the first row. In the
    second row what starts at each head has a factor of its own. If the gradient of a head is made
    of that of another one too, it comes back with another factor.
    """
    made = layers.made(model)
    sites = dict.fromkeys(r.site for r in part.receivers if r.site is not None)
    total: Any = 0
    for number, site in enumerate(sites):
        value = site.read(model, part.layer)
        start = (value.detach()[0].float() * 97).cos()  # no zeros, also where values are
        factors = _factors(start, number) if layers.heads else 1
        both = torch.stack([start, start * factors])
        total = total + (value * both.type_as(value)).sum()
    expected, *slopes = total.backward(retain_graph=True, inputs=[stream, *made])
    first, second = ([slope[row : row + 1] for slope in slopes] for row in range(2))
    pairs = [(layers.back(stream[:1], first).sum(0), expected[0])]
    if layers.heads:
        rows = zip(layers.by_heads(first), layers.by_heads(second), strict=True)
        pairs += [(own * _factors(own, at), scaled) for at, (own, scaled) in enumerate(rows)]
    if layers.out is not None:
        pairs.append((layers.sent(layers.sending(model, part)), part.added(model)[0]))
    return pairs


def _factors(value: Any, number: int) -> Any:
    """A factor for each head of one of several values, `(head, 1, 1)`, no two of them alike."""
    return value[:, :1, :1].mul(0).add(1).cumsum(0) + number / 4


class _Trial:
    """Whether pairs of values of a run are equal but for rounding.

    Args:
        stream: a value of the dtype that the model computes in.
        pairs: the values, while they are recorded.
    """

    def __init__(self, stream: Any, pairs: Sequence[tuple[Any, Any]]) -> None:
        self._like = stream[:, :1, :1].detach().save()  # a shape would take a run without data
        self._differ = [difference(value.detach(), other.detach()).save() for value, other in pairs]

    @property
    def succeeded(self) -> bool:
        """Whether they are."""
        limit = _COARSE if self._like.value.dtype.itemsize < 4 else _ROUNDING
        return all(bool(one.value < limit) for one in self._differ)


def _say(found: _Found) -> None:
    """Logs through which parts autograd goes, and why."""
    reasons: dict[str, list[str]] = {}
    for part, one in found.items():
        if isinstance(one, Fallback):
            reasons.setdefault(one.why, []).append(part.receivers[0].name.partition(".")[0])
    for why, parts in reasons.items():
        logger.info(
            "Gradients go back through %s by a backward pass for each receiver: %s",
            ", ".join(parts),
            why,
        )
