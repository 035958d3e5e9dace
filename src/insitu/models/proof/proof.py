"""Proves the names of a model: which of them hold, by value, in blocks of each kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from insitu.engine.keeping import evaluating
from insitu.engine.probe import Call
from insitu.graph.node import Place
from insitu.models.blocks import find_stacks
from insitu.models.parts import Heads
from insitu.models.proof.attention import reasons_of_heads
from insitu.models.proof.evidence import Evidence, Reasons
from insitu.models.proof.feedforward import reasons_of_mlp
from insitu.models.proof.outcome import Proof
from insitu.models.proof.runs import Runs
from insitu.models.proof.stream import ADDED, STREAM, reasons_of_returned, reasons_of_stream
from insitu.models.proof.whole import reasons_of_ends, stacks_of_model
from insitu.tracing.named import Named
from insitu.tracing.vocabulary import Entry, Given, Missing, Role

if TYPE_CHECKING:
    from insitu.models.architectures import Description
    from insitu.models.body import Body
    from insitu.models.vocabulary import Names
    from insitu.models.wrapped_module import WrappedModule

ROLES = ("attention", "cross_attention")
_MOVED = 0.05  # some kinds of attention leave out a cap on scores, which a few tokens hardly show


def prove(model: WrappedModule, description: Description) -> Proof:
    """Proves the names of a model in runs of its own.

    Args:
        model: the model, with its weights.
        description: the description of its blocks.

    Raises:
        Exception: any that the model raises if it cannot be run.
    """
    from insitu.models.body import Body
    from insitu.models.checking.inventory import entries_of
    from insitu.models.vocabulary import Names

    stacks = find_stacks(model.module, model.module.config)
    body = Body(model, stacks, description)
    names = Names(body)
    call = sample_with_content(body)
    kinds = body.kinds({})
    showing = body.softmax.options
    shown = body.kinds(showing) if showing else {}
    chosen: dict[Any, str] = {}
    for stack in body.stacks:
        for path in stack:
            if path in kinds:
                chosen.setdefault((kinds[path], shown.get(path)), path)
    with body.quiet():
        entries: dict[str, dict[str, Entry]] = {}
        for path in ("", *chosen.values()):
            entries[path] = dict(entries_of(model, path, names))
            entries[path].update(weights_of_block(names, path))
    with model.in_use(), evaluating(model.module.modules()):
        runs = Runs(model, call, showing)
        reads, places = wanted(body, entries)
        hooked = set(chosen.values())
        base = runs.run([*reads, *places], hooked=hooked)
        blocks: list[Place] = [(path, "output", 0) for path in chosen.values()]
        unfused = [one for one in reads if not one.options]
        plain = base
        if showing:
            plain = runs.run([*unfused, *blocks], options={}, hooked=hooked)
        rows = next(v.shape[0] for v in call.kwargs.values() if isinstance(v, torch.Tensor))
        evidence = Evidence(runs, names, body, entries, base, plain, rows)
        found: dict[str, Reasons] = {}
        for (kind, eager), path in chosen.items():
            reasons = reasons_of_block(evidence, path)
            for key in (kind, eager):
                if key is not None:
                    found[key] = {**found.get(key, {}), **reasons}
        numbers, refused = stacks_of_model(evidence)
        return Proof(found, {**refused, **reasons_of_ends(evidence)}, numbers, dict(showing))


def reasons_of_block(evidence: Evidence, path: str) -> Reasons:
    """Returns which names on a block are refused, and why.

    Args:
        evidence: what was read of the model.
        path: the block's path.
    """
    block = evidence.block(path)
    found = moved(evidence, path)
    if evidence.positions(path) is None:
        why = "what the block returns is not (batch, position, d_model)."
        return dict.fromkeys([*evidence.entries[path], *ROLES, "mlp", "experts"], why)
    found.update(_tried(partial(reasons_of_returned, evidence, path), ["block_out"]))
    found.update(_tried(partial(reasons_of_stream, evidence, path), [*STREAM, *ADDED]))
    for role in ROLES:
        if getattr(block, role) is not None:
            found.update(_tried(partial(reasons_of_heads, evidence, path, role), [role]))
    if block.mlp is not None:
        found.update(_tried(partial(reasons_of_mlp, evidence, path), ["mlp", "experts"]))
    return found


def _tried(reasons: Callable[[], Reasons], names: Sequence[str]) -> Reasons:
    """Reasons, and where they cannot be found out, one for all names that they are about."""
    try:
        return reasons()
    except Exception as error:  # values of forms that nobody has thought of
        said = next(iter(str(error).splitlines()), "")
        why = f"it could not be proven ({type(error).__name__}: {said})."
        return dict.fromkeys(names, why)


def moved(evidence: Evidence, path: str) -> Reasons:
    """Names that stand for something else where softmaxes can be seen: there both must be one."""
    found: Reasons = {}
    if evidence.plain is evidence.base:
        return found
    for key, entry in evidence.entries[path].items():
        if not isinstance(entry, Named) or entry.options:
            continue
        one, other = evidence.plain.raw(entry), evidence.base.raw(entry)
        if one is None and other is None:
            continue
        same = one is not None and other is not None and one.shape == other.shape
        if same and one is not None and other is not None and one.numel():
            if key.endswith("scores"):  # masked with other large numbers
                one, other = one.clamp_min(-1e4), other.clamp_min(-1e4)
            apart = (one.double() - other.double()).norm()
            same = bool(apart <= _MOVED * one.double().norm().clamp_min(1e-6))
        if not same:
            found[key] = "with eager attention something else stands in its place."
    return found


def wanted(body: Body, entries: Mapping[str, Mapping[str, Any]]) -> tuple[list[Named], list[Place]]:
    """The values that are read to begin with: all that have names, and those around them."""
    reads = [one for found in entries.values() for one in found.values() if isinstance(one, Named)]
    places: list[Place] = [("", "output", 0)]

    def both(path: str | None, call: int = 0) -> None:
        if path is not None:
            places.extend(((path, "input", call), (path, "output", call)))

    for entry in entries[""].values():
        if isinstance(entry, Role):
            both(entry.path)
    for stack in body.stacks:
        for path in stack:
            both(path)
            places.append((path, "output", 1))
    for path in entries:
        block = body.blocks().get(path)
        for heads in (block.attention, block.cross_attention) if block else ():
            if heads is None:
                continue
            places.extend((spot.path, spot.kind, spot.call) for spot in heads.raw.values())
            for layer in heads.projections.values():
                both(layer)
            both(heads.out, heads.z.call if heads.z else 0)
        for summed in block.summed if block else ():
            both(summed.norm, summed.call)
        mlp = block.mlp if block else None
        if mlp is not None:
            both(mlp.path)
            both(mlp.into)
            both(mlp.out, mlp.post.call if mlp.post else 0)
    return reads, places


def weights_of_block(names: Names, path: str) -> Iterator[tuple[str, Entry]]:
    """The weights that have names on a block, by these."""
    block, weights = names.body.blocks().get(path), names.weights
    if block is None:
        return
    finding: dict[str, Callable[[], Any]] = {}
    for role in ROLES:
        heads: Heads | None = getattr(block, role)
        if heads is None:
            continue
        for name in ("W_Q", "W_K", "W_V", "W_O"):
            finding[f"{role}.{name}"] = partial(weights.of_heads, block, heads, name)
    mlp = block.mlp
    if mlp is not None:
        for name in ("W_in", "W_out", "W_gate"):
            finding[f"mlp.{name}"] = partial(weights.of_mlp, block, mlp, name)
    for key, find in finding.items():
        try:
            found = find()
        except Exception as error:  # weights of forms that nobody has thought of
            yield key, Missing(f"it cannot be found out ({type(error).__name__}: {error}).")
            continue
        yield key, found if isinstance(found, Missing) else Given(found)


def sample_with_content(body: Body) -> Call:
    """Returns a small call in which no two values are the same."""
    call = body.placed_sample()
    if call is None:
        raise ValueError("it is not known what the model is called with")
    draw = torch.Generator().manual_seed(0)
    kwargs: dict[str, Any] = {}
    for name, value in call.kwargs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value = torch.randn(value.shape, generator=draw).to(value)
        kwargs[name] = value
    return Call((), kwargs)
