"""Attribution patching: what activation patching would find, estimated from one gradient.

A patched run is not run: what it would change is a difference of two runs times a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from insitu.methods.attribution_grid import grid_of
from insitu.methods.measured_run import Run
from insitu.methods.metrics import Metric, as_metric, differentiated
from insitu.methods.pairs import Choice, read_pairs, share
from insitu.methods.patching import Direction, check_direction
from insitu.methods.progress import progress as bar
from insitu.methods.result import Result
from insitu.methods.sites import stream_of
from insitu.models.language_model import LanguageModel


def attribution_patching(
    model: LanguageModel,
    clean: Any,
    corrupted: Any,
    metric: Metric | Callable[[Any], Any],
    *,
    sites: str | Sequence[str] | None = None,
    by: str | Sequence[str] = ("layer", "position"),
    layers: Choice = None,
    positions: Choice = None,
    heads: Choice = None,
    neurons: Choice = None,
    direction: Direction = "denoising",
    normalised: bool = True,
    progress: bool | None = None,
    max_tokens_per_pass: int | None = None,
) -> Result:
    """Returns an estimate of what `activation_patching` would find, from one backward pass.

    It is linear: the difference of the two runs at a site, times the gradient of the metric there
    in the run that would be patched. It is summed over all that would be patched together (Nanda
    2023, https://www.neelnanda.io/mechanistic-interpretability/attribution-patching; Syed et al.
    2023, https://arxiv.org/abs/2310.10348). It is good for small differences and sites such as the
    outputs of heads, and bad where a nonlinearity is saturated, as for a whole residual stream. It
    takes two forwards and one backward for each pair of prompts, which have passes of their own.

    Args:
        model: the model.
        clean: the prompt with the behaviour in question, in any form that `invoke` takes; or
            several, which may differ in length.
        corrupted: the prompt without it, or one for each. The two of a pair have the same length,
            unless positions are chosen that mean something in both, such as -1.
        metric: as of `activation_patching`; it has to be differentiable. A KL divergence has no
            gradient in the clean run.
        sites: what would be patched, by its standard name, such as "z" or "pattern"; None as of
            `activation_patching`. Several are an axis "site" of the result.
        by: along which axes it would be patched: "layer", and those of the site: "position",
            "head", "neuron", "query", "key". Other axes are patched whole.
        layers: which layers, all if None.
        positions: which positions, from the end if negative; all if None. Of scores and patterns,
            which queries.
        heads: which heads, from the end if negative; all if None. Of "k" and "v" they are those of
            the keys.
        neurons: which neurons, from the end if negative; all if None.
        direction: "denoising", the corrupted prompt with values of the clean one, or "noising",
            the clean prompt with values of the corrupted one.
        normalised: whether the change of the metric is given as a share, as by
            `activation_patching`: 0 is no change, and 1 all of the difference between the run that
            would be patched and the other. If not it is the change itself, which is a sum of parts;
            `activation_patching` then gives the metric: subtract "corrupted" (or "clean", for
            noising) of `details` from it to compare them.
        progress: whether a bar shows how far it is; None for on a terminal or in a notebook.
        max_tokens_per_pass: how many tokens, with padding, a pass may have; None for as many as fit
            into a quarter of the free memory.

    Returns:
        By how much each patch would change the metric, with the axes "prompt" and "site" (where
        several were given) and those of `by`. `details` has the metric of the prompts as they are,
        "clean" and "corrupted", `(prompt,)`.

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
    check_direction(direction)
    pairs = read_pairs(model, clean, corrupted)
    grid = grid_of(
        model, stream_of(model) if sites is None else sites, by, layers, positions, heads, neurons
    )
    grid.check(pairs)
    metric = as_metric(metric)
    ends: list[Any] = []
    estimates: list[list[Any]] = []
    with (
        bar("Attribution patching", progress),
        differentiated(metric),
        model.trace(max_tokens_per_pass=max_tokens_per_pass) as tracer,
    ):
        for pair, measure in enumerate(metric.of(model, len(pairs))):
            with tracer.invoke(pairs.clean.ids[pair]):
                reference = metric.reference(model)
                if reference is not None:
                    reference = reference.detach()
                of_clean = measure(Run(model), reference)
                clean_values = grid.read(model)
                if direction == "noising":
                    slopes = _gradients(of_clean, clean_values)
            with tracer.invoke(pairs.corrupted.ids[pair]):
                of_corrupted = measure(Run(model), reference)
                corrupted_values = grid.read(model)
                if direction == "denoising":
                    slopes = _gradients(of_corrupted, corrupted_values)
            both: Any = torch.stack([of_clean.detach(), of_corrupted.detach()])
            ends.append(both.save())
            lengths = pairs.clean.lengths[pair], pairs.corrupted.lengths[pair]
            run, sign = (lengths[1], 1) if direction == "denoising" else (lengths[0], -1)
            parts = grid.in_run(run)
            differences = parts.differences(clean_values, corrupted_values, *lengths)
            estimates.append(
                [
                    (sign * difference * parts.at_positions(slope, site, run)).save()
                    for (site, _), difference, slope in zip(
                        grid.parts, differences, slopes, strict=True
                    )
                ]
            )
    measured = torch.stack([each.value for each in ends])
    values = [grid.arranged([one.value[0] for one in of_pair]) for of_pair in estimates]
    details, start, end = pairs.ends(measured, direction == "noising")
    stacked = pairs.clean.stacked(values, *grid.ragged)
    quantity = f"change of {metric.name}"
    if normalised:
        lifted = start.reshape(*start.shape, *[1] * (stacked.ndim - start.ndim))
        stacked = share(stacked + lifted, start, end, pairs)
        done = "recovered" if direction == "denoising" else "lost"
        quantity = f"{metric.name}, share {done}"
    return Result(
        f"Attribution patching of {', '.join(site.name for site in grid.sites)} ({direction})",
        quantity,
        stacked,
        (*pairs.clean.axis, *grid.axes(pairs, estimates[0])),
        grid.tokens(pairs),
        details=details,
        centre=0.0,
    )


def _gradients(measured: Any, values: Sequence[Any]) -> Sequence[Any]:
    """The gradients of a metric at values of its run, zeros where it does not depend on them."""
    return torch.autograd.grad(measured, values, materialize_grads=True)
