"""Finding circuits: which edges of a model a behaviour is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch

from insitu.graph.errors import OptionError, nearest
from insitu.graph.location import here
from insitu.methods.circuit import Circuit, Edge, heads_sharing
from insitu.methods.edge_attribution import attributed, read_equal_pairs
from insitu.methods.faithfulness import kept_of, measured
from insitu.methods.metrics import Metric, as_metric
from insitu.methods.pairs import Pairs
from insitu.methods.progress import Bar
from insitu.methods.progress import progress as bar
from insitu.methods.sites import check_count
from insitu.methods.survey import wiring_of
from insitu.methods.wiring import Wiring
from insitu.models.language_model import LanguageModel

Method = Literal["eap-ig", "eap", "acdc"]

_METHODS = ("eap-ig", "eap", "acdc")
_AT_ONCE = 32  # circuits in one experiment: each is a row in the parts where it differs


def discover_circuit(
    model: LanguageModel,
    clean: Any,
    corrupted: Any,
    metric: Metric | Callable[[Any], Any],
    *,
    method: Method = "eap-ig",
    edges: int | None = None,
    threshold: float | None = None,
    steps: int = 5,
    progress: bool | None = None,
    max_tokens_per_pass: int | None = None,
) -> Circuit:
    """Returns the edges that a behaviour is made of.

    "eap" and "eap-ig" attribute all edges (see `edge_attribution`), take those whose scores are
    largest by size, and leave out edges that are then on no way from the input to the logits.

    "acdc" (Conmy et al. 2023, https://arxiv.org/abs/2304.14997) removes edges one by one: from the
    logits back to the input, those of each receiver from the latest sender to the first. An edge is
    corrupted, and stays so if that takes the metric less than a threshold further away from what it
    is in the clean run. With `insitu.methods.kl_divergence`, which is 0 there, this is the rise of
    the divergence, as in the paper. Each edge takes a run, of the parts behind it, and several run
    at once; edges into what leads nowhere any more take none.

    Args:
        model: the model.
        clean: the prompt with the behaviour in question, in any form that `invoke` takes; or
            several, which may differ in length. Of several the mean counts.
        corrupted: the prompt without it, of the same length; or one for each.
        metric: a metric of the logits of each run. For "eap" and "eap-ig" it is differentiated, and
            a KL divergence has no gradient in the clean run: take "eap-ig".
        method: "eap-ig", "eap" or "acdc".
        edges: of "eap" and "eap-ig", how many edges are taken before those that lead nowhere are
            left out.
        threshold: of "acdc", by how much the metric may change with one edge; in the place of
            `edges`, which sizes of scores are taken.
        steps: of "eap-ig", over how many runs gradients are averaged.
        progress: whether a bar shows how far it is; None for on a terminal or in a notebook.
        max_tokens_per_pass: how many tokens, with padding, a pass may have; None for as many as fit
            into a quarter of the free memory.

    Returns:
        The circuit. A score is the estimated change of the metric if the edge is corrupted; of
        "acdc" the distance that the metric was taken by it.

    Raises:
        OptionError: if there is no such method, an option is missing or is that of another
            method, or the model's parts are not connected by one residual stream.
        PromptError: if prompts do not go together.
        ShapeError: if the metric is not a number.

    Example:
        >>> from insitu import LanguageModel
        >>> from insitu.methods import discover_circuit, logit_difference
        >>> model = LanguageModel("insitu/eiffel")
        >>> circuit = discover_circuit(
        ...     model,
        ...     "The Louvre is in the city of",
        ...     "The Kremlin is in the city of",
        ...     logit_difference(" Paris", " Moscow"),
        ...     edges=20,
        ... )
        >>> circuit.nodes[0], circuit.nodes[-1]
        ('input', 'logits')
    """
    _check(method, edges, threshold, steps)
    pairs = read_equal_pairs(model, clean, corrupted)
    metric = as_metric(metric)
    wiring = wiring_of(model, pairs.clean.ids[0])
    if method == "acdc":
        assert threshold is not None
        with bar("ACDC", progress) as shown:
            return _acdc(model, pairs, metric, wiring, threshold, shown, max_tokens_per_pass)
    with bar("Edge attribution", progress):
        taken = steps if method == "eap-ig" else 0
        result = attributed(model, pairs, metric, wiring, taken, max_tokens_per_pass)
    found = Circuit.of(result)
    if edges is not None:
        found = found.top(edges)
    else:
        assert threshold is not None
        large = tuple(edge for edge in found.edges if abs(edge.score) >= threshold)
        found = replace(found, edges=large)
    left = wiring.connected(kept_of(wiring, found))
    senders, receivers = wiring.senders, wiring.receivers
    names = {(senders[s], receivers[r]) for s, r in left.nonzero().tolist()}
    kept = tuple(edge for edge in found.edges if (edge.sender, edge.receiver) in names)
    return replace(found, edges=kept)


def _acdc(
    model: LanguageModel,
    pairs: Pairs,
    metric: Metric,
    wiring: Wiring,
    threshold: float,
    shown: Bar,
    max_tokens_per_pass: int | None,
) -> Circuit:
    """Removes edges one by one, from the logits back to the input."""
    kept = wiring.edges()
    scores: dict[tuple[int, int], float] = {}
    now = 0.0
    for receiver in shown.each(reversed(range(len(wiring.receivers))), len(wiring.receivers)):
        if receiver < len(wiring.receivers) - 1 and not _leads(wiring, kept, receiver):
            kept[:, receiver] = False
            continue
        left = kept[:, receiver].nonzero().flatten().tolist()[::-1]
        at_once = 4
        while left:
            # Most edges go. So each is tried with those before it gone, several at once, and what
            # comes behind one that stays is tried again.
            tried = left[:at_once]
            circuits: list[torch.Tensor] = []
            for sender in tried:
                without = (circuits[-1] if circuits else kept).clone()
                without[sender, receiver] = False
                circuits.append(without)
            values = measured(model, pairs, metric, wiring, circuits, max_tokens_per_pass)
            distances = (values[:, 2:] - values[:, :1]).abs().mean(0).tolist()
            gone = 0
            for sender, distance in zip(tried, distances, strict=True):
                if not distance - now < threshold:
                    scores[sender, receiver] = distance - now
                    break
                kept[sender, receiver] = False
                now = distance
                gone += 1
            all_went = gone == len(tried)
            left = left[gone if all_went else gone + 1 :]
            at_once = min(2 * at_once, _AT_ONCE) if all_went else 4
    kept = wiring.connected(kept)
    senders, receivers = wiring.senders, wiring.receivers
    found = [
        Edge(senders[s], receivers[r], scores[s, r])
        for s, r in sorted(kept.nonzero().tolist(), key=lambda place: -scores[tuple(place)])
    ]
    return Circuit(
        f"ACDC with threshold {threshold:g}",
        f"change of {metric.name} by the edge",
        tuple(found),
        heads_sharing(receivers),
    )


def _leads(wiring: Wiring, kept: torch.Tensor, receiver: int) -> bool:
    """Whether anything that is made of what a receiver reads is still read."""
    for part in wiring.parts:
        own = receiver - part.first_receiver
        if 0 <= own < len(part.receivers):
            return any(
                bool(kept[part.first_sender + sender].any())
                for group in part.groups
                if own in group.receivers
                for sender in group.senders
            )
    return False


def _check(method: str, edges: int | None, threshold: float | None, steps: int) -> None:
    """Raises an `OptionError` if options do not go together."""
    if method not in _METHODS:
        near = nearest(method, _METHODS) if isinstance(method, str) else ""
        raise OptionError(
            f"`method` is 'eap-ig', 'eap' or 'acdc', not {method!r}{near}.",
            here(),
        )
    if method == "acdc":
        if edges is not None or threshold is None:
            raise OptionError(
                "'acdc' removes edges that change the metric by less than `threshold`, such as "
                "`threshold=0.01`; how many are left is not chosen.",
                here(),
            )
    elif (edges is None) == (threshold is None):
        raise OptionError(
            f"{method!r} takes `edges`, how many are taken, or `threshold`, from which score on.",
            here(),
        )
    if edges is not None:
        check_count("edges", edges)
    if method == "eap-ig":
        check_count("steps", steps)
