"""The grid of an attribution: which sites, layers, positions and heads it has numbers for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from insitu.display.axis import Axis
from insitu.display.labels import POSITIONS
from insitu.graph.errors import OptionError
from insitu.graph.location import here
from insitu.methods.pairs import Choice, Pairs
from insitu.methods.sites import Site, check_positions, chosen, layers_with, numbers_of, sites_along
from insitu.models.language_model import LanguageModel


@dataclass(frozen=True, slots=True)
class Grid:
    """The parts of sites that there are estimates of.

    Attributes:
        sites: the sites.
        many: whether they are an axis.
        by: the axes behind that.
        layers: the layers.
        positions: the positions that were chosen, None for all.
        given: the heads and the neurons that were chosen, None for all.
    """

    sites: tuple[Site, ...]
    many: bool
    by: tuple[str, ...]
    layers: list[int]
    positions: list[int] | None
    given: Mapping[str, list[int] | None]

    @property
    def parts(self) -> list[tuple[Site, int]]:
        """Each site in each layer."""
        return [(site, layer) for site in self.sites for layer in self.layers]

    @property
    def ragged(self) -> list[int]:
        """Which of its axes have as many indices as the prompt has positions."""
        free = POSITIONS if self.positions is None else ("key",)
        return [self.many + at for at, name in enumerate(self.by) if name in free]

    def check(self, pairs: Pairs) -> None:
        """Raises a `PromptError` if the prompts of a pair have no parts for each other."""
        pairs.check(self.sites, self.positions)

    def read(self, model: LanguageModel) -> list[Any]:
        """Returns the proxies of all parts, in an open invocation."""
        return [site.read(model, layer) for site, layer in self.parts]

    def in_run(self, length: int) -> Grid:
        """Returns it with each position of the run that would be patched once, if they are summed.

        Of positions such as 2 and -1 that are the same one there, the last counts, as in a patch.

        Args:
            length: how long the prompt of that run is.
        """
        if self.positions is None or {"position", "query"} & set(self.by):
            return self
        places = chosen("position", self.positions, length)
        once = dict(zip(places, self.positions, strict=True))
        return replace(self, positions=list(once.values()))

    def at_positions(self, value: Any, site: Site, length: int) -> Any:
        """Returns a site's value at the positions that were chosen."""
        if self.positions is None:
            return value
        places = chosen("position", self.positions, length)
        return value[site.index(position=places, query=places)]

    def differences(
        self, clean: Sequence[Any], corrupted: Sequence[Any], of_clean: int, of_corrupted: int
    ) -> list[Any]:
        """Returns by how much the clean run differs from the corrupted one in each part."""
        return [
            self.at_positions(one.detach(), site, of_clean).float()
            - self.at_positions(other.detach(), site, of_corrupted).float()
            for (site, _), one, other in zip(self.parts, clean, corrupted, strict=True)
        ]

    def arranged(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns sums over values patched together, of all parts, with the axes of the result.

        Raises:
            OptionError: if parts have axes of different length.
        """
        found = [self._summed(v, site) for (site, _), v in zip(self.parts, values, strict=True)]
        shapes = {tuple(value.shape) for value in found}
        if len(shapes) > 1:
            raise OptionError(
                "Sites and layers have axes of different length, "
                f"{' and '.join(map(str, sorted(shapes)))}: ask for these by themselves.",
                here(),
            )
        whole = torch.stack(found).unflatten(0, (len(self.sites), len(self.layers)))
        whole = whole.movedim(1, 1 + self.by.index("layer"))
        return whole if self.many else whole[0]

    def _summed(self, value: torch.Tensor, site: Site) -> torch.Tensor:
        names = list(site.axes)
        for name, given in self.given.items():
            if given is not None:
                at = names.index(name)
                kept = chosen(name, given, value.shape[at])
                if name not in self.by:  # what is patched twice is patched once
                    kept = list(dict.fromkeys(kept))
                value = value.index_select(at, torch.tensor(kept, device=value.device))
        gone = [at for at, name in enumerate(names) if name not in self.by]
        value = value.sum(gone) if gone else value
        left = [name for name in names if name in self.by]
        return value.permute([left.index(name) for name in self.by if name != "layer"])

    def axes(self, pairs: Pairs, found: Sequence[Any]) -> list[Axis]:
        """The axes of the result, but for that of the pairs."""
        axes = [Axis.of("site", (site.name for site in self.sites))] if self.many else []
        for name in self.by:
            if name == "layer":
                axes.append(Axis.of(name, self.layers))
            elif name in POSITIONS:
                axes.append(pairs.positions(name, self.positions))
            else:
                size = found[0].value.shape[1 + self.sites[0].axes.index(name)]
                axes.append(Axis.of(name, chosen(name, self.given.get(name), size)))
        return axes

    def tokens(self, pairs: Pairs) -> tuple[tuple[str, ...], ...]:
        """The tokens at the positions of the result, of each clean prompt."""
        return pairs.tokens(self.by, self.positions)


def grid_of(
    model: LanguageModel,
    sites: str | Sequence[str],
    by: str | Sequence[str],
    layers: Choice,
    positions: Choice,
    heads: Choice,
    neurons: Choice,
) -> Grid:
    """Returns of what there are to be estimates. Args as of `attribution_patching`.

    Raises:
        OptionError: if there is no such thing.
    """
    given = {"head": numbers_of("head", heads), "neuron": numbers_of("neuron", neurons)}
    found, along = sites_along(sites, by, given)
    if "layer" not in along:
        raise OptionError(
            "`by` has no 'layer'. What patches of several layers do together is not the sum of "
            "what each does: take `activation_patching` for that.",
            here(),
        )
    if positions is not None or set(along) & set(POSITIONS):
        check_positions(model)
    blocks = layers_with(model, found, layers)
    return Grid(
        found, not isinstance(sites, str), along, blocks, numbers_of("position", positions), given
    )
