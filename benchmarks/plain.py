"""Experiments with PyTorch's hooks, as one writes them by hand: the few lines they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Change = Callable[[torch.Tensor], "torch.Tensor | None"]


def hidden(output: object) -> torch.Tensor:
    """A block's hidden states, on every version of Transformers."""
    return output[0] if isinstance(output, tuple) else output


def on_output(module: nn.Module, change: Change) -> RemovableHandle:
    """Calls a function on what a module returns; it may change it in place or return another."""

    def hook(module: nn.Module, args: tuple, output: object) -> object:
        changed = change(hidden(output))
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return module.register_forward_hook(hook)


def on_input(module: nn.Module, change: Change) -> RemovableHandle:
    """Calls a function on what a module is given; it may change it in place."""

    def hook(module: nn.Module, args: tuple) -> None:
        change(args[0])

    return module.register_forward_pre_hook(hook)


def logits(module: nn.Module, ids: torch.Tensor, **options: object) -> torch.Tensor:
    """Returns the logits of a forward without gradients and without a cache."""
    with torch.no_grad():
        return module(ids, use_cache=False, **options).logits


def collect(module: nn.Module, modules: Sequence[nn.Module], ids: torch.Tensor, hook: Callable):
    """Returns copies of what `hook`, `on_output` or `on_input`, sees of modules in one forward."""
    kept: list[torch.Tensor] = []
    with ExitStack() as hooks:
        for each in modules:
            hooks.enter_context(hook(each, lambda value: kept.append(value.clone())))
        logits(module, ids)
    return kept
