"""What a run on fake tensors can know of contents: all that follows from given integers alone.

Some models ask what their input says before they go on: whether there is padding, where images
are. That depends on token ids and masks and not on weights, so beside the fake tensors it is
computed for real. It is needed only where a run without contents fails.
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from insitu.graph.structure import storage_of

_MOST = 1 << 20  # of how many numbers contents are kept


def has_contents(value: Any) -> bool:
    """Returns whether something is a tensor whose contents are kept: of integers, and small.

    Args:
        value: anything.
    """
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor) or value.is_meta:
        return False
    return not (value.is_floating_point() or value.is_complex()) and value.numel() <= _MOST


class Contents(TorchDispatchMode):
    """Computes contents beside fake tensors; to be entered inside of the fake mode."""

    def __init__(self) -> None:
        super().__init__()
        self._known: Any = WeakIdKeyDictionary()
        self._lost: set[int] = set()  # storages that were written with what is not known

    def give(self, fake: torch.Tensor, content: torch.Tensor) -> None:
        """Notes the content of a fake tensor.

        Args:
            fake: the fake tensor.
            content: a tensor of the same shape, which is not changed.
        """
        self._known[fake] = _copied(content)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Computes an operation on fake tensors, and on contents if they are known."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], self._positions(args[1]), *args[2:])
        own = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        contents = {id(leaf): self._content(leaf) for leaf in own}
        known = all(content is not None for content in contents.values())
        if not known or torch.Tag.nondeterministic_seeded in func.tags or _is_empty(func):
            for written in _written(func, args, kwargs):
                content = self._content(written)
                if content is not None:
                    self._lost.add(storage_of(content))
            return func(*args, **kwargs)

        def content_of(leaf: Any) -> Any:
            return contents[id(leaf)] if isinstance(leaf, torch.Tensor) else leaf

        def compute() -> Any:
            with _disable_current_modes(), torch.no_grad():
                return func(*tree_map(content_of, args), **tree_map(content_of, dict(kwargs)))

        return self._both(lambda: func(*args, **kwargs), compute)

    def _positions(self, indices: Sequence[Any]) -> list[Any]:
        """Indices, with positions in the place of masks whose contents are known."""
        found: list[Any] = []
        for index in indices:
            content = None
            if isinstance(index, torch.Tensor) and index.dtype is torch.bool:
                content = self._content(index)
            if content is None:
                found.append(index)
                continue
            with _disable_current_modes():
                positions = content.nonzero().unbind(1)
            for content in positions:
                found.append(_fake(content))
                self._known[found[-1]] = content
        return found

    def _both(self, on_fakes: Callable[[], Any], on_contents: Callable[[], Any]) -> Any:
        """The result on fake tensors, with its content noted."""
        try:
            found = on_fakes()
        except Exception:  # it depends on contents: how large it is, or what it is
            content = on_contents()
            found = tree_map(_fake, content)
        else:
            content = on_contents()
        for fake, real in zip(tree_leaves(found), tree_leaves(content), strict=True):
            if isinstance(fake, FakeTensor) and isinstance(real, torch.Tensor):
                if real.numel() <= _MOST:
                    self._known[fake] = real
                elif fake in self._known:
                    del self._known[fake]
        return found

    def _content(self, leaf: torch.Tensor) -> torch.Tensor | None:
        """The content of a tensor, if it is known."""
        if not isinstance(leaf, FakeTensor) and leaf not in self._known:
            if leaf.is_meta or leaf.numel() > _MOST:
                return None
            self._known[leaf] = _copied(leaf)  # it is never written to itself
        found = self._known.get(leaf)
        if found is None or storage_of(found) in self._lost:
            return None
        return found


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A real copy of a real tensor, in any mode."""
    with _disable_current_modes():
        return tensor.detach().to("cpu", copy=True)


def _is_empty(func: Any) -> bool:
    """Whether an operation makes memory with nothing in it: fake weights are made so."""
    return "empty" in func.overloadpacket.__name__


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors into which an operation writes."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            for leaf in tree_leaves(value):
                if isinstance(leaf, torch.Tensor):
                    yield leaf


def _fake(leaf: Any) -> Any:
    """A fake tensor like a real one, in the fake mode that is active."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device)
