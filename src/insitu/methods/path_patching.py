"""Path patching: what one component does to another directly, past all that stands between them.

Of each sender two runs are recorded: in one it reaches the receivers and everything else is
frozen, in the other the receivers get what reached them there, and the model goes on by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from insitu.display.axis import Axis
from insitu.graph.errors import OptionError, PromptError
from insitu.graph.location import here
from insitu.methods.grid import Choice
from insitu.methods.measured_run import Run, stacked_values
from insitu.methods.metrics import Metric, as_metric
from insitu.methods.pairs import read_pairs, share
from insitu.methods.patching import Direction, check_direction
from insitu.methods.paths import Paths, Receiver, Sender, receivers_of
from insitu.methods.progress import progress as bar
from insitu.methods.result import Result
from insitu.methods.sites import Site, check_positions, chosen, layers_with, numbers_of
from insitu.models.language_model import LanguageModel


def path_patching(
    model: LanguageModel,
    clean: Any,
    corrupted: Any,
    metric: Metric | Callable[[Any], Any],
    *,
    senders: Literal["heads", "mlps"] = "heads",
    receivers: Literal["logits"] | Receiver | Sequence[Receiver] = "logits",
    layers: Choice = None,
    heads: Choice = None,
    positions: Choice = None,
    through_mlps: bool = False,
    direction: Direction = "noising",
    normalised: bool = True,
    progress: bool | None = None,
    max_tokens_per_pass: int | None = None,
) -> Result:
    """Returns what becomes of a metric if receivers hear of one sender from another run.

    Goldowsky-Dill et al. (2023), "Localizing Model Behavior with Path Patching"; Wang et al.
    (2023), "Interpretability in the Wild". Noising runs the clean prompt. In it a sender gets its
    value of the corrupted one. All other parts that add to the residual stream (heads, MLPs,
    state-space layers) keep those of the clean one. So the inputs of the receivers change by what
    comes straight from the sender. Only these are then put into a run of the clean prompt.

    Args:
        model: the model.
        clean: the prompt with the behaviour in question, in any form that `invoke` takes; or
            several, which may differ in length.
        corrupted: the prompt without it, or one for each, of the same length.
        metric: a metric of the logits: see `insitu.methods.activation_patching`.
        senders: "heads" for what each head gives, at the axes "layer" and "head", or "mlps", at the
            axis "layer". Each is sent by itself.
        receivers: "logits" for what goes into the final norm, or one or several inputs of later
            components, which are all patched together. `("q", 9, 6)` is the queries of head 6 in
            layer 9; "k" and "v" are alike (by the key's head), `("head", 9, 6)` is all three, and
            `("mlp", 10)` an MLP. Negative numbers count from the end.
        layers: the layers of senders, all that have some if None.
        heads: which heads send, all if None.
        positions: at which positions senders get their other value, all if None.
        through_mlps: whether MLPs between are computed anew, so that what they make of a sender
            belongs to the direct path, as of Wang et al. If not they are frozen too, as of
            Goldowsky-Dill et al.
        direction: "noising", or "denoising": the corrupted prompt with values of the clean one, as
            of `activation_patching`. Path patching is defined as noising in both papers, so that
            is the default here, and denoising is that of the other patching methods.
        normalised: whether the metric is given as a share: 0 is that of the prompt that is run, and
            1 that of the other, whose values are put in.
        progress: whether a bar shows how far it is; None for on a terminal or in a notebook.
        max_tokens_per_pass: how many tokens, with padding, a pass may have; None for as many as fit
            into a quarter of the free memory.

    Returns:
        The metric for each sender, with the axes "prompt" (if several were given), "layer" and
        "head". Of senders with no way to a receiver it is that of the prompt that is run.
        `details` has the metric of the prompts as they are, "clean" and "corrupted", `(prompt,)`.

    Raises:
        OptionError: if there is no such sender, receiver or direction, what the blocks add to the
            residual stream is not known, or shares are wanted where the metric is the same of both
            prompts.
        PromptError: if prompts do not go together.
        ShapeError: if the metric is not a number.

    Example:
        >>> from insitu import LanguageModel
        >>> from insitu.methods import logit_difference, path_patching
        >>> model = LanguageModel("insitu/eiffel")
        >>> path_patching(
        ...     model,
        ...     "The Louvre is in the city of",
        ...     "The Kremlin is in the city of",
        ...     logit_difference(" Paris", " Moscow"),
        ...     receivers=("mlp", 5),
        ... ).sizes
        {'layer': 6, 'head': 8}
    """
    check_direction(direction)
    pairs = read_pairs(model, clean, corrupted)
    unequal = pairs.unequal
    if unequal is not None:
        raise PromptError(
            f"Paths are patched between prompts of one length, and {pairs.told(unequal)}.", here()
        )
    if senders not in ("heads", "mlps"):
        raise OptionError(f"`senders` is 'heads' or 'mlps', not {senders!r}.", here())
    if senders == "mlps" and heads is not None:
        raise OptionError("`heads` are chosen, and MLPs are the senders.", here())
    paths = Paths(senders == "heads", receivers_of(model, receivers), through_mlps)
    blocks = layers_with(model, paths.sent, layers)
    numbers = chosen("head", heads, model.n_heads) if paths.of_heads else [0]
    asked = numbers_of("position", positions)
    if asked is not None:
        check_positions(model)
    metric = as_metric(metric)
    run, other = pairs.corrupted, pairs.clean
    if direction == "noising":
        run, other = other, run
    ends: list[Any] = []
    found: list[Any] = []
    with (
        bar("Path patching", progress),
        model.trace(max_tokens_per_pass=max_tokens_per_pass) as tracer,
    ):
        for at, measure in enumerate(metric.of(model, len(pairs))):
            values: dict[bool, Mapping[tuple[Site, int], Any]] = {}
            with tracer.invoke(pairs.clean.ids[at]):
                reference = metric.reference(model)
                values[direction == "noising"] = paths.read(model)
                start = measure(Run(model), reference).save()
            with tracer.invoke(pairs.corrupted.ids[at]):
                values[direction != "noising"] = paths.read(model)
                end = measure(Run(model), reference).save()
            ends.extend((start, end))
            own = start if direction == "noising" else end
            places = None if asked is None else chosen("position", asked, run.lengths[at])
            for layer in blocks:
                for head in numbers:
                    if not paths.reach(layer):
                        found.append(own)
                        continue
                    sender = Sender(paths.sent, layer, head, places)
                    with tracer.invoke(run.ids[at]):
                        heard = paths.send(model, sender, values[True], values[False])
                        if not paths.receivers:
                            found.append(measure(Run(model), reference).save())
                    if paths.receivers:
                        with tracer.invoke(run.ids[at]):
                            found.append(paths.hear(model, heard, measure, reference).save())
    measured = stacked_values(ends).reshape(-1, 2)
    shape = [len(pairs), len(blocks), *([len(numbers)] if paths.of_heads else [])]
    stacked = stacked_values(found).reshape(shape)
    if not pairs.clean.many:
        measured, stacked = measured[0], stacked[0]
    details = {"clean": measured[..., 0], "corrupted": measured[..., 1]}
    start, end = details["clean"], details["corrupted"]
    if direction == "denoising":
        start, end = end, start
    quantity, centre = metric.name, None if pairs.clean.many else float(start)
    if normalised:
        stacked, centre = share(stacked, start, end, pairs), 0.0
        quantity = f"{metric.name}, share {'recovered' if direction == 'denoising' else 'lost'}"
    axes = [Axis.of("layer", blocks)]
    if paths.of_heads:
        axes.append(Axis.of("head", numbers))
    return Result(
        f"Path patching from {senders} to {paths.told} ({direction})",
        quantity,
        stacked,
        (*pairs.clean.axis, *axes),
        details=details,
        centre=centre,
    )
