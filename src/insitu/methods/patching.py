"""Activation patching: parts of one run put into another, to see which of them matter.

Every patched run is an invocation of one trace. What they share is the planner's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from insitu.graph.errors import OptionError, nearest
from insitu.graph.location import here
from insitu.methods.grid import Patch, grid_of
from insitu.methods.measured_run import Run, stacked_values
from insitu.methods.metrics import Measure, Metric, as_metric
from insitu.methods.pairs import Choice, read_pairs, share
from insitu.methods.progress import progress as bar
from insitu.methods.result import Result
from insitu.methods.sites import Site, stream_of
from insitu.models.language_model import LanguageModel

Direction = Literal["denoising", "noising"]


def activation_patching(
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
    """Returns what becomes of a metric if parts of one run are put into another.

    Denoising (causal tracing with a second prompt in the place of noise, Vig et al. 2020; Meng et
    al. 2022; Wang et al. 2023) runs the corrupted prompt with values of the clean one: what
    restores the metric by itself is sufficient for it. Noising runs the clean prompt with values
    of the corrupted one: what breaks it is necessary (Heimersheim and Nanda 2024).

    Args:
        model: the model.
        clean: the prompt with the behaviour in question, in any form that `invoke` takes; or
            several, which may differ in length.
        corrupted: the prompt without it, or one for each. The two of a pair have the same length,
            unless positions are chosen that mean something in both, such as -1.
        metric: a metric of each run: see `insitu.methods.logit_difference` and those beside it; or
            any function of the run to a number, such as
            `lambda run: run.output.last_hidden_state[0, 0] @ direction`: see `insitu.methods.Run`.
        sites: the value that is patched, by its standard name, such as "attention_out", "mlp_out",
            "z", "q" or "pattern"; None for "residual_out", or "block_out" of blocks that normalise
            the sum. Several are an axis "site" of the result.
        by: along which axes it is patched, each index in a run of its own: "layer", and those of
            the site: "position", "head", "neuron", "query", "key". Other axes are patched whole.
        layers: which layers, all if None.
        positions: which positions, from the end if negative; all if None. Of scores and patterns,
            which queries.
        heads: which heads, from the end if negative; all if None. Of "k" and "v" they are those of
            the keys.
        neurons: which neurons, from the end if negative; all if None.
        direction: "denoising" or "noising".
        normalised: whether the metric is given as a share: 0 is that of the prompt that is run, so
            that nothing has changed, and 1 that of the other, whose values are put in.
        progress: whether a bar shows how far it is; None for on a terminal or in a notebook.
        max_tokens_per_pass: how many tokens, with padding, a pass may have; None for as many as fit
            into a quarter of the free memory.

    Returns:
        The metric of each run, with the axes "prompt" and "site" (where several were given) and
        those of `by`. `details` has the metric of the prompts as they are, "clean" and "corrupted",
        `(prompt,)`.

    Raises:
        OptionError: if there is no such site, axis, layer, head or direction, or if shares are
            wanted where the metric is the same of both prompts.
        PromptError: if prompts do not go together.
        ShapeError: if the metric is not a number.

    Example:
        >>> from insitu import LanguageModel
        >>> from insitu.methods import activation_patching, logit_difference
        >>> model = LanguageModel("insitu/eiffel")
        >>> activation_patching(
        ...     model,
        ...     "The Louvre is in the city of",
        ...     "The Kremlin is in the city of",
        ...     logit_difference(" Paris", " Moscow"),
        ... ).sizes
        {'layer': 6, 'position': 7}
    """
    check_direction(direction)
    pairs = read_pairs(model, clean, corrupted)
    grid = grid_of(
        model, stream_of(model) if sites is None else sites, by, layers, positions, heads, neurons
    )
    grid.check(pairs)
    metric = as_metric(metric)
    run, other = pairs.corrupted, pairs.clean
    if direction == "noising":
        run, other = other, run
    found: list[tuple[list[Any], list[int]]] = []
    ends: list[Any] = []
    # Each score is saved by itself: then the sweep can be cut where others wait for their turn.
    with (
        bar("Activation patching", progress),
        model.trace(max_tokens_per_pass=max_tokens_per_pass) as tracer,
    ):
        for at, measure in enumerate(metric.of(model, len(pairs))):
            with tracer.invoke(pairs.clean.ids[at]):
                reference = metric.reference(model)
                donors = grid.read(model) if direction == "denoising" else {}
                ends.append(measure(Run(model), reference).save())
            with tracer.invoke(pairs.corrupted.ids[at]):
                donors = donors or grid.read(model)
                ends.append(measure(Run(model), reference).save())
            sizes = grid.sizes(model, donors)
            lengths = run.lengths[at], other.lengths[at]
            scores: list[Any] = []
            for patches in grid.runs(sizes, *lengths):
                with tracer.invoke(run.ids[at]):
                    scores.append(_patched(model, patches, donors, measure, reference).save())
            found.append((scores, grid.shape(sizes, lengths[0])))
        tracer.block.demand_alike()
    values = [stacked_values(scores).reshape(shape) for scores, shape in found]
    stacked = pairs.clean.stacked(values, *grid.ragged)
    details, start, end = pairs.ends(stacked_values(ends).reshape(-1, 2), direction == "noising")
    quantity, centre = metric.name, None if pairs.clean.many else float(start)
    if normalised:
        stacked, centre = share(stacked, start, end, pairs), 0.0
        quantity = f"{metric.name}, share {'recovered' if direction == 'denoising' else 'lost'}"
    return Result(
        f"Activation patching of {', '.join(site.name for site in grid.sites)} ({direction})",
        quantity,
        stacked,
        (*pairs.clean.axis, *grid.axes(pairs, sizes)),
        grid.tokens(pairs),
        details=details,
        centre=centre,
    )


def _patched(
    model: LanguageModel,
    patches: Sequence[Patch],
    donors: Mapping[tuple[Site, int], Any],
    measure: Measure,
    reference: Any,
) -> Any:
    """The metric of a run with parts of another."""
    for patch in patches:
        donor = donors[patch.site, patch.layer]
        for into, out_of in patch.parts():
            patch.site.read(model, patch.layer)[into] = donor[out_of]
    return measure(Run(model), reference)


def check_direction(direction: object) -> None:
    """Raises an `OptionError` if something is no direction."""
    known = ("denoising", "noising")
    if direction not in known:
        near = nearest(direction, known) if isinstance(direction, str) else ""
        raise OptionError(
            f"`direction` is 'denoising' or 'noising', not {direction!r}{near}.", here()
        )
