"""What the model makes of a prompt without one of its parts: heads, MLPs, neurons, attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import torch

from insitu.deprecation import renamed
from insitu.display.axis import Axis
from insitu.graph.errors import OptionError, nearest
from insitu.graph.location import here
from insitu.methods.measured_run import Run, stacked_values
from insitu.methods.metrics import Metric, as_metric
from insitu.methods.progress import progress as bar
from insitu.methods.prompts import read_prompts
from insitu.methods.replacements import Method, replacement
from insitu.methods.result import Result
from insitu.methods.sites import (
    Site,
    check_positions,
    chosen,
    layers_with,
    numbers_of,
    site_of,
)
from insitu.models.language_model import LanguageModel

Part: TypeAlias = Literal["heads", "attention", "mlps", "neurons", "mixers"]
"""Which parts are ablated: see `ablate`."""

_Numbers: TypeAlias = int | Iterable[int] | None
_Place: TypeAlias = tuple[int, int | None]
"""A layer, and which of its heads or neurons, None for a part that there is one of."""

_PARTS: dict[str, tuple[str, str | None]] = {
    "heads": ("z", "head"),
    "attention": ("attention_out", None),
    "mlps": ("mlp_out", None),
    "neurons": ("post", "neuron"),
    "mixers": ("mixer_out", None),
}
"""The site of each, and the axis along which there are several in a layer."""


@renamed(what="part", mode="method", goes_in="0.3")
def ablate(
    model: LanguageModel,
    prompts: Any,
    metric: Metric | Callable[[Any], Any],
    *,
    part: Part = "heads",
    method: Method = "zero",
    reference: Any = None,
    by_position: bool = False,
    layers: _Numbers = None,
    heads: _Numbers = None,
    neurons: _Numbers = None,
    positions: _Numbers = None,
    together: Iterable[int | Sequence[int]] | None = None,
    seed: int = 0,
    progress: bool | None = None,
    max_tokens_per_pass: int | None = None,
) -> Result:
    """Returns the metric without each part of the model in turn, or without several at once.

    Mean ablation is that of Wang et al., "Interpretability in the Wild" (2022), and resampling
    that of Chan et al., "Causal Scrubbing" (2022).

    Args:
        model: the model.
        prompts: one or several, of any length.
        metric: a metric, or a function of the run to a number, such as
            `lambda run: run.logits[0, -1, 5]`: see `insitu.methods.Run`.
        part: which parts. "heads": what a head gives, before the output projection; "neurons":
            what goes into the last layer of an MLP; "attention", "mlps" and "mixers": what these
            add to the residual stream.
        method: the value that is put in the place of a part's. "zero": zeros; "mean": its mean over
            the reference prompts and their positions; "resample": its values in another reference
            prompt of the same length.
        reference: prompts to take means of or to draw from; None for `prompts` themselves.
        by_position: whether means are of each position by itself, over the reference prompts that
            have it.
        layers: in which ones, from the end if negative; None for all that have such a part.
        heads: which heads of each layer; None for all.
        neurons: which neurons of each layer; None for all, which are many.
        positions: at which positions, from the end of each prompt if negative; None for all.
        together: parts to be ablated all at once, in the place of one after another: pairs
            (layer, head) or (layer, neuron), or layers.
        seed: decides which reference prompt is drawn for each prompt.
        progress: whether a bar shows how far it is; None for on a terminal or in a notebook.
        max_tokens_per_pass: how many tokens, with padding, a pass may have; None for as many as fit
            into a quarter of the free memory.

    Returns:
        The metric with the part ablated. Its axes are (prompt), layer, and head or neuron where
        there are several in a layer; with `together`, (prompt) only. A layer's label is the number
        of its block. Details, of each prompt: "clean", the metric of the model as it is; of
        "resample" also "drawn", the number of the reference prompt that was drawn.

    Raises:
        OptionError: if there is no such part, method, layer, head, neuron or position, or an option
            has no meaning here.
        PromptError: if no reference prompt has the length or the positions that it takes.
    """
    site, unit = _site(part, heads, neurons)
    if reference is not None and method == "zero":
        raise OptionError(
            "`reference` has no part in zeros: give another `method` with it.", here()
        )
    measured, read = as_metric(metric), read_prompts(model, prompts)
    measures = measured.of(model, len(read))
    others = read if reference is None else read_prompts(model, reference)
    asked = numbers_of("position", positions)
    if asked is not None or by_position:
        check_positions(model)
    where = [None if asked is None else chosen("position", asked, n) for n in read.lengths]
    put = replacement(site, method, by_position, read, others, where, seed)
    axes: tuple[Axis, ...] = ()
    if together is None:
        axes = _axes(model, site, unit, layers, heads if unit == "head" else neurons)
        groups = [[place] for place in _places(axes)]
    elif any(given is not None for given in (layers, heads, neurons)):
        raise OptionError("`together` says which parts, so `layers` and the like do not.", here())
    else:
        groups = [_together(model, site, unit, together)]
    clean_scores, scores = [], []
    with bar("Ablation", progress), model.trace(max_tokens_per_pass=max_tokens_per_pass) as tracer:
        runs = [tracer.invoke(ids) for ids in read.ids]
        sources = dict(enumerate(runs))
        if reference is not None:
            sources = {number: tracer.invoke(others.ids[number]) for number in put.sources}
        put.read(model, sources, sorted({layer for group in groups for layer, _ in group}))
        for row, (ids, measure) in enumerate(zip(read.ids, measures, strict=True)):
            with runs[row]:
                clean = measured.reference(model)
                clean_scores.append(measure(Run(model), clean).save(to="cpu"))
            at: Any = where[row] if where[row] is not None else slice(len(ids))
            ablated = []
            for group in groups:
                with tracer.invoke(ids):
                    for layer, number in group:
                        index = {} if unit is None else {unit: number}
                        value = put.value(row, layer, at, **index)
                        site.read(model, layer)[site.index(position=at, **index)] = value
                    ablated.append(measure(Run(model), clean).save(to="cpu"))
            scores.append(ablated)
        tracer.block.demand_alike()
    clean_values = read.stacked([one.value.float() for one in clean_scores])
    values = [stacked_values(ablated) for ablated in scores]
    details = {"clean": clean_values}
    if put.drawn:
        details["drawn"] = read.stacked([torch.tensor(number) for number in put.drawn])
    return Result(
        f"{method.capitalize()} ablation of {part}",
        measured.name,
        read.stacked([value.reshape([len(axis) for axis in axes]) for value in values]),
        (*read.axis, *axes),
        tokens=read.tokens,
        details=details,
        centre=float(clean_values.flatten()[0]) if clean_values.unique().numel() == 1 else None,
    )


def _site(part: str, heads: _Numbers, neurons: _Numbers) -> tuple[Site, str | None]:
    """Where a kind of part is seen, and along which axis there are several in a layer."""
    if part not in _PARTS:
        names = ", ".join(map(repr, _PARTS))
        raise OptionError(
            f"`part` is one of {names}, not {part!r}{nearest(str(part), _PARTS)}.", here()
        )
    name, unit = _PARTS[part]
    for given, of in ((heads, "head"), (neurons, "neuron")):
        if given is not None and of != unit:
            raise OptionError(f"`{of}s` are no part of {part}: leave them out.", here())
    return site_of(name), unit


def _count(model: LanguageModel, unit: str) -> int:
    return model.n_heads if unit == "head" else model.d_mlp


def _axes(
    model: LanguageModel, site: Site, unit: str | None, layers: _Numbers, units: _Numbers
) -> tuple[Axis, ...]:
    """The axes of parts that are ablated one after another."""
    found = Axis.of("layer", layers_with(model, site, layers))
    if unit is None:
        return (found,)
    return found, Axis.of(unit, chosen(unit, units, _count(model, unit)))


def _places(axes: tuple[Axis, ...]) -> list[_Place]:
    layers, *units = axes
    numbers = list(map(int, units[0].labels)) if units else [None]
    return [(int(layer), number) for layer in layers.labels for number in numbers]


def _together(
    model: LanguageModel, site: Site, unit: str | None, given: Iterable[int | Sequence[int]]
) -> list[_Place]:
    """The parts that are ablated at once."""
    found: list[_Place] = []
    for one in given if isinstance(given, Iterable) else [given]:
        pair = tuple(one) if isinstance(one, tuple | list) else (one,)
        if len(pair) != (1 if unit is None else 2):
            form = "layers" if unit is None else f"pairs (layer, {unit})"
            raise OptionError(f"`together` consists of {form}, not of {one!r}.", here())
        (layer,) = layers_with(model, site, pair[0])
        number = None
        if unit is not None:
            (number,) = chosen(unit, pair[-1], _count(model, unit))
        found.append((layer, number))
    return found
