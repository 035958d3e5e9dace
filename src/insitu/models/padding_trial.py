"""Whether a model can be padded on the left: tried on it, by value.

A few short prompts run as one batch with padding before them, and each alone. When this is tried,
and what follows from it, is in `padding.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from insitu.models.configuration import said, text_config
from insitu.models.prompts import Prompt, Side, positions_of
from insitu.models.trial import alike, undisturbed

_LENGTHS = (6, 9, 1)
_LONGEST_WINDOW = 64  # beyond it, a row longer than the window takes too long to be tried
_NOWHERE: Any = None  # a trial is of no line of the user's


class Padding(NamedTuple):
    """How rows of different length are padded.

    Attributes:
        side: where.
        exact: whether rows that are padded on the left are what they are alone.
        positions: whether they are if the forward is given position ids.
        hides: whether they are without.
    """

    side: Side
    exact: bool
    positions: bool
    hides: bool = True


def find_padding(
    run: Callable[[Prompt, Mapping[str, Any]], Any],
    modules: Mapping[str, nn.Module],
    config: Any,
    takes_positions: bool,
    vocabulary: int,
    pad_id: int,
    context: int | None,
) -> Padding:
    """Returns how a model is padded.

    Args:
        run: runs the model on a prompt, with further keyword arguments.
        modules: its tree, by path. The caller holds it (see `exclusive`).
        config: its config.
        takes_positions: whether its forward takes position ids.
        vocabulary: how many token ids it has.
        pad_id: what padding is filled with.
        context: the most positions, or None if there is no such number.
    """
    draw = torch.Generator().manual_seed(0)
    rows: list[torch.Tensor] = []
    for length in _lengths(config, context):
        ids = torch.randint(vocabulary, (length,), generator=draw)
        ids[ids == pad_id] = (pad_id + 1) % vocabulary
        rows.append(ids)
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :] = row
        mask[number, length - len(row) :] = 1
    padded = Prompt(ids, _NOWHERE, mask)
    with undisturbed(modules):
        for part in modules.values():  # `undisturbed` puts this back
            part.training = False
        alone = [_outputs(run(Prompt(row[None], _NOWHERE), {})) for row in rows]
        ways: list[Mapping[str, Any]] = [{}]
        if takes_positions:
            ways.append({"position_ids": positions_of(mask)})
        right = [_agrees(run, padded, way, alone) for way in ways]
        causal = not said(config, "is_encoder_decoder") and _looks_back(
            run, rows, alone, vocabulary, pad_id
        )
    exact, positions = any(right), len(right) > 1 and right[-1]
    return Padding("left" if causal and exact else "right", exact, positions, right[0])


def _lengths(config: Any, context: int | None) -> list[int]:
    """Lengths of prompts, one of which a small window does not hold."""
    text = text_config(config)
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
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
    try:
        together = _outputs(run(padded, further))
    except Exception:  # whatever the model makes of it: then it is not to be run so
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
