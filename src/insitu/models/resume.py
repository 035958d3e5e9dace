"""Forwards that begin at a block: what one of them has computed, others go on from.

The first leaves hidden states at blocks, and keys and values. In another the blocks before are
not run: rows enter its batch behind the block up to which they are like the first. Whether a
model can be run so is tried out on it.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from insitu.graph.errors import InsituError
from insitu.graph.node import Site
from insitu.graph.structure import clone, map_structure
from insitu.models.trial import alike, listening, undisturbed
from insitu.models.unembedding import Unembedded, take_logits
from insitu.runtime.branches import Chain
from insitu.runtime.hooks import NO_KWARGS, Place, View, first_argument
from insitu.runtime.layout import (
    Axis,
    Layouts,
    Part,
    TensorLayout,
    cut,
    is_shared,
    leaves,
    put,
    spread,
    widened,
)
from insitu.runtime.passes import Own

_ABSENT = object()


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
    def left_by(self, kwargs: dict[str, Any], is_own: Own) -> Iterator[dict[str, Any]]:
        """Lets the forwards in it leave what is wanted, called with the arguments it gives.

        Args:
            kwargs: the arguments of the forward.
            is_own: whether it is this forward that calls a block.
        """
        handles = [
            module.register_forward_hook(_only(is_own, partial(self._keep, layer)), prepend=True)
            for layer, module in enumerate(self._blocks.modules[: max(self._levels)])
        ]
        if self.cache is not None:
            kwargs = {**kwargs, "past_key_values": self.cache}
            handles.extend(_kept_inside(self._blocks, self.cache, is_own))
        try:
            yield kwargs
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
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
    def entered(self, kwargs: dict[str, Any], is_own: Own) -> Iterator[dict[str, Any]]:
        """Lets the forward in it run so, called with the arguments that it gives.

        Args:
            kwargs: the arguments of a forward of one row, of the positions that are not left out.
            is_own: whether it is this forward that calls a block.
        """
        blocks, last = self._blocks, max(row.level for row in self._entering)
        self.rows = 0
        with ExitStack() as stack:
            for layer in range(self._first):
                stack.enter_context(
                    _replaced(blocks.modules[layer], partial(self._leave_out, layer), is_own)
                )
            for layer in range(self._first, last):
                hook = _only(is_own, partial(self._enter, layer))
                handle = blocks.modules[layer].register_forward_hook(hook, prepend=True)
                stack.callback(handle.remove)
            if self.start:
                self._cache = self._begin_cache()
                kwargs = {**kwargs, "past_key_values": self._cache}
                for handle in _kept_inside(blocks, self._cache, is_own):
                    stack.callback(handle.remove)
                for layer in range(self._first, len(blocks.modules)):
                    module = blocks.modules[layer]
                    before = module.register_forward_pre_hook(
                        _only(is_own, partial(self._fill, layer))
                    )
                    after = module.register_forward_hook(_only(is_own, partial(self._empty, layer)))
                    stack.callback(before.remove)
                    stack.callback(after.remove)
            try:
                yield kwargs
            finally:
                self._cache = None

    def _arriving(self, level: int) -> torch.Tensor:
        """The hidden states of the rows that enter at a level."""
        found = [
            row.prefix.hidden[level][row.origin, self.start : self.length]
            for row in self._entering
            if row.level == level
        ]
        self.rows += sum(part.shape[0] for part in found)
        return torch.cat(found)

    def _leave_out(self, layer: int, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Stands for the forward of a block that is not run."""
        if layer + 1 == self._first:
            hidden = self._arriving(self._first)
        else:
            hidden = first_argument(module, args, kwargs)
        returned = self._entering[0].prefix.returned[layer]
        return self._blocks.returning(layer, hidden if returned is None else returned, hidden)

    def _enter(self, layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
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

    def _fill(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Gives a block the keys and values of the positions before, for each of its rows."""
        mine = [row for row in self._entering if row.level <= layer]
        held = [(row.prefix.cache.layers[layer], row.origin) for row in mine]
        own = self._cache.layers[layer]
        own.keys = torch.cat([past.keys[rows, :, : self.start] for past, rows in held])
        own.values = torch.cat([past.values[rows, :, : self.start] for past, rows in held])

    def _empty(self, layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        own = self._cache.layers[layer]
        own.keys, own.values = own.keys[:1].clone(), own.values[:1].clone()


def _new_cache() -> Any:
    """An empty cache of keys and values."""
    from transformers.cache_utils import DynamicCache  # takes as long to import as all of ours

    return DynamicCache()


def _kept_inside(blocks: Blocks, cache: Any, is_own: Own) -> list[RemovableHandle]:
    """Lets a model that is given a cache return what it returns without one."""

    def without(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, Mapping) or output.get("past_key_values") is not cache:
            return None
        kind: Any = type(output)
        return kind({name: value for name, value in output.items() if value is not cache})

    hook = _only(is_own, without)
    return [module.register_forward_hook(hook, prepend=True) for module in blocks.around]


def _only(is_own: Own, hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook for some of the calls of its module."""
    return lambda *args: hook(*args) if is_own() else None


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any], is_own: Own) -> Iterator[None]:
    """Lets another function be a module's forward, in some of the calls."""
    before, itself = vars(module).get("forward", _ABSENT), module.forward

    def replaced(*args: Any, **kwargs: Any) -> Any:
        return forward(module, *args, **kwargs) if is_own() else itself(*args, **kwargs)

    vars(module)["forward"] = replaced
    try:
        yield
    finally:
        if before is _ABSENT:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before


class Tail(NamedTuple):
    """One prompt's share of a forward that it enters behind a block.

    Attributes:
        layouts: how the values at sites are cut.
        rows: its rows of the batch.
        forward: the forward.
        entering: where it enters.
        entry: where what the last block returned that it leaves out stands: at that block's
            output, and at the input of the next.
        unembedded: which positions of the batch become logits.
        logits: which of its own, counted from the first that is computed.
    """

    layouts: Layouts
    rows: slice
    forward: Resumed
    entering: Entering
    entry: frozenset[Place]
    unembedded: Unembedded
    logits: Sequence[int]

    def take(self, site: Site, value: Any, writable: bool = False) -> Any:
        """Returns the prompt's own part of what arrived at a site."""
        layout = self.layouts[site[1:4]]
        if site[1:4] in self.unembedded.places:
            logits = partial(self._unembedded, site)
            return take_logits(value, layout, logits, partial(self._own, site))
        own = self._own(site, value, layout)
        if writable and self.entering.rows > 1 and is_shared(layout):
            return map_structure(clone, own)
        return own

    def _unembedded(self, site: Site, value: Any, layout: Any) -> Any:
        """Its part of what has the positions only that become logits."""
        kept = slice(0, len(self.logits))
        part = Part(self.rows, kept, self.forward.rows, self.unembedded.count)
        own = cut(site, value, layout, part)
        start = self.forward.start
        return spread(own, layout, [start + at for at in self.logits], self.forward.length)

    def _own(self, site: Site, value: Any, layout: Any) -> Any:
        """Its part of what has all positions that are computed."""
        start = self.forward.start
        own = cut(site, value, layout, self._part(self.forward.length - start))
        if not start:
            return own
        own = spread(own, layout, slice(start, self.forward.length), self.forward.length)
        if site[1:4] in self.entry:
            row = self.entering
            own = map_structure(lambda leaf: leaf.clone(), own)
            hidden = own if isinstance(own, torch.Tensor) else own[0]
            hidden[:, :start] = row.prefix.hidden[row.level][row.origin, :start]
        return own

    def put(self, site: Site, value: Any, own: Any) -> None:
        """Fills the prompt's own part of a copy of what arrived at a site."""
        layout, start = self.layouts[site[1:4]], self.forward.start
        length = self.forward.length - start
        if start:
            whole = Part(
                slice(0, self.entering.rows),
                slice(start, self.forward.length),
                0,
                self.forward.length,
            )
            own = cut(site, own, layout, whole._replace(batch=self.entering.rows))
        put(site, value, layout, self._part(length), own)

    def widen(self, site: Site, value: Any) -> Any:
        """Returns a value in which each row has a part that can be written to."""
        return widened(value, self.layouts[site[1:4]], self.forward.rows)

    def _part(self, length: int) -> Part:
        return Part(self.rows, slice(0, length), self.forward.rows, length)


def find_chain(
    module: nn.Module,
    modules: Mapping[str, nn.Module],
    views: Mapping[str, View],
    layouts: Layouts,
    options: Mapping[str, Any],
    vocabulary: int,
    device: torch.device,
    inside: Collection[str] = (),
) -> Chain | None:
    """Returns the blocks at which a model's forwards can begin, found out by running it.

    Args:
        module: the model, with its weights. The caller holds it (see `exclusive`).
        modules: its tree, by path.
        views: how the outputs of its blocks are shown, by path.
        layouts: how values are cut.
        options: keyword arguments for its forward.
        vocabulary: how many token ids it has.
        device: where these have to be.
        inside: the modules in whose forwards there are functions among the places.

    Returns:
        The blocks and the places at which values are right then; None if they are not behind
        some block.
    """
    try:
        with undisturbed(modules):
            given = (module, modules, views, layouts, options, vocabulary, device)
            trial = _Trial(*given, inside)
            whole = trial.right_places(0)
            tails = trial.right_places(2) if trial.looks_back_only() else frozenset[Place]()
    except Exception:  # whatever the model makes of it: then it is not to be run so
        return None
    paths = tuple(views)
    if any((path, "output", 0) not in whole for path in paths):
        return None
    if any((path, "output", 0) not in tails for path in paths):
        tails = frozenset[Place]()
    return Chain(paths, whole, tails, trial.handed() & tails)


def _has_positions_second(layout: TensorLayout) -> bool:
    """Whether a value is `(rows, position, features)`, or has no positions."""
    axes = layout.axes
    return Axis.POSITIONS not in axes or (len(axes) == 3 and axes[1] is Axis.POSITIONS)


def _always() -> bool:
    return True


class _Trial:
    """A model run in full on a few tokens, and again with rows that enter behind every block."""

    _LENGTH = 5

    def __init__(
        self,
        module: nn.Module,
        modules: Mapping[str, nn.Module],
        views: Mapping[str, View],
        layouts: Layouts,
        options: Mapping[str, Any],
        vocabulary: int,
        device: torch.device,
        inside: Collection[str],
    ) -> None:
        self._module, self._modules, self._views = module, modules, views
        self._inside = inside
        self._layouts, self._options = layouts, options
        self._blocks = blocks_of(modules, views)
        numbers = torch.arange(2 * self._LENGTH, device=device)
        self._ids = (numbers * 7919 + 13).remainder(vocabulary).reshape(2, self._LENGTH)
        levels = range(1, len(views) + 1)
        self._prefix = Prefix(self._blocks, levels, cached=True)
        self._expected: dict[Place, Any] = {}
        with self._prefix.left_by(dict(options), _always) as kwargs:
            module(input_ids=self._ids[:1], **kwargs)

        def expect(place: Place, value: Any) -> None:
            self._expected[place] = map_structure(clone, value)

        with listening(modules, views, expect, inside):  # without keys and values, as a trace runs
            module(input_ids=self._ids[:1], **options)

    def looks_back_only(self) -> bool:
        """Returns whether hidden states are the same with another last token, but for its own."""
        ids = self._ids[:1].clone()
        ids[0, -1] = self._ids[1, -1]
        if torch.equal(ids, self._ids[:1]):
            return False
        agrees: list[bool] = []
        ends = {(path, "output", 0) for path in self._blocks.paths}

        def compare(place: Place, value: Any) -> None:
            if place in ends:
                agrees.append(alike(value[0][:, :-1], self._expected[place][0][:, :-1]))

        with listening(self._modules, self._views, compare):
            self._module(input_ids=ids, **self._options)
        return all(agrees)

    def handed(self) -> frozenset[Place]:
        """Returns the inputs of blocks that are just what the block before returned."""
        paths = self._blocks.paths
        return frozenset(
            place
            for before, path in pairwise(paths)
            if (place := (path, "input", 0)) in self._expected
            and alike(self._expected[place], self._expected[before, "output", 0][0])
        )

    def right_places(self, start: int) -> frozenset[Place]:
        """Returns the places at which each row has the values that it should have.

        Args:
            start: how many positions the rows leave out.
        """
        count = len(self._blocks.paths)
        # Two at the first, so that no block runs with the one row that the prompt's ids have.
        rows = [Entering(level, self._prefix, slice(0, 1)) for level in (1, *range(1, count + 1))]
        forward = Resumed(self._blocks, rows, start, self._LENGTH)
        right: set[Place] = set()

        def compare(place: Place, value: Any) -> None:
            if self._agrees(place, value, forward.rows, start):
                right.add(place)

        listening_to = listening(self._modules, self._views, compare, self._inside)
        with forward.entered(dict(self._options), _always) as kwargs, listening_to:
            # With the ids of another prompt: what these do to the blocks that run would show.
            self._module(input_ids=self._ids[1:, start:], **kwargs)
        return frozenset(right)

    def _agrees(self, place: Place, value: Any, rows: int, start: int) -> bool:
        layout, expected = self._layouts.get(place), self._expected.get(place)
        if layout is None or expected is None or not rows:
            return False
        if any(Axis.BOTH in leaf.axes for leaf in leaves(layout)):
            return False
        site, length = Site(0, *place), self._LENGTH
        try:
            alone = cut(site, expected, layout, Part(slice(0, 1), slice(start, length), 1, length))
            for row in range(rows):
                part = Part(slice(row, row + 1), slice(0, length - start), rows, length - start)
                if not alike(cut(site, value, layout, part), alone):
                    return False
            if start and not all(map(_has_positions_second, leaves(layout))):
                return False  # which of them is looked at is told from indices into such a value
            if start:
                spread(alone, layout, slice(start, length), length)
        except (InsituError, ValueError):  # it has pairs of positions, or is not of the batch
            return False
        return True
