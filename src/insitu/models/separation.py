"""Whether what passes a site of a batch can be cut into the parts of its invocations.

Shapes propose how, and values decide: the model is run on a few short prompts of different
length, as one batch and each alone, and a site where an invocation's part is not what it would be
alone cannot be cut. Inside of an expert layer tokens lie in the order of the experts, whatever
the shape says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from insitu.graph.errors import InsituError
from insitu.graph.location import Mark
from insitu.graph.node import Address, Site
from insitu.graph.structure import map_structure
from insitu.models.batching import Batch, join
from insitu.models.blocks import CACHES
from insitu.models.prompts import Prompt, Side
from insitu.models.trial import alike, undisturbed
from insitu.runtime.hooks import Place, View
from insitu.runtime.inside import SEPARATOR
from insitu.runtime.layout import (
    SIZES,
    Axis,
    Layouts,
    Part,
    TensorLayout,
    cut,
    find_layouts,
    is_shared,
    leaves,
    widened,
)
from insitu.runtime.listening import Listening

# How long the prompts are that are tried: one is padded, one has a single token.
_LENGTHS = (3, 5, 1)


class Separation:
    """How values at the sites of one kind of call are cut into the parts of invocations.

    Args:
        layouts: the layouts of the sites that can be cut.
        widens: whether the model runs alike if a place has a row for each row of the batch, where
            it has one for all. It is asked when such a place is to be written, once.
        inside: gives the layouts of the functions that some modules call in their forwards. It is
            asked for a module when such a place is used, once.
    """

    def __init__(
        self,
        layouts: Layouts,
        widens: Callable[[Place], bool],
        inside: Callable[[Collection[str]], Layouts],
    ) -> None:
        self.layouts = layouts
        self._widens = widens
        self._inside = inside
        self._looked_into: set[str] = set()
        self._takes_writes: dict[Place, bool] = {}

    def obstacle(self, sites: Collection[Address], written: Collection[Address]) -> Address | None:
        """Returns a site for whose sake invocations cannot share a batch, None if they can.

        Args:
            sites: the sites that they read or write.
            written: those that they write.
        """
        self._look_into(
            {path.partition(SEPARATOR)[0] for _, path, *_ in sites if SEPARATOR in path}
        )
        for address in sites:
            if address[4] or address[1:4] not in self.layouts:
                return address
        for address in written:
            place: Place = address[1:4]
            if place not in self._takes_writes:
                layout = self.layouts[place]
                possible = all(leaf.writable for leaf in leaves(layout))
                possible = possible and (not is_shared(layout) or self._widens(place))
                self._takes_writes[place] = possible
            if not self._takes_writes[place]:
                return address
        return None

    def _look_into(self, owners: set[str]) -> None:
        """Finds out how what functions in the forwards of modules take and give is cut."""
        new = owners - self._looked_into
        if new:
            self._looked_into |= new
            self.layouts = {**self.layouts, **self._inside(new)}


class Trial:
    """Runs of a model that show how its values lie in a batch.

    Args:
        run: runs the model on a prompt.
        modules: its tree, by path. The caller holds it during the methods (see `exclusive`).
        views: how outputs are shown, by path.
        side: where shorter prompts are padded.
        vocabulary: how many token ids it has.
        pad_id: what padding is filled with.
        context: the most positions, or None if there is no such number.
        mark: a line of the user's.
    """

    def __init__(
        self,
        run: Callable[[Prompt], Any],
        modules: Mapping[str, nn.Module],
        views: Mapping[str, View],
        side: Side,
        vocabulary: int,
        pad_id: int,
        context: int | None,
        mark: Mark,
    ) -> None:
        self._run, self._modules, self._views = run, modules, views
        self._vocabulary, self._pad_id, self._mark = vocabulary, pad_id, mark
        draw = torch.Generator().manual_seed(0)
        lengths = [min(length, context or length) for length in _LENGTHS]
        self._prompts = [self._prompt((1, length), draw) for length in lengths]
        self._side: Side = side

    def proposed(self) -> Layouts:
        """Returns the layouts that sites have by their shapes, where only a run can tell these."""
        draw = torch.Generator().manual_seed(0)
        with undisturbed(self._modules):
            return find_layouts([self._passing(self._prompt(size, draw)) for size in SIZES])

    def inside(self, owners: Collection[str]) -> Layouts:
        """Returns the layouts of the functions that modules call in their forwards, verified.

        Args:
            owners: the paths of these modules.
        """
        draw = torch.Generator().manual_seed(0)
        with undisturbed(self._modules):
            prompts = [self._prompt(size, draw) for size in SIZES]
            seen = [self._passing(prompt, inside=owners) for prompt in prompts]
        functions = [
            {place: value for place, value in one.items() if SEPARATOR in place[0]} for one in seen
        ]
        return self.verified(find_layouts(functions), owners)

    def verified(self, layouts: Layouts, inside: Collection[str] = ()) -> Layouts:
        """Returns those of some layouts by which each prompt's part is what it is alone.

        Args:
            layouts: layouts by shape.
            inside: the modules in whose forwards there are functions among their places.
        """
        batch, whole = self._batch()
        with undisturbed(self._modules):
            together = self._passing(whole, layouts, inside=inside)
            right = {
                place for place, value in together.items() if _tells_apart(value, layouts[place])
            }
            for prompt, part in zip(self._prompts, batch.parts, strict=True):
                alone = self._passing(prompt, right, inside=inside)
                for place in tuple(right):
                    if place not in alone or not _agrees(
                        place, together[place], alone[place], layouts[place], part
                    ):
                        right.discard(place)
        return {place: layout for place, layout in layouts.items() if place in right}

    def widens(self, layouts: Layouts, place: Place) -> bool:
        """Returns whether the model runs alike if a value has a row for each row of the batch.

        Args:
            layouts: verified layouts.
            place: where there is the value, which has one row for all.
        """
        batch, whole = self._batch()
        with undisturbed(self._modules):
            before = self._passing(whole, layouts)
            after = self._passing(whole, layouts, (place, layouts[place]))
        for at, value in before.items():
            for part in batch.parts:
                try:
                    own = cut(Site(0, *at), value, layouts[at], part)
                except InsituError:
                    return False
                if at not in after or not _agrees(at, after[at], own, layouts[at], part):
                    return False
        return True

    def _prompt(self, shape: tuple[int, int], draw: torch.Generator) -> Prompt:
        ids = torch.randint(self._vocabulary, shape, generator=draw)
        ids[ids == self._pad_id] = (self._pad_id + 1) % self._vocabulary
        return Prompt(ids, self._mark)

    def _batch(self) -> tuple[Batch, Prompt]:
        batch = join(self._prompts, self._side, self._pad_id)
        return batch, Prompt(batch.ids, self._mark, batch.mask)

    def _passing(
        self,
        prompt: Prompt,
        places: Collection[Place] | None = None,
        widen: tuple[Place, Any] = (("", "output", -1), None),
        inside: Collection[str] = (),
    ) -> dict[Place, Any]:
        """What passes some places, or all, in a run, in which one may be widened."""
        seen: dict[Place, Any] = {}

        def tell(place: Place, value: Any) -> Any:
            if place == widen[0]:
                value = widened(value, widen[1], prompt.ids.shape[0])
            if places is None or place in places:
                seen[place] = map_structure(_put_by, value)
            return value if place == widen[0] else None

        with Listening(self._modules, self._views, tell, inside, CACHES):
            self._run(prompt)
        return seen


def _put_by(leaf: Any) -> Any:
    """A copy of a tensor where there is room for what passes all places."""
    return leaf.to("cpu", copy=True) if isinstance(leaf, torch.Tensor) else leaf


def _agrees(place: Place, together: Any, alone: Any, layout: Any, part: Part) -> bool:
    """Whether a prompt's part of a batch's value is what it is alone."""
    try:
        return alike(cut(Site(0, *place), together, layout, part), alone)
    except InsituError:  # it has another shape or structure
        return False


def _tells_apart(value: Any, layout: Any) -> bool:
    """Whether a value would show if rows and positions did not lie in their order.

    Where each has an axis of its own they do.
    """
    if isinstance(layout, TensorLayout):
        if Axis.BOTH not in layout.axes or not isinstance(value, torch.Tensor):
            return True
        tokens = value.movedim(layout.axes.index(Axis.BOTH), 0)
        return not bool((tokens == tokens[:1]).all())
    if isinstance(layout, tuple) and isinstance(value, tuple):
        return all(map(_tells_apart, value, layout))
    if isinstance(layout, dict) and isinstance(value, Mapping):
        return all(_tells_apart(value.get(name), inner) for name, inner in layout.items())
    return True
