"""The oracle for whole architectures: a run with plain PyTorch hooks, and nothing of Insitu's."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

Place = tuple[str, str, int]
"""A module's path, "input" or "output", and in which of its calls."""

Change = Callable[[torch.Tensor], torch.Tensor | None]


@dataclass
class Run:
    """What hooks saw.

    Attributes:
        seen: what passed each place, in copies.
        kept: the hidden states themselves at some outputs, which have gradients.
        bare: the paths of modules that returned a tensor and nothing else.
        lengths: how many things were in the tuples that others returned.
        result: what was returned.
    """

    seen: dict[Place, Any] = field(default_factory=dict)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    bare: set[str] = field(default_factory=set)
    lengths: dict[str, int] = field(default_factory=dict)
    result: Any = None


def run(
    module: nn.Module,
    call: Callable[..., Any] | None = None,
    *,
    read: Collection[str] | None = None,
    change: Mapping[str, Change] | None = None,
    graded: Collection[str] = (),
    **inputs: Any,
) -> Run:
    """Runs a module with hooks in it.

    Args:
        module: the module.
        call: what is called, if not the module itself.
        read: the paths of which inputs and outputs are wanted; None for all.
        change: what is done to outputs, or to the first tensor in them, at every call. What it
            returns takes the output's place; None leaves it, written to or not.
        graded: the paths at whose outputs there are to be gradients.
        inputs: keyword arguments.
    """
    found, calls, change = Run(), Counter[str](), change or {}

    def before(path: str, part: nn.Module, args: Any, kwargs: Any) -> None:
        if args or kwargs:
            names = [name for name in inspect.signature(part.forward).parameters if name in kwargs]
            first = args[0] if args else kwargs[names[0] if names else next(iter(kwargs))]
            found.seen[path, "input", calls[path]] = copied(first)

    def after(path: str, part: nn.Module, args: Any, output: Any) -> Any:
        number, new = calls[path], None
        calls[path] += 1
        if path in change:
            new = change[path](first(output))
            output = output if new is None else with_first(output, new)
        if path in graded:
            found.kept[path] = first(output)
        if read is None or path in read:
            found.seen[path, "output", number] = copied(output)
            if isinstance(output, torch.Tensor):
                found.bare.add(path)
            elif isinstance(output, tuple):
                found.lengths[path] = len(output)
        return None if new is None else output

    with ExitStack() as stack:
        for path, part in module.named_modules(remove_duplicate=False):
            if read is None or path in read:
                hook = part.register_forward_pre_hook(partial(before, path), with_kwargs=True)
                stack.callback(hook.remove)
            if read is None or path in read or path in change or path in graded:
                # First, because newer versions of Transformers have hooks of their own that note
                # hidden states: they are to note what is there in the end.
                hook = part.register_forward_hook(partial(after, path), prepend=True)
                stack.callback(hook.remove)
        with torch.set_grad_enabled(bool(graded)):
            found.result = (call or module)(**inputs)
    return found


def first(output: Any) -> torch.Tensor:
    """The first tensor of what a module returned."""
    return output if isinstance(output, torch.Tensor) else output[0]


def with_first(output: Any, new: torch.Tensor) -> Any:
    """What a module returned, with another first tensor."""
    return new if isinstance(output, torch.Tensor) else (new, *output[1:])


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)


def copied(value: Any) -> list[torch.Tensor]:
    """Copies of these, as they are now."""
    return [tensor.detach().clone() for tensor in tensors(value)]
