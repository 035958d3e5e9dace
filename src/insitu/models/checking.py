"""Whether a model's parts are what they seem: found in a forward without data, verified in a run.

What a standard name stands for is found out on tensors without data. Here the values that stand
there are read in a run of the model, and must hang together as the values of such parts do.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from insitu.display.report import Check, Report
from insitu.graph.errors import OptionError, UnknownShapeError
from insitu.graph.location import here
from insitu.graph.node import readable
from insitu.models import identities
from insitu.models.attention import attending
from insitu.models.between import SCALES, between
from insitu.models.blocks import find_stacks
from insitu.models.identities import Difference, Tensor
from insitu.models.inventory import entries_of, parts_of, sizes_of
from insitu.models.reading import read, small_call
from insitu.runtime.dataflow import Dataflow, watch
from insitu.runtime.probe import Call
from insitu.tracing.forms import WithoutLast
from insitu.tracing.named import Entry, Missing, Named, NoVocabulary, Role

if TYPE_CHECKING:
    from insitu.models.model import Model

READ = "every value can be read"
SUMS = "residuals add up"
MIDDLE = "residual_mid and the MLP add up"
PATTERNS = "patterns sum to one"
WEIGHTED = "pattern @ v is z"
HEADS = "heads reassemble"
LOGITS = "the last residual gives the logits"

_ADDED = ("attention_out", "cross_attention_out", "mixer_out", "mlp_out")
_ATTENTIONS = ("attention", "cross_attention")


def check(model: Model, name: str | None = None) -> Report:
    """Looks at what a model consists of, and verifies it in a run of a few tokens.

    Args:
        model: a Transformers model. Its weights are loaded if they are not there yet.
        name: what to call it; its class unless given.

    Returns:
        What each standard name stands for, and what holds of the values that stand there.

    Raises:
        LoadError: if the weights cannot be loaded.
        OptionError: if it is no Transformers model, or in training mode, in which dropout changes
            what is read.
        UnknownShapeError: if it is not known what the model is called with.

    Example:
        >>> from insitu import LanguageModel
        >>> from insitu.models.checking import check
        >>> report = check(LanguageModel("insitu/eiffel"))
        >>> report.ok, report.sizes["n_heads"]
        (True, 8)
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attention scores and patterns")  # eager attention
        return _checked(model, name)


def _checked(model: Model, name: str | None) -> Report:
    module = model.load()
    if isinstance(model.vocabulary, NoVocabulary):
        raise OptionError(
            f"{type(module).__name__} is no Transformers model, so it has no standard names.",
            here(),
        )
    if any(part.training for part in model.modules.values()):
        raise OptionError(
            "The model, or a part of it, is in training mode, where dropout changes values on "
            "their way: call `model.module.eval()` first.",
            here(),
        )
    call = small_call(model)
    if call is None:
        raise UnknownShapeError(
            f"It is not known what a {type(module).__name__} is called with.", here()
        )
    stacks = find_stacks(module, module.config)
    run = _run(model, call, stacks)
    shapes = {key: tuple(value.shape) for key, value in run.values.items()}
    rows = next(len(value) for value in call.kwargs.values() if isinstance(value, torch.Tensor))
    architecture = type(module).__name__
    return Report(
        name=name or architecture,
        architecture=architecture,
        sizes=sizes_of(model),
        rows=rows,
        parts=parts_of(model, stacks, shapes),
        checks=[*_checks_of_blocks(run), *_check_of_logits(run)],
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """A run of a model and what was read in it.

    Attributes:
        model: the model.
        call: what it was called with.
        blocks: the paths of its blocks, stack by stack.
        entries: what the names on each block stand for.
        values: what was read, by the path of a block, or "", and the name on it.
        failures: why other things could not be read.
        flow: the dataflow of such a run.
    """

    model: Model
    call: Call
    blocks: list[list[str]]
    entries: Mapping[str, Mapping[str, Entry]]
    values: Mapping[tuple[str, str], Tensor]
    failures: Mapping[tuple[str, str], str]
    flow: Dataflow


def _run(model: Model, call: Call, stacks: Mapping[str, int]) -> _Run:
    blocks = [[f"{path}.{layer}" for layer in range(count)] for path, count in stacks.items()]
    paths = ["", *(path for stack in blocks for path in stack)]
    entries = {path: dict(entries_of(model, path)) for path in paths}
    readings: dict[tuple[str, str], Any] = {}
    for path, named in entries.items():
        for name, entry in named.items():
            if isinstance(entry, Named):
                readings[path, name] = partial(_named, model, path, name)
                if name.endswith("result"):
                    site = partial(_site, model, entry.path, "output", entry.call)
                    readings[path, f"{name}'s layer"] = site
    head, norm = entries[""].get("unembedding"), entries[""].get("final_norm")
    if isinstance(head, Role):
        readings["", "unembedding.input"] = partial(_site, model, head.path, "input", 0)
        readings["", "unembedding.output"] = partial(_site, model, head.path, "output", 0)
    if blocks:
        readings["", "last"] = lambda: at(model, blocks[-1][-1]).output[0]
    values, failures = read(model, call, readings)
    return _Run(model, call, blocks, entries, values, failures, _watched(model, call))


def _watched(model: Model, call: Call) -> Dataflow:
    """The dataflow from which the parts are known: with eager attention and fake if it can be."""
    with model.in_use():
        for implementation, fake in (("eager", True), ("eager", False), (None, True)):
            with contextlib.suppress(Exception), attending(model.module, implementation):
                return watch(model.module, model.modules, call, fake)
        return watch(model.module, model.modules, call, fake=False)


def at(model: Model, path: str) -> Any:
    """Returns the handle of a module.

    Args:
        model: the model.
        path: the module's path.
    """
    handle: Any = model
    for name in path.split(".") if path else ():
        handle = handle[name]
    return handle


def _named(model: Model, path: str, name: str) -> Any:
    value = at(model, path)
    for part in name.split("."):
        value = value.role[part]
    return value


def _site(model: Model, path: str, kind: str, call: int) -> Any:
    handle = at(model, path)
    return getattr(handle.call(call) if call else handle, kind)


def _said(name: str, where: str, found: Difference, note: str = "") -> Check:
    outcome = "ok" if found.is_rounding else "differs"
    finite = math.isfinite(found.largest)
    largest = found.largest if finite else None
    if not finite and not found.note:
        note = "there are numbers that are none"
    return Check(name, readable(where), outcome, largest, found.allowed, found.note or note)


def _not_checked(name: str, where: str, why: str) -> Check:
    return Check(name, readable(where), "not checked", note=why)


def _unread(run: _Run, name: str, path: str, *names: str) -> Check | None:
    """A check of something that could not be read, if there is such a thing among the names."""
    for key in names:
        if (path, key) in run.failures:
            return _not_checked(name, path or "model", f"`{key}` cannot be read.")
    return None


def _all_read(run: _Run, path: str) -> Check | None:
    """Whether all that has a name could be read, None if there is nothing."""
    read = [name for owner, name in run.values if owner == path]
    failed = {name: why for (owner, name), why in run.failures.items() if owner == path}
    if failed:
        listed = ", ".join(f"`{name}`" for name in failed)
        why = f"{listed} cannot be read: {next(iter(failed.values()))}"
        return Check(READ, readable(path) or "model", "differs", note=why)
    return Check(READ, readable(path) or "model", "ok") if read else None


# Blocks


def _checks_of_blocks(run: _Run) -> Iterator[Check]:
    for path in ("", *(path for stack in run.blocks for path in stack)):
        found = _all_read(run, path)
        if found is not None:
            yield found
    for path in (path for stack in run.blocks for path in stack):
        yield _sum_of(run, path)
        if isinstance(run.entries[path].get("residual_mid"), Named):
            yield _middle_of(run, path)
        for attention in _ATTENTIONS:
            if isinstance(run.entries[path].get(attention), Role):
                yield _pattern_of(run, path, attention)
                yield _weighted_of(run, path, attention)
                yield _heads_of(run, path, attention)


def _sum_of(run: _Run, path: str) -> Check:
    entries = run.entries[path]
    for name in ("residual_in", "residual_out"):
        entry = entries.get(name)
        if not isinstance(entry, Named):
            why = (
                entry.reason
                if isinstance(entry, Missing)
                else "it does not run in a forward of a few tokens."
            )
            return _not_checked(SUMS, path, why)
    added = [name for name in _ADDED if isinstance(entries.get(name), Named)]
    if not added:
        return _not_checked(SUMS, path, "what it adds to the residual stream has no names.")
    unread = _unread(run, SUMS, path, "residual_in", *added, "residual_out")
    if unread:
        return unread
    terms = [run.values[path, name] for name in ("residual_in", *added)]
    found = identities.summed(terms, run.values[path, "residual_out"])
    if not found.is_rounding and not found.note:
        found = found._replace(note=f"residual_in + {' + '.join(added)} is not residual_out")
    return _said(SUMS, path, found)


def _middle_of(run: _Run, path: str) -> Check:
    names = ("residual_mid", "mlp_out", "residual_out")
    unread = _unread(run, MIDDLE, path, *names)
    if unread:
        return unread
    middle, added, total = (run.values[path, name] for name in names)
    return _said(MIDDLE, path, identities.summed([middle, added], total))


# Attention


def _pattern_of(run: _Run, path: str, attention: str) -> Check:
    key = f"{attention}.pattern"
    entry, where = run.entries[path].get(key), _where(run, path, attention)
    if not isinstance(entry, Named):
        return _not_checked(PATTERNS, where, _why(entry))
    unread = _unread(run, PATTERNS, path, key)
    if unread:
        return unread
    sinks = isinstance(entry.form, WithoutLast)
    note = "a part goes to sinks" if sinks else ""
    return _said(PATTERNS, where, identities.normalised(run.values[path, key], sinks), note)


def _weighted_of(run: _Run, path: str, attention: str) -> Check:
    keys = [f"{attention}.{name}" for name in ("pattern", "v", "z")]
    where = _where(run, path, attention)
    for key in keys:
        entry = run.entries[path].get(key)
        if not isinstance(entry, Named):
            return _not_checked(WEIGHTED, where, f"there is no `{key}`: {_why(entry)}")
    unread = _unread(run, WEIGHTED, path, *keys)
    if unread:
        return unread
    pattern, v, z = (run.values[path, key] for key in keys)
    found = identities.attended(pattern, v, z)
    if found.is_rounding:
        return _said(WEIGHTED, where, found)
    way = _between_pattern_and_z(run, path, attention)
    if not way:
        return _said(WEIGHTED, where, found)
    gate = _gate_of(run, path, attention, pattern, v)
    gated = None if gate is None else identities.attended(pattern, v, z, gate)
    if gated is not None and gated.is_rounding:
        return _said(WEIGHTED, where, gated, "behind a gate")
    return _not_checked(WEIGHTED, where, f"what stands between them: {_listed(way)}.")


def _gate_of(run: _Run, path: str, attention: str, pattern: Tensor, v: Tensor) -> Tensor | None:
    """What heads are multiplied with, if that depends on no values: what it makes of ones."""
    part = partial(_named, run.model, path, attention)

    def ones() -> None:
        part().v = torch.ones_like(v)

    values, _ = read(run.model, run.call, {"z": lambda: part().role["z"]}, ones)
    z = values.get("z")
    return None if z is None else z / pattern.sum(-1, keepdim=True)


def _between_pattern_and_z(run: _Run, path: str, attention: str) -> list[str] | None:
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


def _heads_of(run: _Run, path: str, attention: str) -> Check:
    key, where = f"{attention}.result", _where(run, path, attention)
    entry = run.entries[path].get(key)
    if not isinstance(entry, Named):
        return _not_checked(HEADS, where, _why(entry))
    unread = _unread(run, HEADS, path, key, f"{attention}.z", f"{key}'s layer")
    if unread:
        return unread
    result, z = run.values[path, key], run.values[path, f"{attention}.z"]
    nothing = torch.zeros_like(z[:1, :, :1].transpose(1, 2).flatten(2))
    bias = _applied(run, entry.path, nothing).flatten()
    return _said(
        HEADS, where, identities.reassembled(result, bias, run.values[path, f"{key}'s layer"])
    )


def _where(run: _Run, path: str, attention: str) -> str:
    entry = run.entries[path][attention]
    return entry.path if isinstance(entry, Role) else path


def _why(entry: Entry | None) -> str:
    return entry.reason if isinstance(entry, Missing) else "it is not known."


# From the last block to the logits


def _check_of_logits(run: _Run) -> Iterator[Check]:
    entries, where = run.entries[""], ""
    head, norm, logits = (entries.get(key) for key in ("unembedding", "final_norm", "logits"))
    for entry in (head, logits):
        if isinstance(entry, Missing) or not run.blocks:
            why = entry.reason if isinstance(entry, Missing) else "it has no list of blocks."
            yield _not_checked(LOGITS, "model", why)
            return
    assert isinstance(head, Role) and isinstance(logits, Named)
    keys = ("last", "unembedding.input", "unembedding.output", "logits")
    unread = _unread(run, LOGITS, "", *keys)
    if unread:
        yield unread
        return
    last, given, made, shown = (run.values["", key] for key in keys)
    stands = _between_last_block_and_head(run, norm, head)
    if stands:
        yield _not_checked(LOGITS, head.path, f"what stands between them: {_listed(stands)}.")
        return
    normed = _applied(run, norm.path, last) if isinstance(norm, Role) else last
    times = identities.proportion(given, normed) if given.shape == normed.shape else 1.0
    notes = [] if abs(times - 1) < 1e-2 else [f"scaled by {times:.3g} before it is unembedded"]
    expected = _applied(run, head.path, (normed * times if notes else normed).to(given.dtype))
    size = expected.abs().amax(-1, keepdim=True)
    found = identities.compared(made, expected, size, (last, given, made))
    if logits.path != head.path and found.is_rounding and shown.shape == made.shape:
        if not torch.equal(shown.float(), made.float()):
            notes.append("scaled or capped afterwards")
            rises = identities.rising(shown, made)
            found = found if rises.is_rounding else rises
    yield _said(LOGITS, head.path, found, " and ".join(notes))


def _between_last_block_and_head(run: _Run, norm: Entry | None, head: Role) -> list[str]:
    """What changes numbers there, but for the final norm and a scale."""
    flow = run.flow
    last = [flow.events[index].outputs[0] for index in flow.calls(run.blocks[-1][-1])]
    calls = [flow.events[index] for index in flow.calls(head.path)]
    if not last or not calls:
        return ["a way that is not known"]
    way = between(flow, last, calls[-1].inputs[0])
    if way is None:
        return ["a way that is not known"]
    own = norm.path if isinstance(norm, Role) else None
    others = [one for one in way if own is None or not _is_within(one, own)]
    return [one for one in others if one.partition(">")[2] not in SCALES]  # see `proportion`


def _is_within(one: str, path: str) -> bool:
    owner = one.partition(">")[0]
    return owner == path or owner.startswith(f"{path}.")


def _listed(way: Iterable[str]) -> str:
    return ", ".join(f"`{one}`" for one in dict.fromkeys(map(_place, way)))


def _place(one: str) -> str:
    """A function in a forward as one would speak of it: by its module."""
    owner, _, function = one.partition(">")
    return readable(owner) if owner else function


def _applied(run: _Run, path: str, value: Tensor) -> Tensor:
    """What a module makes of a value, without any hooks of ours."""
    with torch.no_grad(), run.model.in_use():
        return run.model.modules[path](value)
