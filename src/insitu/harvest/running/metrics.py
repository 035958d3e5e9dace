"""Metrics whose gradients a harvest keeps: a number of the logits of a sequence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from insitu.graph.errors import OptionError
from insitu.graph.location import here

MetricFunction = Callable[[Any, Any], Any]
"""From logits `(rows, position, vocabulary)` and token ids `(rows, position)` to a number, the sum
over the rows. Both may be proxies."""

Metric = str | MetricFunction
"""What may be given as `metric`: "loss", or a function with a name, of one sequence."""


def loss(logits: Any, ids: Any) -> Any:
    """Returns the sum of the negative log likelihoods of next tokens, in nats.

    Args:
        logits: `(rows, position, vocabulary)`.
        ids: `(rows, position)`.
    """
    predicted = logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(predicted, ids[:, 1:].flatten(), reduction="sum")


def metric_of(given: Metric | None) -> tuple[MetricFunction, str] | None:
    """Returns a metric with the name that it has in the specification, None for none.

    A metric of the user's is given one sequence at a time.

    Args:
        given: "loss", a function with a name, or None.

    Raises:
        OptionError: if it is neither, or has no name of its own.
    """
    if given is None:
        return None
    if given == "loss":
        return loss, "loss"
    if not callable(given):
        raise OptionError(
            f"`metric` is 'loss', or a function of logits and token ids to a number, not "
            f"{given!r:.80}.",
            here(),
        )
    name = getattr(given, "__qualname__", None)
    if name is None or "<lambda>" in name:
        raise OptionError(
            "A metric takes a name, by which a harvest that goes on knows it: write it with `def`.",
            here(),
        )
    return partial(_of_each, given), f"{given.__module__}.{name}"


def _of_each(metric: MetricFunction, logits: Any, ids: Any) -> Any:
    """A metric of each sequence alone, so that a mean in it is none over a batch."""
    return sum(metric(logits[at : at + 1], ids[at : at + 1]) for at in range(len(ids)))
