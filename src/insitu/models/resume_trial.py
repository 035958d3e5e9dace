"""At which blocks a model's forwards can begin, found out by running it.

Shapes and source do not tell whether a row that enters behind a block comes to the values that
it has in a forward of its own. So the model is run on a few tokens in full, and again with rows
that enter behind every block; how such forwards run is in `resume.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from insitu.batching.layout import Axis, Layouts, Part, TensorLayout, cut, leaves, spread
from insitu.batching.shared_blocks import Chain
from insitu.engine.fallback import Fallback, tried
from insitu.engine.keeping import undisturbed
from insitu.engine.listening import listening
from insitu.engine.places import View
from insitu.engine.tree import Tree
from insitu.graph.errors import InsituError
from insitu.graph.node import Place, Site
from insitu.graph.structure import clone, map_structure
from insitu.models.blocks import CACHES
from insitu.models.resume import Entering, Prefix, Resumed, blocks_of
from insitu.models.trial import alike


def _has_positions_second(layout: TensorLayout) -> bool:
    """Whether a value is `(rows, position, features)`, or has no positions."""
    axes = layout.axes
    return Axis.POSITIONS not in axes or (len(axes) == 3 and axes[1] is Axis.POSITIONS)


def _always() -> bool:
    return True


class ResumeTrial:
    """A model run in full on a few tokens, and again with rows that enter behind every block.

    Args:
        module: the model, with its weights. The caller holds it (see `exclusive`).
        tree: its tree.
        views: how the outputs of its blocks are shown, by path.
        layouts: how values are cut.
        options: keyword arguments for its forward.
        vocabulary: how many token ids it has.
        device: where these have to be.
        inside: the modules in whose forwards there are functions among the places.
    """

    _LENGTH = 5

    def __init__(
        self,
        module: nn.Module,
        tree: Tree,
        views: Mapping[str, View],
        layouts: Layouts,
        options: Mapping[str, Any],
        vocabulary: int,
        device: torch.device,
        inside: Collection[str] = (),
    ) -> None:
        self._module, self._tree, self._views = module, tree, views
        self._inside = inside
        self._layouts, self._options = layouts, options
        self._blocks = blocks_of(tree.modules, views)
        numbers = torch.arange(2 * self._LENGTH, device=device)
        self._ids = (numbers * 7919 + 13).remainder(vocabulary).reshape(2, self._LENGTH)
        levels = range(1, len(views) + 1)
        self._prefix = Prefix(self._blocks, levels, cached=True)
        self._expected: dict[Place, Any] = {}

    def chain(self) -> Chain | Fallback:
        """Returns the blocks at which the model's forwards can begin, found out by running it.

        Returns:
            The blocks and the places at which values are right then; or why no forward can begin
            at them.
        """
        return tried(self._chain, "a forward that begins at a block")

    def _chain(self) -> Chain | Fallback:
        with undisturbed(self._tree):
            self._run_whole()
            whole = self._right_places(0)
            tails = self._right_places(2) if self._looks_back_only() else frozenset[Place]()
        paths = tuple(self._views)
        for path in paths:
            if (path, "output", 0) not in whole:
                return Fallback(f"values behind `{path}` differ when a forward begins at a block")
        if any((path, "output", 0) not in tails for path in paths):
            tails = frozenset[Place]()
        return Chain(paths, whole, tails, self._handed() & tails)

    def _run_whole(self) -> None:
        """Runs the model in full, and keeps what rows enter with and what they should give."""
        with self._prefix.left_by(dict(self._options), _always) as kwargs:
            self._module(input_ids=self._ids[:1], **kwargs)

        def expect(place: Place, value: Any) -> None:
            self._expected[place] = map_structure(clone, value)

        with self._listening(expect, self._inside):  # without keys and values, as a trace runs
            self._module(input_ids=self._ids[:1], **self._options)

    def _looks_back_only(self) -> bool:
        """Whether hidden states are the same with another last token, but for its own."""
        ids = self._ids[:1].clone()
        ids[0, -1] = self._ids[1, -1]
        if torch.equal(ids, self._ids[:1]):
            return False
        agrees: list[bool] = []
        ends = {(path, "output", 0) for path in self._blocks.paths}

        def compare(place: Place, value: Any) -> None:
            if place in ends:
                agrees.append(alike(value[0][:, :-1], self._expected[place][0][:, :-1]))

        with self._listening(compare):
            self._module(input_ids=ids, **self._options)
        return all(agrees)

    def _handed(self) -> frozenset[Place]:
        """The inputs of blocks that are just what the block before returned."""
        paths = self._blocks.paths
        return frozenset(
            place
            for before, path in pairwise(paths)
            if (place := (path, "input", 0)) in self._expected
            and alike(self._expected[place], self._expected[before, "output", 0][0])
        )

    def _right_places(self, start: int) -> frozenset[Place]:
        """The places at which each row has the values that it should have.

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

        listens = self._listening(compare, self._inside)
        with forward.entered(dict(self._options), _always) as kwargs, listens:
            # With the ids of another prompt: what these do to the blocks that run would show.
            self._module(input_ids=self._ids[1:, start:], **kwargs)
        return frozenset(right)

    def _listening(
        self, tell: Callable[[Place, Any], None], inside: Collection[str] = ()
    ) -> AbstractContextManager[object]:
        return listening(self._tree.modules, self._views, tell, inside, CACHES)

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
