"""How far a circuit does by itself what the whole model does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from insitu.display.axis import Axis
from insitu.graph.errors import OptionError, nearest
from insitu.graph.location import here
from insitu.methods.circuit import Circuit
from insitu.methods.circuit_runs import plain, with_edges
from insitu.methods.edge_attribution import read_equal_pairs
from insitu.methods.measured_run import Run
from insitu.methods.metrics import Metric, as_metric
from insitu.methods.pairs import Pairs
from insitu.methods.progress import progress as bar
from insitu.methods.result import Result
from insitu.methods.sites import numbers_of
from insitu.methods.survey import wiring_of
from insitu.methods.wiring import Wiring
from insitu.models.language_model import LanguageModel


def run_circuit(
    model: LanguageModel,
    clean: Any,
    corrupted: Any,
    metric: Metric | Callable[[Any], Any],
    circuit: Circuit,
    *,
    progress: bool | None = None,
    max_tokens_per_pass: int | None = None,
) -> Result:
    """Returns a metric of a model with a circuit alone, and of its complement.

    Edges that are left out carry what their sender adds in the corrupted run, and the others what
    it adds in this one: what each part reads is put together from both. In the complement the
    circuit's edges are left out, and all others are in (Wang et al. 2023,
    https://arxiv.org/abs/2211.00593; Hanna et al. 2024, https://arxiv.org/abs/2403.17806).

    Args:
        model: the model.
        clean: the prompt with the behaviour in question, in any form that `invoke` takes; or
            several, which may differ in length.
        corrupted: the prompt without it, of the same length; or one for each.
        metric: a metric of the logits of each run: see `insitu.methods.logit_difference` and those
            beside it; or a function of `run.logits`, `(1, position, vocabulary)`.
        circuit: the circuit.
        progress: whether a bar shows how far it is; None for on a terminal or in a notebook.
        max_tokens_per_pass: how many tokens, with padding, a pass may have; None for as many as fit
            into a quarter of the free memory. The circuits of one pair of prompts share their
            passes in any case.

    Returns:
        The metric of each run, with the axes "prompt" (if several were given) and "run": "clean",
        "corrupted", "circuit" and "complement". `details` has, `(prompt,)`: "faithfulness", how
        much of the way from corrupted to clean the circuit makes, and "completeness", how much of
        the way from clean to corrupted the complement makes. Both are 1 at their best, and NaN
        where the metric is the same of both prompts.

    Raises:
        OptionError: if the model has no such edges, or is not connected by one residual stream.
        PromptError: if prompts do not go together.
        ShapeError: if the metric is not a number.

    Example:
        >>> from insitu import LanguageModel
        >>> from insitu.methods import discover_circuit, logit_difference, run_circuit
        >>> model = LanguageModel("insitu/eiffel")
        >>> prompts = ("The Louvre is in the city of", "The Kremlin is in the city of")
        >>> metric = logit_difference(" Paris", " Moscow")
        >>> circuit = discover_circuit(model, *prompts, metric, method="eap-ig", edges=100)
        >>> run_circuit(model, *prompts, metric, circuit).details["faithfulness"].item() > 0.8
        True
    """
    _check_circuit(circuit)
    pairs = read_equal_pairs(model, clean, corrupted)
    metric = as_metric(metric)
    wiring = wiring_of(model, pairs.clean.ids[0])
    kept = kept_of(wiring, circuit)
    circuits = [kept, wiring.edges() & ~kept]
    with bar("Running a circuit", progress):
        values = measured(model, pairs, metric, wiring, circuits, max_tokens_per_pass)
    of_clean, of_corrupted, of_circuit, of_complement = values.unbind(-1)
    way = of_clean - of_corrupted
    details = {
        "faithfulness": torch.where(way == 0, torch.nan, (of_circuit - of_corrupted) / way),
        "completeness": torch.where(way == 0, torch.nan, (of_clean - of_complement) / way),
    }
    values = values if pairs.clean.many else values[0]
    if not pairs.clean.many:
        details = {name: value[0] for name, value in details.items()}
    runs = Axis("run", ("clean", "corrupted", "circuit", "complement"))
    return Result(
        f"Circuit of {len(circuit)} edges",
        metric.name,
        values,
        (*pairs.clean.axis, runs),
        details=details,
    )


def faithfulness_curve(
    model: LanguageModel,
    clean: Any,
    corrupted: Any,
    metric: Metric | Callable[[Any], Any],
    circuit: Circuit,
    *,
    sizes: Iterable[int] | None = None,
    progress: bool | None = None,
    max_tokens_per_pass: int | None = None,
) -> Result:
    """Returns how faithful circuits of different sizes are, each of the edges that matter most.

    Args:
        model: as of `run_circuit`.
        clean: as of `run_circuit`.
        corrupted: as of `run_circuit`.
        metric: as of `run_circuit`.
        circuit: the edges with their scores, such as `Circuit.of(edge_attribution(...))`.
        sizes: how many edges; about ten numbers up to all, each twice the one before, if None.
        progress: whether a bar shows how far it is; None for on a terminal or in a notebook.
        max_tokens_per_pass: how many tokens, with padding, a pass may have; None for as many as fit
            into a quarter of the free memory. The circuits of one pair of prompts share their
            passes in any case.

    Returns:
        The share of the way from corrupted to clean that each circuit makes, with the axes "prompt"
        (if several were given) and "edges". `details` has the metric itself, "metric", with the
        same axes, and "clean" and "corrupted", `(prompt,)`.

    Raises:
        OptionError: as of `run_circuit`, and if the metric is the same of both prompts.
        PromptError: if prompts do not go together.
        ShapeError: if the metric is not a number.
    """
    shared = model, clean, corrupted, metric, circuit, sizes
    runs = _sized(*shared, progress, max_tokens_per_pass, complement=False)
    return runs.curve("Faithfulness by size", "recovered", runs.of_corrupted, runs.of_clean)


def completeness_curve(
    model: LanguageModel,
    clean: Any,
    corrupted: Any,
    metric: Metric | Callable[[Any], Any],
    circuit: Circuit,
    *,
    sizes: Iterable[int] | None = None,
    progress: bool | None = None,
    max_tokens_per_pass: int | None = None,
) -> Result:
    """Returns how complete circuits of different sizes are: how much is lost without them.

    Args:
        model: as of `run_circuit`.
        clean: as of `run_circuit`.
        corrupted: as of `run_circuit`.
        metric: as of `run_circuit`.
        circuit: as of `faithfulness_curve`.
        sizes: as of `faithfulness_curve`.
        progress: as of `faithfulness_curve`.
        max_tokens_per_pass: as of `faithfulness_curve`.

    Returns:
        The share of the way from clean to corrupted that the complement of each circuit makes: 1
        where nothing outside of the circuit does the same. Axes and details are those of
        `faithfulness_curve`; "metric" is that of the complements.

    Raises:
        OptionError: as of `faithfulness_curve`.
        PromptError: if prompts do not go together.
        ShapeError: if the metric is not a number.
    """
    shared = model, clean, corrupted, metric, circuit, sizes
    runs = _sized(*shared, progress, max_tokens_per_pass, complement=True)
    return runs.curve("Completeness by size", "lost", runs.of_clean, runs.of_corrupted)


@dataclass(frozen=True, slots=True)
class _Runs:
    """A metric of circuits of several sizes, or of their complements.

    Attributes:
        pairs: the prompts.
        metric: the metric.
        counts: how many edges the circuits have.
        values: of each, `(prompt, size)`.
        of_clean: of the clean runs, `(prompt, 1)`.
        of_corrupted: of the corrupted ones, `(prompt, 1)`.
    """

    pairs: Pairs
    metric: Metric
    counts: Sequence[int]
    values: torch.Tensor
    of_clean: torch.Tensor
    of_corrupted: torch.Tensor

    def curve(self, title: str, share: str, start: torch.Tensor, end: torch.Tensor) -> Result:
        """Returns the share of a way that each makes."""
        made = (self.values - start) / (end - start)
        at = slice(None) if self.pairs.clean.many else 0
        return Result(
            title,
            f"{self.metric.name}, share {share}",
            made[at],
            (*self.pairs.clean.axis, Axis.of("edges", self.counts)),
            details={
                "metric": self.values[at],
                "clean": self.of_clean[at, 0],
                "corrupted": self.of_corrupted[at, 0],
            },
            centre=0.0,
        )


def _sized(
    model: LanguageModel,
    clean: Any,
    corrupted: Any,
    metric: Metric | Callable[[Any], Any],
    circuit: Circuit,
    sizes: Iterable[int] | None,
    progress: bool | None,
    max_tokens_per_pass: int | None,
    complement: bool,
) -> _Runs:
    """Measures circuits of the edges that matter most, or the model without these edges."""
    _check_circuit(circuit)
    counts = _sizes(len(circuit)) if sizes is None else numbers_of("size", sizes) or []
    if not counts or min(counts) < 0 or max(counts) > len(circuit):
        raise OptionError(
            f"`sizes` are numbers of edges, at most {len(circuit)}, and not {counts}.",
            here(),
        )
    pairs = read_equal_pairs(model, clean, corrupted)
    metric = as_metric(metric)
    wiring = wiring_of(model, pairs.clean.ids[0])
    kept = [kept_of(wiring, circuit.top(count)) for count in counts]
    if complement:
        kept = [wiring.edges() & ~one for one in kept]
    with bar("Circuits by size", progress):
        values = measured(model, pairs, metric, wiring, kept, max_tokens_per_pass)
    of_clean, of_corrupted = values[:, :1], values[:, 1:2]
    if bool((of_clean == of_corrupted).any()):
        raise OptionError(
            "The metric is the same of both prompts of a pair, so there is no way between them "
            "that a circuit could make.",
            here(),
        )
    return _Runs(pairs, metric, counts, values[:, 2:], of_clean, of_corrupted)


def _check_circuit(circuit: Any) -> None:
    if not isinstance(circuit, Circuit):
        raise OptionError(
            f"A circuit is needed, not a {type(circuit).__name__}: of what `edge_attribution` "
            "gives, `Circuit.of(result).top(30)` is one.",
            here(),
        )


def kept_of(wiring: Wiring, circuit: Circuit) -> torch.Tensor:
    """Returns which edges of a model a circuit has, `(sender, receiver)`.

    Args:
        wiring: the model's.
        circuit: the circuit.

    Raises:
        OptionError: if it has an edge that the model does not have.
    """
    there = wiring.edges()
    senders = {name: place for place, name in enumerate(wiring.senders)}
    receivers = {name: place for place, name in enumerate(wiring.receivers)}
    kept = torch.zeros_like(there)
    for edge in circuit.edges:
        for name, known in ((edge.sender, senders), (edge.receiver, receivers)):
            if name not in known:
                kind = "adds to" if known is senders else "reads"
                raise OptionError(
                    f"Nothing in the model {kind} its residual stream that is called {name!r}"
                    f"{nearest(name, known)}.",
                    here(),
                )
        place = senders[edge.sender], receivers[edge.receiver]
        if not there[place]:
            raise OptionError(
                f"There is no edge from {edge.sender!r} to {edge.receiver!r}, which reads the "
                "residual stream before that is added.",
                here(),
            )
        kept[place] = True
    return kept


def measured(
    model: LanguageModel,
    pairs: Pairs,
    metric: Metric,
    wiring: Wiring,
    kept: Sequence[torch.Tensor],
    max_tokens_per_pass: int | None,
) -> torch.Tensor:
    """Returns a metric of the clean run, the corrupted run, and runs with some edges.

    Args:
        model: the model.
        pairs: the prompts.
        metric: the metric.
        wiring: the model's.
        kept: of each circuit which edges are in it, `(sender, receiver)`.
        max_tokens_per_pass: as of `run_circuit`.

    Returns:
        `(prompt, 2 + circuit)`.
    """
    found: list[Any] = []
    with model.trace(max_tokens_per_pass=max_tokens_per_pass) as tracer:
        for pair, measure in enumerate(metric.of(model, len(pairs))):
            one = plain(model, tracer, pairs.clean.ids[pair], wiring)
            other = plain(model, tracer, pairs.corrupted.ids[pair], wiring)
            logits = with_edges(model, tracer, wiring, one, other, kept)
            runs = (one.logits, other.logits, *logits)
            values = [measure(Run(model, each), one.logits) for each in runs]
            stacked: Any = torch.stack(values)
            found.append(stacked.float().save())
    return torch.stack([values.value for values in found]).cpu()


def _sizes(most: int) -> list[int]:
    """About ten numbers up to one, each twice the one before."""
    found = {most >> halved for halved in range(10)}
    return sorted(found - {0}) or [0]
