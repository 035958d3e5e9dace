"""A small run of a model in which all values that have standard names are read."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from insitu.engine.dataflow import Dataflow, watch
from insitu.engine.probe import Call
from insitu.models.attention import attending
from insitu.models.blocks import CACHES
from insitu.models.checking.inventory import entries_of
from insitu.models.checking.reading import read
from insitu.tracing.named import Named
from insitu.tracing.vocabulary import Entry, Role

if TYPE_CHECKING:
    from insitu.models.model import Model


@dataclass(frozen=True, slots=True)
class Run:
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
    values: Mapping[tuple[str, str], torch.Tensor]
    failures: Mapping[tuple[str, str], str]
    flow: Dataflow


def run_of(model: Model, call: Call, stacks: Mapping[str, int]) -> Run:
    """Runs a model and reads what has a name.

    Args:
        model: the model, with its weights.
        call: its arguments.
        stacks: the lists of its blocks, by path, and how long they are.
    """
    blocks = [[f"{path}.{layer}" for layer in range(count)] for path, count in stacks.items()]
    paths = ["", *(path for stack in blocks for path in stack)]
    entries = {path: dict(entries_of(model, path)) for path in paths}
    readings: dict[tuple[str, str], Any] = {}
    for path, found in entries.items():
        for name, entry in found.items():
            if isinstance(entry, Named):
                readings[path, name] = partial(named, model, path, name)
                if name.endswith("result"):
                    site = partial(_site, model, entry.path, "output", entry.call)
                    readings[path, f"{name}'s layer"] = site
    head = entries[""].get("unembedding")
    if isinstance(head, Role):
        readings["", "unembedding.input"] = partial(_site, model, head.path, "input", 0)
        readings["", "unembedding.output"] = partial(_site, model, head.path, "output", 0)
    if blocks:
        readings["", "last"] = lambda: at(model, blocks[-1][-1]).output[0]
    values, failures = read(model, call, readings)
    return Run(model, call, blocks, entries, values, failures, _watched(model, call))


def _watched(model: Model, call: Call) -> Dataflow:
    """The dataflow from which the parts are known: with eager attention and fake if it can be."""
    with model.in_use():
        for implementation, fake in (("eager", True), ("eager", False), (None, True)):
            with contextlib.suppress(Exception), attending(model.module, implementation):
                return watch(model.module, model.modules, call, fake, caches=CACHES)
        return watch(model.module, model.modules, call, fake=False, caches=CACHES)


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


def named(model: Model, path: str, name: str) -> Any:
    """Returns what a name stands for, in a block of code a proxy.

    Args:
        model: the model.
        path: the path of a transformer block, "" for the model.
        name: a name on it, such as "attention.q".
    """
    value = at(model, path)
    for part in name.split("."):
        value = value.role[part]
    return value


def _site(model: Model, path: str, kind: str, call: int) -> Any:
    handle = at(model, path)
    return getattr(handle.call(call) if call else handle, kind)


def applied(run: Run, path: str, value: torch.Tensor) -> torch.Tensor:
    """Returns what a module makes of a value, with plain torch.

    Args:
        run: the run of the model whose module it is.
        path: the module's path.
        value: its only argument.
    """
    with torch.no_grad(), run.model.in_use():
        return run.model.modules[path](value)
