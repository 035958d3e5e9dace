"""Attribution patching: what activation patching would find, estimated from one gradient.

A patched run is not run: what it would change is a difference of two runs times a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from insitu.display.axis import Axis
from insitu.graph.errors import OptionError, PromptError, nearest
from insitu.graph.location import here
from insitu.methods.metrics import Metric, as_metric
from insitu.methods.pairs import Pairs, number, read_pairs, share
from insitu.methods.result import Result
from insitu.methods.sites import Site, chosen, site_of
from insitu.models.language_model import LanguageModel

Direction = Literal["denoising", "noising"]
Choice = int | Iterable[int] | None

_COUNTED = ("position", "query", "key")  # axes that are as long as the prompt


def attribution_patching(
    model: LanguageModel,
    clean: Any,
    corrupted: Any,
    metric: Metric | Callable[[Any], Any],
    *,
    sites: str | Sequence[str] = "residual_in",
    by: str | Sequence[str] = ("layer", "position"),
    layers: Choice = None,
    positions: Choice = None,
    heads: Choice = None,
    neurons: Choice = None,
    direction: Direction = "denoising",
    normalised: bool = True,
) -> Result:
    """Returns an estimate of what `activation_patching` would find, from one backward pass.

    It is linear: the difference of the two runs at a site, times the gradient of the metric there
    in the run that would be patched, summed over what is patched together (Nanda 2023,
    https://www.neelnanda.io/mechanistic-interpretability/attribution-patching; Syed et al. 2023,
    https://arxiv.org/abs/2310.10348). It is good for small differences and sites such as the
    outputs of heads, and bad where a nonlinearity is saturated, as for a whole residual stream.
    It takes two forwards and one backward for each pair of prompts, which have passes of their own.

    Args:
        model: the model.
        clean: the prompt with the behaviour in question, in any form that `invoke` takes; or
            several, which may differ in length.
        corrupted: the prompt without it, or one for each. The two of a pair have the same length,
            unless positions are chosen that mean something in both, such as -1.
        metric: what is measured of the logits, and can be differentiated. A KL divergence has no
            gradient in the clean run.
        sites: what would be patched, by its standard name, such as "residual_in", "z" or "pattern".
            Several are an axis "site" of the result.
        by: along which axes it would be patched: "layer", and those of the site: "position",
            "head", "neuron", "query", "key". What is not among them is patched whole.
        layers: which layers, all if None.
        positions: which positions, from the end if negative; all if None. Of scores and patterns,
            which queries.
        heads: which heads, likewise. Of "k" and "v" they are those of the keys.
        neurons: which neurons, likewise.
        direction: "denoising", the corrupted prompt with values of the clean one, or "noising",
            the clean prompt with values of the corrupted one.
        normalised: whether the change of the metric is given as a share: 1 is all of the difference
            between the run that would be patched and the other.

    Returns:
        By how much each patch would change the metric, with the axes "prompt" (if several were
        given), "site" (likewise) and those of `by`. `details` has the metric of the prompts as
        they are, "clean" and "corrupted", `(prompt,)`.

    Raises:
        OptionError: if there is no such site, axis, layer, head or direction, or if shares are
            wanted where the metric is the same of both prompts.
        PromptError: if prompts do not go together.
        ShapeError: if the metric is not a number.

    Example:
        >>> from insitu import LanguageModel
        >>> from insitu.methods import attribution_patching, logit_difference
        >>> model = LanguageModel("insitu/eiffel")
        >>> attribution_patching(
        ...     model,
        ...     "The Louvre is in the city of",
        ...     "The Kremlin is in the city of",
        ...     logit_difference(" Paris", " Moscow"),
        ...     sites="z",
        ...     by=("layer", "head"),
        ... ).sizes
        {'layer': 6, 'head': 8}
    """
    if direction not in ("denoising", "noising"):
        near = nearest(direction, ["denoising", "noising"]) if isinstance(direction, str) else ""
        raise OptionError(
            f"`direction` is 'denoising' or 'noising', not {direction!r}{near}.", here()
        )
    pairs = read_pairs(model, clean, corrupted)
    grid = _grid(model, sites, by, layers, positions, heads, neurons)
    grid.check(pairs)
    ends: list[Any] = []
    estimates: list[list[Any]] = []
    with model.trace() as tracer:
        for pair, measure in enumerate(as_metric(metric).of(model, len(pairs))):
            with tracer.invoke(pairs.clean.ids[pair]):
                reference = model.logits[0]
                of_clean = number(measure(reference, reference.detach()))
                clean_values = grid.read(model)
                if direction == "noising":
                    slopes = [value.grad for value in clean_values]
                    of_clean.backward()
            with tracer.invoke(pairs.corrupted.ids[pair]):
                of_corrupted = number(measure(model.logits[0], reference.detach()))
                corrupted_values = grid.read(model)
                if direction == "denoising":
                    slopes = [value.grad for value in corrupted_values]
                    of_corrupted.backward()
            both: Any = torch.stack([of_clean.detach(), of_corrupted.detach()])
            ends.append(both.save())
            lengths = pairs.clean.lengths[pair], pairs.corrupted.lengths[pair]
            differences = grid.differences(clean_values, corrupted_values, *lengths)
            run, sign = (lengths[1], 1) if direction == "denoising" else (lengths[0], -1)
            estimates.append(
                [
                    (sign * difference * grid.at_positions(slope, site, run)).float().save()
                    for (site, _), difference, slope in zip(
                        grid.parts, differences, slopes, strict=True
                    )
                ]
            )
    measured = torch.stack([each.value for each in ends]).float()
    measured = measured if pairs.clean.many else measured[0]
    values = [grid.arranged([one.value[0] for one in of_pair]) for of_pair in estimates]
    details = {"clean": measured[..., 0], "corrupted": measured[..., 1]}
    start, end = details["corrupted"], details["clean"]
    if direction == "noising":
        start, end = end, start
    stacked = pairs.clean.stacked(values, *grid.ragged)
    quantity = f"change of {as_metric(metric).name}"
    if normalised:
        lifted = start.reshape(*start.shape, *[1] * (stacked.ndim - start.ndim))
        stacked = share(stacked + lifted, start, end, pairs)
        done = "recovered" if direction == "denoising" else "lost"
        quantity = f"{as_metric(metric).name}, share {done}"
    return Result(
        f"Attribution patching of {', '.join(site.name for site in grid.sites)} ({direction})",
        quantity,
        stacked,
        (*pairs.clean.axis, *grid.axes(pairs, estimates[0])),
        grid.tokens(pairs),
        details=details,
        centre=0.0,
    )


@dataclass(frozen=True, slots=True)
class _Grid:
    """Of which parts there are estimates.

    Attributes:
        sites: the sites.
        many: whether they are an axis.
        by: the axes behind that.
        layers: the layers.
        positions: the positions that were chosen, None for all.
        given: what was chosen of heads and of neurons, likewise.
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
        free = _COUNTED if self.positions is None else ("key",)
        return [self.many + at for at, name in enumerate(self.by) if name in free]

    def check(self, pairs: Pairs) -> None:
        """Raises a `PromptError` if the prompts of a pair have no parts for each other."""
        pair = pairs.unequal
        if pair is None:
            return
        if self.positions is None or any("key" in site.axes for site in self.sites):
            raise PromptError(
                f"Positions are compared one for one, and {pairs.told(pair)}: make them equally "
                "long, or choose positions that mean the same in both, such as `positions=[-1]`.",
                here(),
            )

    def read(self, model: LanguageModel) -> list[Any]:
        """Returns the proxies of all parts, in an open invocation."""
        return [site.read(model, layer) for site, layer in self.parts]

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
            self.at_positions(one.detach(), site, of_clean)
            - self.at_positions(other.detach(), site, of_corrupted)
            for (site, _), one, other in zip(self.parts, clean, corrupted, strict=True)
        ]

    def arranged(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns sums over what is patched together, of all parts, with the axes of the result.

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
            elif name not in _COUNTED:
                size = found[0].value.shape[1 + self.sites[0].axes.index(name)]
                axes.append(Axis.of(name, chosen(name, self.given.get(name), size)))
            else:
                axes.append(self._counted(name, pairs))
        return axes

    def _counted(self, name: str, pairs: Pairs) -> Axis:
        axis = pairs.clean.positions(name)
        if self.positions is None or name == "key":
            return axis
        if len(set(pairs.clean.tokens)) == 1:
            return axis[chosen("position", self.positions, len(axis))]
        return Axis.of(name, self.positions)

    def tokens(self, pairs: Pairs) -> tuple[tuple[str, ...], ...]:
        """The tokens at the positions of the result, of each clean prompt."""
        if not set(self.by) & set(_COUNTED):
            return ()
        if self.positions is None or "key" in self.by:
            return pairs.clean.tokens
        return tuple(
            tuple(tokens[at] for at in chosen("position", self.positions, len(tokens)))
            for tokens in pairs.clean.tokens
        )


def _grid(
    model: LanguageModel,
    sites: str | Sequence[str],
    by: str | Sequence[str],
    layers: Choice,
    positions: Choice,
    heads: Choice,
    neurons: Choice,
) -> _Grid:
    """Of what there are to be estimates.

    Raises:
        OptionError: if there is no such thing.
    """
    names = [sites] if isinstance(sites, str) else list(sites)
    if not names:
        raise OptionError("`sites` is empty: name what would be patched.", here())
    found = tuple(site_of(name) for name in names)
    along = (by,) if isinstance(by, str) else tuple(by)
    for site in found:
        known = ("layer", *site.axes)
        for name in along:
            if name not in known or along.count(name) > 1:
                what = "twice" if name in known else f"no axis{nearest(name, known)}"
                raise OptionError(
                    f"`by` has {name!r}, which is {what} of {site.name!r}: it has "
                    f"{', '.join(map(repr, known))}.",
                    here(),
                )
    if "layer" not in along:
        raise OptionError(
            "`by` has no 'layer'. What patches of several layers do together is not the sum of "
            "what each does: take `activation_patching` for that.",
            here(),
        )
    given = {"head": _listed(heads), "neuron": _listed(neurons)}
    for name, choice in given.items():
        if choice is not None and not all(name in site.axes for site in found):
            raise OptionError(f"`{name}s` are chosen, and {names} do not all have them.", here())
    blocks = chosen("layer", layers, len(model.blocks))
    return _Grid(found, not isinstance(sites, str), along, blocks, _listed(positions), given)


def _listed(choice: Choice) -> list[int] | None:
    if choice is None:
        return None
    return [choice] if isinstance(choice, int) else list(choice)
