"""What has to hold in every block: sums of the residual stream, and attention head by head."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from insitu.display.report import Check
from insitu.graph.node import readable
from insitu.models.anatomy.between import between
from insitu.models.checking.outcomes import listed, not_checked, said, unread, why_not
from insitu.models.checking.reading import read
from insitu.models.checking.run import Run, applied, named
from insitu.models.proof import identities
from insitu.models.proof.identities import Tensor
from insitu.models.vocabulary import Names
from insitu.tracing.forms import WithoutLast
from insitu.tracing.named import Named
from insitu.tracing.vocabulary import Role

PROVEN = "names are proven"
READ = "every value can be read"
SUMS = "residuals add up"
MIDDLE = "residual_mid and the MLP add up"
PATTERNS = "patterns sum to one"
WEIGHTED = "pattern @ v is z"
HEADS = "heads reassemble"

_ADDED = ("attention_out", "cross_attention_out", "mixer_out", "mlp_out", "extra_out")
_ATTENTIONS = ("attention", "cross_attention")


def checks_of_blocks(run: Run) -> Iterator[Check]:
    """Yields what holds in each block, and whether all that has a name could be read.

    Args:
        run: the run.
    """
    for path in ("", *(path for stack in run.blocks for path in stack)):
        found = _all_read(run, path)
        if found is not None:
            yield found
    for path in (path for stack in run.blocks for path in stack):
        proven = _proven(run, path)
        if proven is not None:
            yield proven
    for path in (path for stack in run.blocks for path in stack):
        yield _sum_of(run, path)
        if isinstance(run.entries[path].get("residual_mid"), Named):
            yield _middle_of(run, path)
        for attention in _ATTENTIONS:
            if isinstance(run.entries[path].get(attention), Role):
                yield _pattern_of(run, path, attention)
                yield _weighted_of(run, path, attention)
                yield _heads_of(run, path, attention)


def _proven(run: Run, path: str) -> Check | None:
    """Whether all that was found of a block was proven: see `models/proof/`."""
    vocabulary = run.model.vocabulary
    block = vocabulary.body.blocks().get(path) if isinstance(vocabulary, Names) else None
    if block is None:
        return None
    reasons: dict[str, list[str]] = {}
    for name, why in block.refused.items():
        reasons.setdefault(why, []).append(f"`{name}`")
    note = " ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())
    return Check(PROVEN, readable(path), "refused" if note else "ok", note=note)


def _sum_of(run: Run, path: str) -> Check:
    entries = run.entries[path]
    for name in ("residual_in", "residual_out"):
        entry = entries.get(name)
        if not isinstance(entry, Named):
            never = entry is None
            why = "it does not run in a forward of a few tokens." if never else why_not(entry)
            return not_checked(SUMS, path, why)
    added = [name for name in _ADDED if isinstance(entries.get(name), Named)]
    if not added:
        return not_checked(SUMS, path, "what it adds to the residual stream has no names.")
    missing = unread(run, SUMS, path, "residual_in", *added, "residual_out")
    if missing:
        return missing
    terms = [run.values[path, name] for name in ("residual_in", *added)]
    found = identities.summed(terms, run.values[path, "residual_out"])
    if not found.is_rounding and _is_scaled(run, path):
        found = identities.combined(terms, run.values[path, "residual_out"])
        if found.is_rounding:
            return said(SUMS, path, found, "with factors")
    if not found.is_rounding and not found.note:
        found = found._replace(note=f"residual_in + {' + '.join(added)} is not residual_out")
    return said(SUMS, path, found)


def _middle_of(run: Run, path: str) -> Check:
    more = isinstance(run.entries[path].get("extra_out"), Named)
    names = ("residual_mid", "mlp_out", *(("extra_out",) if more else ()), "residual_out")
    missing = unread(run, MIDDLE, path, *names)
    if missing:
        return missing
    *terms, total = (run.values[path, name] for name in names)
    found = identities.summed(terms, total)
    if found.is_rounding or not _is_scaled(run, path):
        return said(MIDDLE, path, found)
    found = identities.combined(terms, total)
    return said(MIDDLE, path, found, "with factors" if found.is_rounding else "")


def _is_scaled(run: Run, path: str) -> bool:
    """Whether the residual stream of a block is multiplied with factors on its way."""
    vocabulary = run.model.vocabulary
    block = vocabulary.body.blocks().get(path) if isinstance(vocabulary, Names) else None
    return block is not None and block.scaled


def _all_read(run: Run, path: str) -> Check | None:
    """Whether all that has a name could be read, None if there is nothing."""
    read = [name for owner, name in run.values if owner == path]
    failed = {name: why for (owner, name), why in run.failures.items() if owner == path}
    if failed:
        listed = ", ".join(f"`{name}`" for name in failed)
        why = f"{listed} cannot be read: {next(iter(failed.values()))}"
        return Check(READ, readable(path) or "model", "differs", note=why)
    return Check(READ, readable(path) or "model", "ok") if read else None


def _pattern_of(run: Run, path: str, attention: str) -> Check:
    key = f"{attention}.pattern"
    entry, where = run.entries[path].get(key), _where(run, path, attention)
    if not isinstance(entry, Named):
        return not_checked(PATTERNS, where, why_not(entry))
    missing = unread(run, PATTERNS, path, key)
    if missing:
        return missing
    sinks = isinstance(entry.form, WithoutLast)
    note = "a part goes to sinks" if sinks else ""
    return said(PATTERNS, where, identities.normalised(run.values[path, key], sinks), note)


def _weighted_of(run: Run, path: str, attention: str) -> Check:
    keys = [f"{attention}.{name}" for name in ("pattern", "v", "z")]
    where = _where(run, path, attention)
    for key in keys:
        entry = run.entries[path].get(key)
        if not isinstance(entry, Named):
            return not_checked(WEIGHTED, where, f"there is no `{key}`: {why_not(entry)}")
    missing = unread(run, WEIGHTED, path, *keys)
    if missing:
        return missing
    pattern, v, z = (run.values[path, key] for key in keys)
    found = identities.attended(pattern, v, z)
    if found.is_rounding:
        return said(WEIGHTED, where, found)
    way = _between_pattern_and_z(run, path, attention)
    if not way:
        return said(WEIGHTED, where, found)
    gate = _gate_of(run, path, attention, pattern, v)
    gated = None if gate is None else identities.attended(pattern, v, z, gate)
    if gated is not None and gated.is_rounding:
        return said(WEIGHTED, where, gated, "behind a gate")
    return not_checked(WEIGHTED, where, f"what stands between them: {listed(way)}.")


def _gate_of(run: Run, path: str, attention: str, pattern: Tensor, v: Tensor) -> Tensor | None:
    """What heads are multiplied with, if that depends on no values: what it makes of ones."""
    part = partial(named, run.model, path, attention)

    def ones() -> None:
        part().v = torch.ones_like(v)

    values, _ = read(run.model, run.call, {"z": lambda: part().role["z"]}, ones)
    z = values.get("z")
    return None if z is None else z / pattern.sum(-1, keepdim=True)


def _between_pattern_and_z(run: Run, path: str, attention: str) -> list[str] | None:
    flow, entries = run.flow, run.entries[path]
    pattern, z = entries[f"{attention}.pattern"], entries[f"{attention}.z"]
    assert isinstance(pattern, Named) and isinstance(z, Named)
    owner, _, function = pattern.path.partition(">")
    made = [
        event.outputs[0]
        for event in flow.events
        if (event.path, event.function, event.call) == (owner, function, pattern.call)
    ]
    calls = [at for at in flow.calls(z.path) if flow.events[at].call == z.call]
    if not made or not calls:
        return None
    way = between(flow, made, flow.events[calls[0]].inputs[0])
    # The first product is that with the values.
    return None if way is None else way[1:]


def _heads_of(run: Run, path: str, attention: str) -> Check:
    key, where = f"{attention}.result", _where(run, path, attention)
    entry = run.entries[path].get(key)
    if not isinstance(entry, Named):
        return not_checked(HEADS, where, why_not(entry))
    missing = unread(run, HEADS, path, key, f"{attention}.z", f"{key}'s layer")
    if missing:
        return missing
    result, z = run.values[path, key], run.values[path, f"{attention}.z"]
    nothing = torch.zeros_like(z[:1, :, :1].transpose(1, 2).flatten(2))
    bias = applied(run, entry.path, nothing).flatten()
    output = run.values[path, f"{key}'s layer"]
    return said(HEADS, where, identities.reassembled(result, bias, output))


def _where(run: Run, path: str, attention: str) -> str:
    entry = run.entries[path][attention]
    return entry.path if isinstance(entry, Role) else path
