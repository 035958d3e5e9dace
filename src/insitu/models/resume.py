"""Forwards that begin at a block: what one of them has computed, others go on from.

The first leaves hidden states at blocks, and keys and values. In another the blocks before are
not run: rows enter its batch behind the block up to which they are like the first. Whether a model
can be run so is found in `resume_trial.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from insitu.engine.interpose import Own, Taps, tapped
from insitu.engine.places import View, first_argument
from insitu.graph.node import NO_KWARGS, Place


class Blocks(NamedTuple):
    """The blocks of a model, as forwards that begin at one need them.

    Attributes:
        paths: their paths, in the order in which they run.
        modules: they themselves.
        views: how their outputs are shown.
        around: the modules that they are inside of.
    """

    paths: Sequence[str]
    modules: Sequence[nn.Module]
    views: Sequence[View]
    around: Sequence[nn.Module]

    def hidden(self, layer: int, output: Any) -> torch.Tensor:
        """Returns the hidden states `(rows, position, d_model)` in what a block returned."""
        return self.views[layer](output, (), NO_KWARGS)[0]

    def returning(self, layer: int, output: Any, hidden: torch.Tensor) -> Any:
        """Returns what a block returned, with other hidden states."""
        return self.views[layer].restore(output, (hidden,), (), NO_KWARGS)


def blocks_of(modules: Mapping[str, nn.Module], views: Mapping[str, View]) -> Blocks:
    """Returns the blocks of a model.

    Args:
        modules: its tree, by path.
        views: how the outputs of its blocks are shown, by path, in the order in which they run.
    """
    names = next(iter(views), "").split(".")
    around = [modules[".".join(names[:count])] for count in range(len(names))]
    return Blocks(tuple(views), [modules[path] for path in views], list(views.values()), around)


class Prefix:
    """What a forward leaves for others.

    Args:
        blocks: the model's blocks.
        levels: after how many blocks hidden states are wanted.
        cached: whether keys and values are wanted, of all blocks.

    Attributes:
        hidden: the hidden states `(rows, position, d_model)`, by level.
        returned: what blocks returned besides, by their number.
        cache: keys and values.
    """

    def __init__(self, blocks: Blocks, levels: Collection[int], cached: bool) -> None:
        self._blocks = blocks
        self._levels = frozenset(levels)
        self.hidden: dict[int, torch.Tensor] = {}
        self.returned: dict[int, Any] = {}
        self.cache: Any = _new_cache() if cached else None

    @property
    def through(self) -> Place:
        """Where the forward must have come before it may end."""
        last = len(self._blocks.paths) if self.cache is not None else max(self._levels)
        return (self._blocks.paths[last - 1], "output", 0)

    @contextmanager
    def left_by(self, kwargs: dict[str, Any], is_own: Own) -> Generator[dict[str, Any], None, None]:
        """Lets the forwards in it leave the wanted values, called with the arguments it gives.

        Args:
            kwargs: the arguments of the forward.
            is_own: whether it is this forward that calls a block.
        """
        with tapped(is_own) as taps:
            for layer, module in enumerate(self._blocks.modules[: max(self._levels)]):
                taps.after(module, partial(self._keep, layer), first=True)
            if self.cache is not None:
                kwargs = {**kwargs, "past_key_values": self.cache}
                _keep_inside(taps, self._blocks, self.cache)
            yield kwargs

    def _keep(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if layer + 1 in self._levels:
            self.hidden[layer + 1] = self._blocks.hidden(layer, output).clone()
        self.returned[layer] = None if isinstance(output, torch.Tensor) else (None, *output[1:])


class Entering(NamedTuple):
    """Rows that enter a batch behind a block.

    Attributes:
        level: how many blocks they leave out.
        prefix: the forward that has run these.
        origin: the rows of that forward that they are like.
    """

    level: int
    prefix: Prefix
    origin: slice

    @property
    def rows(self) -> int:
        """How many there are."""
        return self.origin.stop - self.origin.start

    def before(self, start: int) -> torch.Tensor:
        """Returns what enters at the positions before some one, `(rows, position, d_model)`."""
        return self.prefix.hidden[self.level][self.origin, :start]


class Resumed:
    """A forward that rows enter behind the blocks that they leave out.

    Args:
        blocks: the model's blocks.
        entering: the rows, those first that leave out least.
        start: how many positions all of them leave out.
        length: how many positions they have, with these. The prefix may have been padded.

    Attributes:
        rows: how many rows the batch has now.
    """

    def __init__(
        self, blocks: Blocks, entering: Sequence[Entering], start: int, length: int
    ) -> None:
        self._blocks = blocks
        self._entering = entering
        self.start = start
        self.length = length
        self._first = entering[0].level
        self.rows = 0
        self._cache: Any = None

    @contextmanager
    def entered(self, kwargs: dict[str, Any], is_own: Own) -> Generator[dict[str, Any], None, None]:
        """Lets the forward in it run so, called with the arguments that it gives.

        Args:
            kwargs: the arguments of a forward of one row, of the positions that are not left out.
            is_own: whether it is this forward that calls a block.
        """
        blocks, last = self._blocks, max(row.level for row in self._entering)
        self.rows = 0
        with tapped(is_own) as taps:
            for layer in range(self._first):
                module = blocks.modules[layer]
                taps.forward(module, partial(self._leave_out, layer, module))
            for layer in range(self._first, last):
                taps.after(blocks.modules[layer], partial(self._enter, layer), first=True)
            if self.start:
                self._cache = self._begin_cache()
                kwargs = {**kwargs, "past_key_values": self._cache}
                _keep_inside(taps, blocks, self._cache)
                for layer in range(self._first, len(blocks.modules)):
                    module = blocks.modules[layer]
                    taps.before(module, partial(self._fill, layer))
                    taps.after(module, partial(self._empty, layer))
            try:
                yield kwargs
            finally:
                self._cache = None

    def batch(self) -> int:
        """Returns how many rows the batch has now."""
        return self.rows

    def _arriving(self, level: int) -> torch.Tensor:
        """The hidden states of the rows that enter at a level."""
        found = [
            row.prefix.hidden[level][row.origin, self.start : self.length]
            for row in self._entering
            if row.level == level
        ]
        self.rows += sum(part.shape[0] for part in found)
        return torch.cat(found)

    def _leave_out(
        self, layer: int, module: nn.Module, _: object, *args: Any, **kwargs: Any
    ) -> Any:
        """Stands for the forward of a block that is not run."""
        if layer + 1 == self._first:
            hidden = self._arriving(self._first)
        else:
            hidden = first_argument(module, args, kwargs)
        returned = self._entering[0].prefix.returned[layer]
        return self._blocks.returning(layer, hidden if returned is None else returned, hidden)

    def _enter(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if all(row.level != layer + 1 for row in self._entering):
            return None
        hidden = self._blocks.hidden(layer, output)
        hidden = torch.cat([hidden, self._arriving(layer + 1)])
        return self._blocks.returning(layer, output, hidden)

    def _begin_cache(self) -> Any:
        """A cache that says how many positions there were before."""
        source, cache = self._entering[0].prefix.cache, _new_cache()
        for layer, held in enumerate(source.layers):
            cache.update(held.keys[:1, :, : self.start], held.values[:1, :, : self.start], layer)
        return cache

    def _fill(self, layer: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Gives a block the keys and values of the positions before, for each of its rows."""
        mine = [row for row in self._entering if row.level <= layer]
        held = [(row.prefix.cache.layers[layer], row.origin) for row in mine]
        own = self._cache.layers[layer]
        own.keys = torch.cat([past.keys[rows, :, : self.start] for past, rows in held])
        own.values = torch.cat([past.values[rows, :, : self.start] for past, rows in held])

    def _empty(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        own = self._cache.layers[layer]
        own.keys, own.values = own.keys[:1].clone(), own.values[:1].clone()


def _new_cache() -> Any:
    """An empty cache of keys and values."""
    from transformers.cache_utils import DynamicCache  # takes as long to import as all of ours

    return DynamicCache()


def _keep_inside(taps: Taps, blocks: Blocks, cache: Any) -> None:
    """Lets a model that is given a cache return what it returns without one."""

    def without(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not isinstance(output, Mapping) or output.get("past_key_values") is not cache:
            return None
        kind: Any = type(output)
        return kind({name: value for name, value in output.items() if value is not cache})

    for module in blocks.around:
        taps.after(module, without, first=True)
