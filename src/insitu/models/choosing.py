"""How the tokens of a generation are chosen: handed over, replaced, and drawn from a seed."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from insitu.engine.model_call import Deliver

NO_CHOICE = torch.iinfo(torch.int64).min
"""Stands for the token of a row that is asked for none: no vocabulary has such an id."""


def listening(deliver: Deliver, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options for `generate` with which the tokens of each step are handed over.

    What a step chooses is replaced by leaving it one choice, so that streamers and stopping
    criteria see nothing else.

    Args:
        deliver: is given the tokens of each step, and returns those that are to be chosen.
        kwargs: the options that `generate` has without these.
    """

    def choose(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        greedy = scores.argmax(-1)
        chosen = deliver("choice", greedy, vocabulary=scores.shape[-1])
        return scores if chosen is greedy else only(scores, chosen)

    def chose(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        deliver("tokens", ids[:, -1])
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    return {
        "logits_processor": [*(kwargs.get("logits_processor") or ()), choose],
        "stopping_criteria": [*(kwargs.get("stopping_criteria") or ()), chose],
    }


def only(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Returns scores with which each row can choose one token only.

    Args:
        scores: the scores that there were, `(rows, vocabulary)`.
        tokens: the tokens, `(rows,)`.
    """
    return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


@contextmanager
def seeded(seed: int | None) -> Generator[None, None, None]:
    """Draws random numbers from a seed, and leaves the generators as they were.

    Args:
        seed: the seed, or None for what comes next.
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        if torch.accelerator.is_available():
            torch.manual_seed(seed)
        else:  # for each device that is not there torch would keep a stack with its source lines
            torch.default_generator.manual_seed(seed)
        yield
