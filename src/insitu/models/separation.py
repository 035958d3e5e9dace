"""Whether what passes a site of a batch can be cut into the parts of its invocations.

Shapes propose how, and values decide. The model is run on a few short prompts of different length,
as one batch and each alone. A site where an invocation's part is not what it would be alone cannot
be cut. Inside of an expert layer tokens lie in the order of the experts, and the shape does not
tell.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from insitu.batching.demand import Side
from insitu.batching.layout import Entries, Layouts, Part, cut, is_shared, leaves, widened
from insitu.batching.proposed_layouts import SIZES, find_layouts
from insitu.engine.fallback import Fallback
from insitu.engine.keeping import undisturbed
from insitu.engine.listening import listening
from insitu.engine.places import View
from insitu.engine.tree import Tree
from insitu.graph.errors import InsituError
from insitu.graph.location import Mark
from insitu.graph.node import SEPARATOR, Address, Place, Site
from insitu.models.blocks import CACHES
from insitu.models.joined_prompts import Batch, join
from insitu.models.later_steps import LaterSteps, find_later_steps
from insitu.models.parted import agrees, copied_away, tells_apart
from insitu.models.prompts import Prompt
from insitu.models.trial import alike

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
        later: gives what passes in the later steps of a generation, and in the functions that some
            modules call there; None if that cannot be tried. It is asked when a later step is used,
            and again for functions of other modules.
        differentiates: whether gradients are cut as values are. It is asked when some are wanted,
            once.

    Attributes:
        layouts: the layouts of the sites that can be cut.
        some: the layouts of sites with some entries that can be cut and others that cannot.
    """

    def __init__(
        self,
        layouts: Layouts,
        widens: Callable[[Place], bool],
        inside: Callable[[Collection[str]], Layouts],
        later: Callable[[Collection[str]], LaterSteps | Fallback] | None = None,
        differentiates: Callable[[], bool] = lambda: True,
    ) -> None:
        self.some = {at: one for at, one in layouts.items() if isinstance(one, Entries)}
        self.layouts = {at: one for at, one in layouts.items() if at not in self.some}
        self._widens = widens
        self._inside = inside
        self.differentiates = cache(differentiates)
        self._looked_into: set[str] = set()
        self._takes_writes: dict[Place, bool] = {}
        self._later = later
        self._later_steps: LaterSteps | Fallback | None = None
        self._later_inside: set[str] = set()

    def obstacle(
        self,
        sites: Collection[Address],
        written: Collection[Address],
        entries: Callable[[Address], Collection[str] | None] = lambda _: None,
    ) -> Address | None:
        """Returns a site for whose sake invocations cannot share a batch, None if they can.

        Args:
            sites: the sites that they read or write.
            written: those that they write.
            entries: which entries they use of what arrives at a site, None if it may be all.
        """
        self._look_into(_owners(sites))
        for address in (*sites, *written):
            place: Place = address[1:4]
            if address[2] in OF_STEPS or address[4] > 0:
                continue
            if place not in self.layouts and not _has_entries(self.some, address, entries):
                return address
        for address in written:
            place = address[1:4]
            if address[2] in OF_STEPS or address[4] > 0:
                continue
            if place not in self._takes_writes:
                layout = self.layouts.get(place, self.some.get(place))
                possible = _takes_writes(layout)
                possible = possible and (not is_shared(layout) or self._widens(place))
                self._takes_writes[place] = possible
            if not self._takes_writes[place]:
                return address
        return None

    def shared_by_rows(self, sites: Collection[Address]) -> Address | None:
        """Returns a site whose value holds for all rows, so that a gradient of it is of all.

        Args:
            sites: the sites to look at.
        """
        return next((site for site in sites if is_shared(self.layouts.get(site[1:4]))), None)

    def later_steps(self, sites: Collection[Address]) -> LaterSteps | Fallback | None:
        """Returns what passes in later steps, if any of some sites is of such, else None.

        Args:
            sites: the sites that invocations read or write.
        """
        used = [address for address in sites if address[4] and address[2] not in OF_STEPS]
        if not used or self._later is None:
            return None
        owners = _owners(used)
        if self._later_steps is None or not owners <= self._later_inside:
            self._later_inside |= owners
            self._later_steps = self._later(self._later_inside)
        return self._later_steps

    def _look_into(self, owners: set[str]) -> None:
        """Finds out how what functions in the forwards of modules take and give is cut."""
        new = owners - self._looked_into
        if new:
            self._looked_into |= new
            self.layouts = {**self.layouts, **self._inside(new)}


OF_STEPS = ("tokens", "choice")
"""The kinds of sites that are no module's, and have one number for each row in each step."""


def later_obstacle(
    later: LaterSteps,
    sites: Collection[Address],
    written: Collection[Address],
    entries: Callable[[Address], Collection[str] | None],
) -> Address | None:
    """Returns a site that cannot be cut out of a batch in later steps, None if each can.

    Args:
        later: what passes in these.
        sites: the sites that invocations read or write.
        written: those that they write.
        entries: as of `Separation.obstacle`.
    """
    for address in sites:
        place: Place = address[1:4]
        if not address[4] or address[2] in OF_STEPS or place not in later.places:
            continue
        layout = later.layouts.get(place)
        whole = layout is not None and not isinstance(layout, Entries)
        if not whole and not _has_entries(later.layouts, address, entries):
            return address
        # A value that all rows share is not made one for each here: no trial has tried that.
        if address in written and (is_shared(layout) or not _takes_writes(layout)):
            return address
    return None


def _takes_writes(layout: Any) -> bool:
    return all(leaf.writable for leaf in leaves(layout))


def _owners(sites: Collection[Address]) -> set[str]:
    """The modules in whose forwards some sites are."""
    return {path.partition(SEPARATOR)[0] for _, path, *_ in sites if SEPARATOR in path}


def _has_entries(
    layouts: Layouts, address: Address, entries: Callable[[Address], Collection[str] | None]
) -> bool:
    """Whether the entries that are used of what arrives at a site can be cut."""
    layout = layouts.get(address[1:4])
    if not isinstance(layout, Entries):
        return False
    used = entries(address)
    return used is not None and set(used) <= layout.keys()


class Trial:
    """Runs of a model that show how its values lie in a batch.

    Args:
        run: runs the model on a prompt.
        tree: its tree. The caller holds it during the methods (see `exclusive`).
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
        tree: Tree,
        views: Mapping[str, View],
        side: Side,
        vocabulary: int,
        pad_id: int,
        context: int | None,
        mark: Mark,
    ) -> None:
        self._run, self._tree, self._views = run, tree, views
        self._vocabulary, self._pad_id, self._mark = vocabulary, pad_id, mark
        draw = torch.Generator().manual_seed(0)
        lengths = [min(length, context or length) for length in _LENGTHS]
        self._prompts = [self._prompt((1, length), draw) for length in lengths]
        self._side: Side = side

    def proposed(self) -> Layouts:
        """Returns the layouts that sites have by their shapes, where only a run can tell these."""
        draw = torch.Generator().manual_seed(0)
        with undisturbed(self._tree):
            return find_layouts([self._passing(self._prompt(size, draw)) for size in SIZES])

    def inside(self, owners: Collection[str]) -> Layouts:
        """Returns the layouts of the functions that modules call in their forwards, verified.

        Args:
            owners: the paths of these modules.
        """
        draw = torch.Generator().manual_seed(0)
        with undisturbed(self._tree):
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
        with undisturbed(self._tree):
            together = self._passing(whole, layouts, inside=inside)
            right = {
                place for place, value in together.items() if tells_apart(value, layouts[place])
            }
            for prompt, part in zip(self._prompts, batch.parts, strict=True):
                alone = self._passing(prompt, right, inside=inside)
                for place in tuple(right):
                    if place not in alone or not agrees(
                        place, together[place], alone[place], layouts[place], part
                    ):
                        right.discard(place)
        return {place: layout for place, layout in layouts.items() if place in right}

    def later_steps(
        self,
        go_on: Callable[[Prompt, torch.Tensor], Any],
        stepped: str,
        inside: Collection[str],
    ) -> LaterSteps:
        """Returns what passes in the later steps of a generation.

        Args:
            go_on: generates tokens that are given, `(rows, step)`.
            stepped: the path of the module whose calls are the steps.
            inside: the modules in whose forwards there are places too.
        """
        batch, whole = self._batch()
        given = (self._prompts, whole, batch.parts, self._tree, self._views)
        return find_later_steps(go_on, *given, stepped, inside)

    def widens(self, layouts: Layouts, place: Place) -> bool:
        """Returns whether the model runs alike if a value has a row for each row of the batch.

        Args:
            layouts: verified layouts.
            place: where there is the value, which has one row for all.
        """
        batch, whole = self._batch()
        with undisturbed(self._tree):
            before = self._passing(whole, layouts)
            after = self._passing(whole, layouts, (place, layouts[place]))
        for at, value in before.items():
            for part in batch.parts:
                try:
                    own = cut(Site(0, *at), value, layouts[at], part)
                except InsituError:
                    return False
                if at not in after or not agrees(at, after[at], own, layouts[at], part):
                    return False
        return True

    def _prompt(self, shape: tuple[int, int], draw: torch.Generator) -> Prompt:
        ids = torch.randint(self._vocabulary, shape, generator=draw)
        ids[ids == self._pad_id] = (self._pad_id + 1) % self._vocabulary
        return Prompt(ids, self._mark)

    def _batch(self) -> tuple[Batch, Prompt]:
        batch = join(self._prompts, self._side, self._pad_id)
        return batch, Prompt(batch.ids, self._mark, batch.mask)

    def gradients_agree(self, layouts: Layouts, places: Sequence[Place]) -> bool:
        """Returns whether a prompt's part of a batch's gradients is what it has alone.

        Values that agree to rounding may have gradients that do not.

        Args:
            layouts: verified layouts.
            places: where, in the order in which they come. The loss is of the last.
        """
        batch, whole = self._batch()
        with undisturbed(self._tree):
            together = self._gradients(whole, places, layouts, batch.parts)
            for prompt, part in zip(self._prompts, batch.parts, strict=True):
                alone = self._gradients(prompt, places, layouts, None)
                for place, gradient in alone.items():
                    own = cut(Site(0, *place), together[place], _first(layouts[place]), part)
                    if not alike(own, gradient):
                        return False
        return True

    def _gradients(
        self,
        prompt: Prompt,
        places: Sequence[Place],
        layouts: Layouts,
        parts: Sequence[Part] | None,
    ) -> dict[Place, torch.Tensor]:
        """The gradients at some places of what stands at the last, of the parts of a batch."""
        seen: dict[Place, torch.Tensor] = {}

        def tell(place: Place, value: Any) -> Any:
            if place not in places:
                return None
            hidden = value[0] if isinstance(value, tuple) else value
            if not hidden.requires_grad:
                hidden = hidden.detach().requires_grad_()
            seen[place] = new = hidden.view_as(hidden)
            return (new, *value[1:]) if isinstance(value, tuple) else new

        with torch.enable_grad():
            with listening(self._tree.modules, self._views, tell, (), CACHES):
                self._run(prompt)
            last = places[-1]
            end = seen.pop(last)
            ends = [end]
            if parts is not None:
                site = Site(0, *last)
                ends = [cut(site, end, _first(layouts[last]), part) for part in parts]
            loss = torch.stack([(one**2).sum() for one in ends]).sum()
            return dict(zip(seen, torch.autograd.grad(loss, [*seen.values()]), strict=True))

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
                seen[place] = copied_away(value)
            return value if place == widen[0] else None

        with listening(self._tree.modules, self._views, tell, inside, CACHES):
            self._run(prompt)
        return seen


def _first(layout: Any) -> Any:
    """The layout of what a block hands on, which comes first in what it returns."""
    return layout[0] if isinstance(layout, tuple) else layout
