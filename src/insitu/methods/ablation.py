"""What the model makes of a prompt without one of its parts: heads, MLPs, neurons, attention."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from insitu.display.axis import Axis
from insitu.graph.errors import OptionError, PromptError, nearest
from insitu.graph.location import here
from insitu.methods.metrics import Metric, as_metric
from insitu.methods.prompts import Prompts, read_prompts
from insitu.methods.result import Result
from insitu.methods.sites import Site, chosen, layers_with, site_of
from insitu.models.language_model import LanguageModel

Part: TypeAlias = Literal["heads", "attention", "mlps", "neurons", "mixers"]
Mode: TypeAlias = Literal["zero", "mean", "resample"]

_PARTS = {
    "heads": ("z", "head"),
    "attention": ("attention_out", None),
    "mlps": ("mlp_out", None),
    "neurons": ("post", "neuron"),
    "mixers": ("mixer_out", None),
}
"""Where each part can be seen, and the axis along which there are several in a layer."""


@dataclass(frozen=True, slots=True)
class _Component:
    """A part of the model: a layer's, or one of several in it."""

    layer: int
    unit: int | None = None


def ablate(
    model: LanguageModel,
    prompts: Any,
    metric: Metric | Callable[[Any], Any],
    *,
    what: Part = "heads",
    mode: Mode = "zero",
    reference: Any = None,
    by_position: bool = False,
    layers: int | Iterable[int] | None = None,
    heads: int | Iterable[int] | None = None,
    neurons: int | Iterable[int] | None = None,
    positions: int | Iterable[int] | None = None,
    together: Iterable[int | tuple[int, int]] | None = None,
    seed: int = 0,
) -> Result:
    """Returns the metric without each part of the model in turn, or without several at once.

    All runs are invocations of one trace, so that they share what comes before the ablated part.

    Args:
        model: the model.
        prompts: one or several, of any length.
        metric: what is measured: a metric, or a function from logits `(position, vocabulary)` to
            a number.
        what: which parts. "heads": what a head gives, before the output projection; "neurons":
            what goes into the last layer of an MLP; "attention", "mlps" and "mixers": what these
            add to the residual stream.
        mode: what is put in the place of a part's value. "zero": zeros; "mean": its mean over the
            reference prompts and their positions; "resample": its value in another reference
            prompt of the same length.
        reference: prompts to take means of or to draw from; None for `prompts` themselves.
        by_position: whether means are of each position by itself. Reference prompts must then have
            all positions that are ablated.
        layers: in which ones, from the end if negative; None for all that have such a part.
        heads: which heads of each layer; None for all.
        neurons: which neurons of each layer; None for all, which are many.
        positions: at which positions, from the end of each prompt if negative; None for all.
        together: parts to be ablated all at once, in the place of one after another: pairs
            (layer, head) or (layer, neuron), or layers.
        seed: of which reference prompt is drawn for each prompt.

    Returns:
        The metric with the part ablated. Its axes are (prompt), layer and head or neuron if there
        are several in a layer; with `together`, (prompt) only. A layer's label is the number of
        its block. Details: "clean", the metric of the model as it is; of "resample", "drawn", the
        number of the reference prompt that was drawn.

    Raises:
        OptionError: if there is no such part, mode, layer, head, neuron or position, or an option
            that has no meaning here.
        PromptError: if no reference prompt has the length or the positions that it takes.
    """
    site, unit = _site(what)
    _check(mode, reference, by_position, unit, heads, neurons)
    measured, read = as_metric(metric), read_prompts(model, prompts)
    numbers, units, groups = _groups(model, site, unit, layers, heads or neurons, together)
    others = read if reference is None else read_prompts(model, reference)
    sources = _Sources(site, mode, by_position, read, others)
    drawn = sources.draw(seed)
    where = [None if positions is None else chosen("position", positions, n) for n in read.lengths]
    sources.check(where)
    measures = measured.of(model, len(read))
    used = sorted({component.layer for group in groups for component in group})
    clean_scores, scores = [], []
    with model.trace() as tracer:
        invocations = [tracer.invoke(ids) for ids in read.ids]
        references = invocations if reference is None else []
        if reference is not None and mode != "zero":
            references = [tracer.invoke(ids) for ids in others.ids]
        values = sources.read(model, references, used)
        for row, (ids, measure) in enumerate(zip(read.ids, measures, strict=True)):
            with invocations[row]:
                clean = model.logits[0]
                clean_scores.append(measure(clean, clean).save(to="cpu"))
            of_prompt = []
            for group in groups:
                with tracer.invoke(ids):
                    for component in group:
                        at = _index(site, unit, component, where[row])
                        value = values(row, component.layer, at)
                        site.read(model, component.layer)[at] = value
                    of_prompt.append(measure(model.logits[0], clean).save(to="cpu"))
            scores.append(of_prompt)
    return _result(...)
