"""The parts of sites that are patched, each in a run of its own, and the axes of that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from insitu.display.axis import Axis
from insitu.display.labels import POSITIONS
from insitu.graph.errors import OptionError
from insitu.graph.location import here
from insitu.methods.pairs import Choice, Pairs
from insitu.methods.sites import Site, check_positions, chosen, layers_with, numbers_of, sites_along
from insitu.models.language_model import LanguageModel


@dataclass(frozen=True, slots=True)
class Patch:
    """A part of a site in a layer: on each of some axes an index, or several.

    Attributes:
        site: the site.
        layer: the layer.
        into: the part by the names of axes, in the run that is patched.
        out_of: the same in the run that it is taken from.
    """

    site: Site
    layer: int
    into: Mapping[str, int | list[int]]
    out_of: Mapping[str, int | list[int]]

    def parts(self) -> Iterable[tuple[Any, Any]]:
        """Gives indices that together take the part, in the one run and in the other."""
        into, out_of = (
            {n: _slice(i) for n, i in each.items()} for each in (self.into, self.out_of)
        )
        listed = [n for n in into if isinstance(into[n], list) or isinstance(out_of[n], list)]
        listed = listed[1:]  # two lists in one index would be taken together
        pairs = [list(zip(_all(self.into[n]), _all(self.out_of[n]), strict=True)) for n in listed]
        for numbers in product(*pairs):
            for name, (one, other) in zip(listed, numbers, strict=True):
                into[name], out_of[name] = one, other
            yield self.site.index(**into), self.site.index(**out_of)


@dataclass(frozen=True, slots=True)
class Grid:
    """Which parts are patched, each in a run of its own.

    Attributes:
        sites: the sites.
        many: whether they are an axis.
        by: the axes behind that.
        layers: the layers.
        given: what was chosen on other axes.
    """

    sites: tuple[Site, ...]
    many: bool
    by: tuple[str, ...]
    layers: list[int]
    given: Mapping[str, Choice]

    def check(self, pairs: Pairs) -> None:
        """Raises a `PromptError` if the prompts of a pair have no parts for each other."""
        pairs.check(self.sites, self.given["position"])

    def read(self, model: LanguageModel) -> dict[tuple[Site, int], Any]:
        """Returns the proxies of the values that are taken, in an open invocation."""
        return {(s, layer): s.read(model, layer) for s in self.sites for layer in self.layers}

    def sizes(self, model: LanguageModel, donors: Mapping[tuple[Site, int], Any]) -> dict[str, int]:
        """The length of each axis that is neither layers nor positions, where it is needed.

        Raises:
            OptionError: if it is not the same of all sites and layers.
        """
        sizes: dict[str, int] = {}
        wanted = {*self.by, *(name for name, given in self.given.items() if given is not None)}
        for (site, layer), donor in donors.items():
            for at, name in enumerate(site.axes):
                if name not in wanted or name in POSITIONS:
                    continue
                size = donor.shape[1 + at]
                if sizes.setdefault(name, size) != size:
                    raise OptionError(
                        f"{site.name!r} of layer {layer} has {size} on the axis {name!r}, where "
                        f"others have {sizes[name]}: patch these by themselves.",
                        here(),
                    )
        return sizes

    def numbers(self, name: str, sizes: Mapping[str, int], length: int) -> list[int]:
        """Which indices of an axis are patched, in a prompt of some length."""
        if name == "layer":
            return self.layers
        return chosen(name, self.given.get(name), sizes.get(name, length))

    def shape(self, sizes: Mapping[str, int], length: int) -> list[int]:
        """The lengths of its axes, in a prompt of some length."""
        counts = [len(self.numbers(name, sizes, length)) for name in self.by]
        return [len(self.sites), *counts] if self.many else counts

    def runs(self, sizes: Mapping[str, int], length: int, other: int) -> Iterable[list[Patch]]:
        """Gives the patches of each run, in the order of the result.

        Args:
            sizes: of axes.
            length: how long the prompt is that is run.
            other: how long the one is whose values are put in.
        """
        whole = {
            name for name, given in self.given.items() if given is not None and name not in self.by
        }
        along = [
            list(zip(self.numbers(n, sizes, length), self.numbers(n, sizes, other), strict=True))
            for n in self.by
        ]
        for site in self.sites:
            fixed = [name for name in site.axes if name in whole]
            rest = [{n: self.numbers(n, sizes, size) for n in fixed} for size in (length, other)]
            for indices in product(*along):
                cell = dict(zip(self.by, indices, strict=True))
                layers = [cell.pop("layer")[0]] if "layer" in cell else self.layers
                into = {**rest[0], **{name: one for name, (one, _) in cell.items()}}
                out_of = {**rest[1], **{name: two for name, (_, two) in cell.items()}}
                yield [Patch(site, layer, into, out_of) for layer in layers]

    @property
    def ragged(self) -> list[int]:
        """Which of its axes have as many indices as the prompt has positions."""
        return [
            self.many + at
            for at, name in enumerate(self.by)
            if name in POSITIONS and self.given.get(name) is None
        ]

    def axes(self, pairs: Pairs, sizes: Mapping[str, int]) -> list[Axis]:
        """The axes of the result, but for that of the pairs."""
        axes = [Axis.of("site", (site.name for site in self.sites))] if self.many else []
        for name in self.by:
            if name in POSITIONS:
                axes.append(pairs.positions(name, self.given["position"]))
            else:
                axes.append(Axis.of(name, self.numbers(name, sizes, 0)))
        return axes

    def tokens(self, pairs: Pairs) -> tuple[tuple[str, ...], ...]:
        """The tokens at the positions of the result, of each clean prompt."""
        return pairs.tokens(self.by, self.given["position"])


def grid_of(
    model: LanguageModel,
    sites: str | Sequence[str],
    by: str | Sequence[str],
    layers: Choice,
    positions: Choice,
    heads: Choice,
    neurons: Choice,
) -> Grid:
    """Returns which parts are patched.

    Args:
        model: the model.
        sites: by their standard names.
        by: along which axes.
        layers: which layers, all if None; and so on.
        positions: which positions, or queries.
        heads: which heads.
        neurons: which neurons.

    Raises:
        OptionError: if there is no such thing.
    """
    asked = numbers_of("position", positions)
    units = {"head": numbers_of("head", heads), "neuron": numbers_of("neuron", neurons)}
    found, along = sites_along(sites, by, units)
    given = {"position": asked, "query": asked, **units}
    if positions is not None or set(along) & set(POSITIONS):
        check_positions(model)
    blocks = layers_with(model, found, layers)
    return Grid(found, not isinstance(sites, str), along, blocks, given)


def _all(given: Any) -> list[int]:
    return [given] if isinstance(given, int) else list(given)


def _slice(numbers: int | list[int]) -> Any:
    """Indices as a slice if they lie beside each other: the planner understands that."""
    if isinstance(numbers, int) or not numbers:
        return numbers
    first, last = numbers[0], numbers[-1]
    return slice(first, last + 1) if numbers == list(range(first, last + 1)) else numbers
