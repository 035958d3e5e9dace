"""What modules keep: weights, buffers, flags and other attributes, exchanged and put back.

Beside `interpose.py` this is the only file that changes modules.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Set
from contextlib import contextmanager
from functools import partial
from operator import is_not
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses import FakeTensor

from insitu.engine.tree import Tree
from insitu.graph.changes import Changes, changing, restore
from insitu.graph.structure import tensors_of

Tables = list[tuple[dict[Any, Any], dict[Any, Any]]]
"""Tables of modules, each with a copy."""

Containers = list[tuple[Any, Collection[Any]]]
"""Lists, dictionaries, sets and queues of modules, each with a copy."""

_TABLES_OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that each module has: ten thousands in a large model, and nearly all are empty."""


@contextmanager
def undisturbed(tree: Tree) -> Generator[None]:
    """Lets the runs in it leave no trace: not in the model, and not in the random state.

    No graph for autograd is recorded. The user's hooks are set aside by who has the model in use.
    That a run exchanged modules is undone too, and noted: see `Tree.exchanges`.

    Args:
        tree: the model's tree. The caller holds it (see `exclusive`).
    """
    # A forward may write into buffers in place, which the tables do not tell.
    tensors = [(buffer, buffer.clone()) for buffer in tree.root.buffers()]
    devices = {tensor.device for tensor in tree.root.parameters() if tensor.is_cuda}
    tables: list[dict[Any, Any]] = [vars(part) for part in tree.parts]
    with changing() as changes:
        changes.afterwards(partial(_restore_buffers, tensors))
        # Caches and logs that a module keeps in containers of its own would be filled by a trial.
        changes.afterwards(partial(_refill_all, _containers(tree.parts)))
        changes.afterwards(partial(_restore_all, [(table, dict(table)) for table in tables]))
        changes.enter(cast(Any, torch.random).fork_rng(list(devices)))
        changes.gradients(False)
        changes.afterwards(tree.note_exchange)  # undone first: then it can still be seen
        yield


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Generator[None]:
    """Lets modules run without dropout, in either mode.

    Args:
        modules: the modules of a model.
    """
    with changing() as changes:
        for part in modules:
            if part.training:
                # Not by its table: a scripted module keeps it elsewhere.
                changes.afterwards(partial(setattr, part, "training", True))
                part.training = False
        yield


def keep_attributes(changes: Changes, modules: Iterable[nn.Module]) -> None:
    """Notes the attributes and buffers of modules, to be put back.

    Args:
        changes: notes them.
        modules: the modules.
    """
    tables = [table for part in modules for table in (vars(part), part._buffers)]
    changes.afterwards(partial(_update_all, [(table, dict(table)) for table in tables]))


def set_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Sets an attribute or buffer of a module: see `keep_attributes` and `undisturbed`."""
    table = module._buffers if name in module._buffers else vars(module)
    table[name] = value


@contextmanager
def fake_weights(
    module: nn.Module, fake: Callable[[torch.Tensor], torch.Tensor]
) -> Generator[None]:
    """Puts fake parameters and buffers into a module for the time of its block.

    `torch.func.functional_call` leaves some of them there if a module has two names.

    Args:
        module: the module.
        fake: gives the fake tensor for a real one.
    """
    parts = list(module.modules())
    # A forward may keep what it made, such as a lazily filled cache: that must not be fake later.
    before = [(table, dict(table)) for part in parts for table in (vars(part), part._buffers)]
    containers = _containers(parts, _TABLES_OF_TORCH)
    weights: Tables = []
    for part in parts:
        for table in (cast("dict[str, Any]", part._parameters), part._buffers):
            weights.append((table, dict(table)))
    fakes: dict[int, torch.Tensor] = {}  # one for each weight, also of two names
    with changing() as changes:
        changes.afterwards(partial(_without_fakes, before))
        changes.afterwards(partial(_refill_with_fakes, containers))
        # Undone first: then only names are left that a forward has assigned fakes to.
        changes.afterwards(partial(_update_all, weights))
        # Accelerate's wrappers of forwards put the real weights in, from where they are kept.
        for part in parts:
            if "_old_forward" in vars(part):
                changes.put(vars(part), "forward", vars(part)["_old_forward"])
        for table, own in weights:
            for name, tensor in own.items():
                if tensor is not None:
                    # Tied weights stay one tensor, as they are in the model.
                    if id(tensor) not in fakes:
                        fakes[id(tensor)] = fake(tensor)
                    table[name] = fakes[id(tensor)]
        yield


def _containers(parts: Iterable[nn.Module], but: Set[str] = frozenset()) -> Containers:
    """The containers in attributes of modules, but for those of some names, each with a copy."""
    found: Containers = []
    for part in parts:
        for name in vars(part).keys() - but:
            kept = vars(part)[name]
            if isinstance(kept, dict):
                table = cast("dict[Any, Any]", kept)
                found.append((table, dict(table)))
            elif isinstance(kept, list | deque | set):
                container = cast("list[Any]", kept)
                found.append((container, [*container]))
    return found


def _refill_all(containers: Containers) -> None:
    for now, before in containers:
        if isinstance(before, dict):
            restore(now, cast("dict[Any, Any]", before))
        elif _differs(now, before):
            now.clear()
            fill = getattr(now, "update", None) or now.extend  # of a set, or of a list
            fill(before)


def _refill_with_fakes(containers: Containers) -> None:
    """Undoes what put fake tensors into containers. Other entries stay, as other attributes do."""
    changed: Containers = []
    for now, before in containers:
        entries, then = now, before
        if isinstance(before, dict):
            entries, then = now.values(), cast("dict[Any, Any]", before).values()
        # Compared first, in C: nearly all are as they were, and each run without data asks.
        if _differs(entries, then) and any(map(_is_fake, tensors_of([*entries]))):
            changed += [(now, cast("Collection[Any]", before))]
    _refill_all(changed)


def _is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def _differs(now: Collection[Any], before: Collection[Any]) -> bool:
    """Whether a container has other entries than it had."""
    return len(now) != len(before) or any(map(is_not, now, before))


def _restore_buffers(tensors: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for buffer, before in tensors:
        if not torch.equal(buffer, before):
            buffer.copy_(before)


def _restore_all(tables: Tables) -> None:
    for table, before in tables:
        restore(table, before)


def _update_all(tables: Tables) -> None:
    for table, before in tables:
        table.update(before)


def _without_fakes(tables: Tables) -> None:
    """Undoes the assignments of fake tensors to names, and no others."""
    for now, before in tables:
        # Other assignments of a forward are the model's business, as in any forward.
        for name in [name for name, value in now.items() if isinstance(value, FakeTensor)]:
            if name in before:
                now[name] = before[name]
            else:
                now.pop(name, None)
