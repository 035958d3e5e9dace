"""Whether a model can be padded on the left: tried on it, by value.

A few short prompts run as one batch with padding before them, and each alone. When this is tried,
and what follows from it, is in `padding.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from insitu.batching.demand import Side
from insitu.engine.fallback import Fallback, tried
from insitu.engine.keeping import evaluating, undisturbed
from insitu.engine.tree import Tree
from insitu.models.configuration import all_said, said, text_config
from insitu.models.prompts import Prompt, positions_of
from insitu.models.trial import alike

_LENGTHS = (6, 9, 1)
_STEPS = 2  # of a generation: what is wrong with a cache shows in the second
_LONGEST_WINDOW = 64  # beyond it, a row longer than the window takes too long to be tried
_NOWHERE: Any = None  # a trial is of no line of the user's


class Padding(NamedTuple):
    """How rows of different length are padded.

    Attributes:
        side: where.
        exact: whether rows that are padded on the left are what they are alone.
        positions: whether they are if the forward is given position ids.
        hides: whether they are without.
        by_id: whether that is so only if padding has the model's own id, by which it is told apart.
    """

    side: Side
    exact: bool
    positions: bool
    hides: bool = True
    by_id: bool = False


@dataclass(frozen=True, slots=True)
class TriedModel:
    """A model on which padding is tried.

    Attributes:
        tree: its tree. The caller holds it (see `exclusive`).
        config: its config.
        vocabulary: how many token ids it has.
        pad_id: what padding is filled with.
        context: the most positions, or None if there is no such number.
    """

    tree: Tree
    config: Any
    vocabulary: int
    pad_id: int
    context: int | None

    def rows(self, steps: int = 0) -> list[torch.Tensor]:
        """Returns prompts of different length, without padding.

        Args:
            steps: how many tokens there has to be room for behind them.
        """
        context = None if self.context is None else max(self.context - steps, 1)
        return _rows(_lengths(self.config, context), self.vocabulary, self.pad_id)

    @contextmanager
    def undisturbed(self) -> Generator[None, None, None]:
        """Runs its block without dropout, and leaves the model as it was."""
        with undisturbed(self.tree), evaluating(self.tree.parts):
            yield


def find_padding(
    run: Callable[[Prompt, Mapping[str, Any]], Any], model: TriedModel, takes_positions: bool
) -> Padding:
    """Returns how a model is padded.

    Args:
        run: runs the model on a prompt, with further keyword arguments.
        model: the model.
        takes_positions: whether its forward takes position ids.
    """
    rows, vocabulary, pad_id = model.rows(), model.vocabulary, model.pad_id
    padded, mask = _padded(rows, pad_id)
    with model.undisturbed():
        alone = [_outputs(run(Prompt(row[None], _NOWHERE), {})) for row in rows]
        ways: list[Mapping[str, Any]] = [{}]
        if takes_positions:
            ways.append({"position_ids": positions_of(mask)})
        right = [_agrees(run, padded, way, alone) for way in ways]
        other, _ = _padded(rows, (pad_id + 1) % vocabulary)
        by_id = right[0] and not right[-1] and not _agrees(run, other, {}, alone)
        causal = not said(model.config, "is_encoder_decoder") and _looks_back(
            run, rows, alone, vocabulary, pad_id
        )
    exact, positions = any(right), len(right) > 1 and right[-1]
    side: Side = "left" if causal and exact else "right"
    return Padding(side, exact, positions, right[0], by_id)


def goes_on_as_alone(
    generate: Callable[[Prompt, Mapping[str, Any]], Any],
    model: TriedModel,
    side: Side,
    ends: Collection[int],
) -> bool:
    """Returns whether a generation gives rows that are padded what they have alone.

    Args:
        generate: runs the model's `generate` on a prompt, with options.
        model: the model.
        side: where padding is.
        ends: the ids that end a generation.
    """
    tokens = range(model.vocabulary)
    chosen = next(number for number in tokens if number not in {model.pad_id, *ends})

    def choose(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Near ties would be rounded to another token, and what comes then be compared with it.
        return torch.full_like(scores, -torch.inf).index_fill(
            1, torch.tensor([chosen], device=scores.device), 0.0
        )

    options: dict[str, Any] = {
        **{"max_new_tokens": _STEPS, "do_sample": False, "num_beams": 1},
        **{"return_dict_in_generate": True, "output_logits": True, "logits_processor": [choose]},
    }

    def logits(prompt: Prompt) -> torch.Tensor:
        return torch.stack(generate(prompt, options).logits, 1)

    rows = model.rows(_STEPS)[1:]  # the longest and the shortest
    padded, _ = _padded(rows, model.pad_id, side)
    with model.undisturbed():
        alone = [logits(Prompt(row[None], _NOWHERE))[0] for row in rows]
        return all(map(alike, logits(padded), alone))


def _rows(lengths: Sequence[int], vocabulary: int, pad_id: int) -> list[torch.Tensor]:
    """Prompts of some lengths, without padding."""
    draw = torch.Generator().manual_seed(0)
    rows: list[torch.Tensor] = []
    for length in lengths:
        ids = torch.randint(vocabulary, (length,), generator=draw)
        ids[ids == pad_id] = (pad_id + 1) % vocabulary
        rows.append(ids)
    return rows


def _padded(
    rows: Sequence[torch.Tensor], filler: int, side: Side = "left"
) -> tuple[Prompt, torch.Tensor]:
    """Prompts with padding before the shorter ones, or behind them, and their mask."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), filler)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        first = length - len(row) if side == "left" else 0
        ids[number, first : first + len(row)] = row
        mask[number, first : first + len(row)] = 1
    return Prompt(ids, _NOWHERE, mask), mask


def _lengths(config: Any, context: int | None) -> list[int]:
    """Lengths of prompts; one of them is more than a small window holds."""
    text = text_config(config)
    windows = all_said(text, "sliding_window", "attention_chunk_size")
    small = [w for w in windows if isinstance(w, int) and 0 < w <= _LONGEST_WINDOW]
    lengths = [_LENGTHS[0], max(_LENGTHS[1], *(w + 3 for w in small), 0), _LENGTHS[2]]
    return [min(length, context or length) for length in lengths]


def _looks_back(
    run: Callable[[Prompt, Mapping[str, Any]], Any],
    rows: list[torch.Tensor],
    alone: list[torch.Tensor],
    vocabulary: int,
    pad_id: int,
) -> bool:
    """Whether the last token changes nothing before it."""
    row, own = rows[0], alone[0][0]
    if len(own) != len(row) or len(row) < 2:
        return False
    changed = row.clone()
    others = [(int(row[-1]) + step) % vocabulary for step in (1, 2)]
    changed[-1] = next(other for other in others if other != pad_id)
    found = _outputs(run(Prompt(changed[None], _NOWHERE), {}))[0]
    return alike(found[:-1], own[:-1])


def _agrees(
    run: Callable[[Prompt, Mapping[str, Any]], Any],
    padded: Prompt,
    further: Mapping[str, Any],
    alone: list[torch.Tensor],
) -> bool:
    """Whether each row of a batch, run in some way, is what it is alone."""
    together = tried(lambda: _outputs(run(padded, further)), "padding")
    if isinstance(together, Fallback):
        return False
    return all(_alike(row, own[0]) for row, own in zip(together, alone, strict=True))


def _outputs(result: Any) -> torch.Tensor:
    """What a forward returns for each row, `(rows, position, ...)` or `(rows, ...)`."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(result, name, None), torch.Tensor):
            return found
    return result[0]


def _alike(padded: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether a row with padding before it has the values of the row alone."""
    return alike(padded[len(padded) - len(own) :] if own.ndim > 1 else padded, own)
