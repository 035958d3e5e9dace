"""Edge attribution patching: how much each edge between two parts of a model matters.

Each edge carries what one part adds to the residual stream to another part that reads it. What
replacing it would change is estimated from gradients: no edge is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from insitu.display.axis import Axis
from insitu.graph.errors import PromptError
from insitu.graph.location import here
from insitu.methods.measured_run import Run
from insitu.methods.metrics import Metric, as_metric, differentiated
from insitu.methods.pairs import Pairs, read_pairs
from insitu.methods.progress import progress as bar
from insitu.methods.reading_layers import ReadingLayers
from insitu.methods.reading_trial import reading_layers_of
from insitu.methods.result import Result
from insitu.methods.sites import Site, check_count, site_of
from insitu.methods.survey import wiring_of
from insitu.methods.wiring import Part, Wiring
from insitu.models.language_model import LanguageModel


def edge_attribution(
    model: LanguageModel,
    clean: Any,
    corrupted: Any,
    metric: Metric | Callable[[Any], Any],
    *,
    steps: int = 0,
    progress: bool | None = None,
    max_tokens_per_pass: int | None = None,
) -> Result:
    """Returns for each edge by how much it would change a metric to corrupt it, estimated.

    The estimate is linear. It is the difference of what the sender adds in the corrupted run and in
    the clean one, times the gradient of the metric at what the receiver reads, summed over
    positions. Without steps the gradient is that of the clean run (edge attribution patching, Syed
    et al. 2023, https://arxiv.org/abs/2310.10348). With steps it is the mean of gradients of runs
    whose embeddings lie between the corrupted and the clean ones. The k-th of m is k/m of the way
    from the corrupted to the clean (EAP-IG, Hanna et al. 2024, https://arxiv.org/abs/2403.17806).

    Senders are "input" (the embeddings), "a3.h5" (head 5 of layer 3) and "m3" (its MLP). Receivers
    are "a3.q5", "a3.k5" and "a3.v5" (queries, keys and values of a head), "m3" and "logits". Where
    heads share keys, those of the keys are counted. Where heads do not add up to what attention
    adds, as with a norm behind it, "a3" is one sender. Where attention reads the stream in other
    ways too, as with a gate, it is one receiver. A state-space layer is "s3".

    It takes two forwards and a backward for each pair of prompts; with steps, two forwards, and one
    more and a backward for each step. Pairs run together: 16 of them with five steps are one
    forward of 16 * (2 + 5) rows. Each call first runs three rows of eight tokens, to see what the
    parts are, and tries on eight tokens, with a backward for each part, whether parts can be taken
    apart into their receivers. Where one cannot, each receiver takes a backward through the part,
    and the log says so.

    Args:
        model: the model.
        clean: the prompt with the behaviour in question, in any form that `invoke` takes; or
            several, which may differ in length.
        corrupted: the prompt without it, of the same length; or one for each.
        metric: a metric of the logits that can be differentiated. A KL divergence has no gradient
            in the clean run: give it steps.
        steps: how many, 0 for the gradient of the clean run alone. Five are mostly enough.
        progress: whether a bar shows how far it is; None for on a terminal or in a notebook.
        max_tokens_per_pass: how many tokens, with padding, a pass may have; None for as many as fit
            into a quarter of the free memory.

    Returns:
        The estimated change of the metric, with the axes "prompt" (if several were given), "sender"
        and "receiver". It is NaN where there is no edge. `details` has the metric of the prompts as
        they are, "clean" and "corrupted", `(prompt,)`.

    Raises:
        OptionError: if the model's parts are not connected by one residual stream, or `steps` is
            negative.
        PromptError: if prompts do not go together.
        ShapeError: if the metric is not a number.

    Example:
        >>> from insitu import LanguageModel
        >>> from insitu.methods import edge_attribution, logit_difference
        >>> model = LanguageModel("insitu/eiffel")
        >>> edge_attribution(
        ...     model,
        ...     "The Louvre is in the city of",
        ...     "The Kremlin is in the city of",
        ...     logit_difference(" Paris", " Moscow"),
        ... ).sizes
        {'sender': 55, 'receiver': 151}
    """
    pairs = read_equal_pairs(model, clean, corrupted)
    wiring = wiring_of(model, pairs.clean.ids[0])
    with bar("Edge attribution", progress):
        return attributed(model, pairs, metric, wiring, steps, max_tokens_per_pass)


def read_equal_pairs(model: LanguageModel, clean: Any, corrupted: Any) -> Pairs:
    """Returns prompts in pairs, the two of each of the same length.

    Args:
        model: the model.
        clean: a prompt, or several.
        corrupted: one for each of these.

    Raises:
        PromptError: if they do not go together.
    """
    pairs = read_pairs(model, clean, corrupted)
    unequal = pairs.unequal
    if unequal is not None:
        raise PromptError(
            f"Edges carry values from position to position, and {pairs.told(unequal)}: make them "
            "equally long.",
            here(),
        )
    return pairs


def attributed(
    model: LanguageModel,
    pairs: Pairs,
    metric: Metric | Callable[[Any], Any],
    wiring: Wiring,
    steps: int,
    max_tokens_per_pass: int | None,
) -> Result:
    """Returns what `edge_attribution` does, of a model whose wiring is known.

    Args:
        model: the model.
        pairs: the prompts.
        metric: as of `edge_attribution`.
        wiring: the model's.
        steps: as of `edge_attribution`.
        max_tokens_per_pass: as of `edge_attribution`.
    """
    check_count("steps", steps, least=0)
    metric = as_metric(metric)
    reading = reading_layers_of(model, wiring, pairs.clean.ids[0])
    ends: list[Any] = []
    found: list[list[list[Any]]] = []
    with (
        differentiated(metric),
        model.trace(max_tokens_per_pass=max_tokens_per_pass) as tracer,
    ):
        for pair, measure in enumerate(metric.of(model, len(pairs))):
            slopes: list[_Slopes] = []
            with tracer.invoke(pairs.clean.ids[pair]):
                reference = metric.reference(model)
                reference = None if reference is None else reference.detach()
                clean_sent = _sending(model, wiring, reading)
                end = measure(Run(model), reference)
                ends.append(end.detach().float().save())
                if not steps:
                    slopes.append(_slopes(model, wiring, reading, end))
            with tracer.invoke(pairs.corrupted.ids[pair]):
                corrupted_sent = _sending(model, wiring, reading)
                ends.append(measure(Run(model), reference).detach().float().save())
            for step in range(steps):
                with tracer.invoke(pairs.clean.ids[pair]):
                    first, last = corrupted_sent[0], clean_sent[0]
                    start = first.float() + (last.float() - first.float()) * ((step + 1) / steps)
                    site_of("residual_in").write(model, 0, start.type_as(last))
                    end = measure(Run(model), reference)
                    slopes.append(_slopes(model, wiring, reading, end))
            changes = _changes(wiring, reading, clean_sent, corrupted_sent)
            found.append([_scores(wiring, changes, own) for own in slopes])
    values = [_arranged(wiring, runs) for runs in found]
    measured = torch.stack([end.value for end in ends]).reshape(-1, 2).cpu()
    measured = measured if pairs.clean.many else measured[0]
    return Result(
        f"Edge attribution{f' with {steps} integrated gradients' if steps else ''}",
        f"change of {metric.name}",
        torch.stack(values) if pairs.clean.many else values[0],
        (
            *pairs.clean.axis,
            Axis.of("sender", wiring.senders),
            Axis.of("receiver", wiring.receivers),
        ),
        details={"clean": measured[..., 0], "corrupted": measured[..., 1]},
        centre=0.0,
    )


_Slopes = list[Any]
"""The gradient of a metric at what each receiver of a part reads, `(receiver, position, d_model)`,
for each part."""


def _sending(
    model: LanguageModel, wiring: Wiring, reading: Sequence[ReadingLayers | None]
) -> list[Any]:
    """The values that the residual stream is linear in: the input, and of each part that sends."""
    found = [site_of("residual_in").read(model, 0).detach()]
    for part, layers in zip(wiring.parts, reading, strict=True):
        if part.senders:
            own = part.added(model)[0] if layers is None else layers.sending(model, part)
            found.append(own.detach())
    return found


def _changes(
    wiring: Wiring, reading: Sequence[ReadingLayers | None], clean: list[Any], corrupted: list[Any]
) -> Any:
    """By how much the added values differ in the corrupted run, `(sender, position, d_model)`."""
    first, *others = [
        other.float() - one.float() for one, other in zip(clean, corrupted, strict=True)
    ]
    senders = (layers for part, layers in zip(wiring.parts, reading, strict=True) if part.senders)
    pairs = zip(others, senders, strict=True)
    return torch.cat(
        [first, *(own if layers is None else layers.sent(own) for own, layers in pairs)]
    )


def _slopes(
    model: LanguageModel, wiring: Wiring, reading: Sequence[ReadingLayers | None], measured: Any
) -> _Slopes:
    """The gradients of the measured number in an open invocation, at the values receivers read."""
    streams = [part.reads.read(model, part.layer) for part in wiring.parts]
    made: list[list[Any]] = []
    for part, stream, layers in zip(wiring.parts, streams, reading, strict=True):
        if not part.senders:
            made.append([stream])
        elif layers is not None:
            made.append(layers.made(model))
        else:
            made.append([site.read(model, part.layer) for site in _sites(part)])
    again = any(
        part.senders and layers is None for part, layers in zip(wiring.parts, reading, strict=True)
    )
    flat = [value for of_part in made for value in of_part]
    left = iter(measured.backward(retain_graph=again, inputs=flat))
    found: _Slopes = []
    for part, stream, layers, values in zip(wiring.parts, streams, reading, made, strict=True):
        slopes = [next(left).detach() for _ in values]
        if not part.senders:
            found.append(slopes[0].float())
        elif layers is not None:
            found.append(layers.back(stream, slopes).float())
        else:
            found.append(_by_autograd(part, stream, values, slopes).float())
    return found


def _sites(part: Part) -> list[Site]:
    return [*dict.fromkeys(r.site for r in part.receivers if r.site is not None)]


def _by_autograd(part: Part, stream: Any, values: Sequence[Any], slopes: Sequence[Any]) -> Any:
    """Gradients at the stream, each by a backward pass from what one receiver makes of it."""
    of_site = dict(zip(_sites(part), zip(values, slopes, strict=True), strict=True))
    gradients: list[Any] = []
    for receiver in part.receivers:
        assert receiver.site is not None
        value, weight = of_site[receiver.site]
        if receiver.head is not None:
            value, weight = value[:, receiver.head], weight[:, receiver.head]
        product = (value * weight).sum()
        gradients += product.backward(retain_graph=True, inputs=[stream])
    return torch.cat(gradients)


def _scores(wiring: Wiring, changes: Any, slopes: _Slopes) -> list[Any]:
    """The scores of the edges to each part, `(sender, receiver)`."""
    flat = changes.flatten(1)  # `einsum` copies, and takes several times as long
    return [
        (flat[: part.upstream] @ whole.flatten(1).mT).save()
        for part, whole in zip(wiring.parts, slopes, strict=True)
    ]


def _arranged(wiring: Wiring, runs: list[list[Any]]) -> torch.Tensor:
    """The mean scores of some runs as one matrix, NaN where there is no edge."""
    whole = torch.full((len(wiring.senders), len(wiring.receivers)), float("nan"))
    for at, part in enumerate(wiring.parts):
        scores = torch.stack([run[at].value for run in runs]).mean(0).cpu()
        whole[: part.upstream, _columns(part)] = scores
    return whole


def _columns(part: Part) -> slice:
    return slice(part.first_receiver, part.first_receiver + len(part.receivers))
