"""Which parts of a model have an entry: found by standard names, and tried against autograd.

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
from insitu.methods.entries import Entry
from insitu.methods.wiring import Part, Wiring
from insitu.models.head_projections import HeadProjection, head_projection
from insitu.models.language_model import LanguageModel
from insitu.models.parts import Block
from insitu.models.vocabulary import Names

_POSITIONS = 8  # of the prompt: what an entry does, it does at each position
_ROUNDING = 1e-3  # between what is equal but for rounding, as a share; what is wrong is far from it
_COARSE = 0.05  # in 16 bits

_Found = Mapping[Part, Entry | Fallback]
_Known = Mapping[Part, Entry]


def entries_of(model: LanguageModel, wiring: Wiring, ids: torch.Tensor) -> list[Entry | None]:
    """Returns the entry of each part of a model, None of those that have none.

    Why a part has none is logged.

    Args:
        model: the model.
        wiring: its parts.
        ids: a prompt to try entries on, `(position,)`.
    """
    parts = [part for part in wiring.parts if part.senders]
    found = dict(_each(partial(_named, model), dict.fromkeys(parts, Entry())))
    for step in (_with_norms, _verified):
        known = {part: entry for part, entry in found.items() if isinstance(entry, Entry)}
        if known:
            found |= _each(partial(step, model, ids[:_POSITIONS]), known)
    _say(found)
    entries = (found.get(part) for part in wiring.parts)
    return [entry if isinstance(entry, Entry) else None for entry in entries]


def _each(step: Callable[[_Known], _Found], known: _Known) -> _Found:
    """What a step finds of some parts; if it fails for one of them, of each by itself."""
    found = tried(partial(step, known), "a trial of it")
    if not isinstance(found, Fallback):
        return found
    if len(known) == 1:
        return dict.fromkeys(known, found)
    return {part: _each(step, {part: entry})[part] for part, entry in known.items()}


def _named(model: LanguageModel, known: _Known) -> _Found:
    """The layers and modules that parts have by standard names."""
    return {part: _named_of(model, part) for part in known}


def _named_of(model: LanguageModel, part: Part) -> Entry | Fallback:
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
        return Entry(heads=known, out=out if isinstance(out, torch.Tensor) else None)
    if block.mlp is not None and part.gives is not None and part.gives.name == "mlp_out":
        if block.mlp.path is not None:
            return Entry(module=block.mlp.path)
        return Fallback("its layers are in no module of their own")
    return Fallback("what it first makes of the stream has no name")


def _block(model: LanguageModel, part: Part) -> Block | None:
    names = model.vocabulary
    if not isinstance(names, Names):
        return None
    return names.body.blocks().get(model.blocks[part.layer].path)


def _with_norms(model: LanguageModel, ids: torch.Tensor, known: _Known) -> _Found:
    """Entries with the norms that make what their modules read, out of those of their blocks."""
    trials: dict[Part, list[tuple[Entry, _Trial]]] = {}
    with model.trace(ids):
        for part, entry in known.items():
            stream, given = part.reads.read(model, part.layer), entry.given(model)
            block = _block(model, part)
            trials[part] = []
            for norm in (None, *(block.norms if block is not None else ())):
                one = replace(entry, norm=norm)
                made = one.normed(stream)
                trials[part].append((one, _Trial(stream, [(made, value) for value in given])))
    reason = Fallback("what its modules read is made of the stream by no norm of its block")
    return {
        part: next((entry for entry, trial in tries if trial.succeeded), reason)
        for part, tries in trials.items()
    }


def _verified(model: LanguageModel, ids: torch.Tensor, known: _Known) -> _Found:
    """Entries through which gradients come back to the stream as they do by autograd."""
    trials: dict[Part, _Trial] = {}
    with model.trace(ids.expand(2, -1)):
        for part, entry in known.items():
            stream = part.reads.read(model, part.layer)
            trials[part] = _Trial(stream, _compared(model, part, entry, stream))
    reason = Fallback("gradients through its layers by name are not those of autograd")
    return {part: known[part] if trial.succeeded else reason for part, trial in trials.items()}


def _compared(model: LanguageModel, part: Part, entry: Entry, stream: Any) -> list[tuple[Any, Any]]:
    """Gradients through an entry and those of autograd, in an open invocation of two equal rows.

    What comes back to the stream is compared for all receivers together, in the first row. In the
    second row what starts at each head has a factor of its own. If the gradient of a head is made
    of that of another one too, it comes back with another factor.
    """
    made = entry.made(model)
    sites = dict.fromkeys(r.site for r in part.receivers if r.site is not None)
    total: Any = 0
    for number, site in enumerate(sites):
        value = site.read(model, part.layer)
        start = (value.detach()[0].float() * 97).cos()  # no zeros, also where values are
        factors = _factors(start, number) if entry.heads else 1
        both = torch.stack([start, start * factors])
        total = total + (value * both.type_as(value)).sum()
    expected, *slopes = total.backward(retain_graph=True, inputs=[stream, *made])
    first, second = ([slope[row : row + 1] for slope in slopes] for row in range(2))
    pairs = [(entry.back(stream[:1], first).sum(0), expected[0])]
    if entry.heads:
        rows = zip(entry.by_heads(first), entry.by_heads(second), strict=True)
        pairs += [(own * _factors(own, at), scaled) for at, (own, scaled) in enumerate(rows)]
    if entry.out is not None:
        pairs.append((entry.sent(entry.sending(model, part)), part.added(model)[0]))
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
        self._differ = [_differ(value.detach(), other.detach()).save() for value, other in pairs]

    @property
    def succeeded(self) -> bool:
        """Whether they are."""
        limit = _COARSE if self._like.value.dtype.itemsize < 4 else _ROUNDING
        return all(bool(one.value < limit) for one in self._differ)


def _differ(value: Any, other: Any) -> Any:
    """By how much two values differ, as a share."""
    size = other.float().norm().clamp(min=1e-12)
    return (value.float() - other.float()).norm() / size


def _say(found: _Found) -> None:
    """Logs which parts have no entry, and why."""
    reasons: dict[str, list[str]] = {}
    for part, entry in found.items():
        if isinstance(entry, Fallback):
            reasons.setdefault(entry.why, []).append(part.receivers[0].name.partition(".")[0])
    for why, parts in reasons.items():
        logger.info(
            "Gradients go back through %s by a backward pass for each receiver: %s",
            ", ".join(parts),
            why,
        )
