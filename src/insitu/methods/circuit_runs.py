"""Runs of a model with a circuit: with edges left out of it that carry what another prompt has.

Nothing is computed twice. Parts that read the same of the residual stream give the same, whichever
circuit they belong to. Those that read all of the clean run or nothing of it are read from the
plain runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from insitu.methods.sites import site_of
from insitu.methods.wiring import Part, Wiring
from insitu.models.language_model import LanguageModel
from insitu.tracing.tracer import Tracer

Reading = tuple[int, ...]
"""What of the stream is not as in the corrupted run: numbers of changes in a `_Bank`, in order."""


@dataclass(frozen=True, slots=True)
class Plain:
    """A run of a prompt as it is.

    Attributes:
        ids: the prompt, `(position,)`.
        start: what the blocks start from, `(1, position, d_model)`.
        streams: what each part reads, of the same shape.
        made: queries, keys and values of each part that is read by heads, by their names.
        added: what the senders of each part add, `(sender, position, d_model)`; None of logits.
        logits: its logits, `(position, vocabulary)`.
    """

    ids: torch.Tensor
    start: Any
    streams: Sequence[Any]
    made: Sequence[dict[str, Any]]
    added: Sequence[Any]
    logits: Any


def plain(model: LanguageModel, tracer: Tracer, ids: torch.Tensor, wiring: Wiring) -> Plain:
    """Records a run of a prompt as it is.

    Args:
        model: the model.
        tracer: the open block.
        ids: the prompt, `(position,)`.
        wiring: the model's.
    """
    with tracer.invoke(ids):
        return Plain(
            ids,
            site_of("residual_in").read(model, 0),
            [part.reads.read(model, part.layer) for part in wiring.parts],
            [
                {kind: site_of(kind).read(model, part.layer) for kind in "qkv"}
                if part.by_heads
                else {}
                for part in wiring.parts
            ],
            [part.added(model)[0] if part.senders else None for part in wiring.parts],
            model.logits[0],
        )


def with_edges(
    model: LanguageModel,
    tracer: Tracer,
    wiring: Wiring,
    clean: Plain,
    corrupted: Plain,
    kept: Sequence[torch.Tensor],
) -> list[Any]:
    """Records runs in which only some edges carry what they carry in the clean run.

    What each receiver reads is the stream of the corrupted run, with what the senders of its edges
    add in the new run in the place of what they add in the corrupted one.

    Args:
        model: the model.
        tracer: the open block.
        wiring: the model's.
        clean: the run of the clean prompt.
        corrupted: the run of the corrupted one.
        kept: of each circuit which edges are in it, `(sender, receiver)`.

    Returns:
        The logits of each circuit, `(position, vocabulary)`.
    """
    runs = _Runs(model, tracer, wiring, clean, corrupted, kept)
    for number in range(len(wiring.parts) - 1):
        runs.run_part(number)
    return runs.logits()


class _Runs:
    """Runs of several circuits, part after part.

    Args: as of `with_edges`.
    """

    def __init__(
        self,
        model: LanguageModel,
        tracer: Tracer,
        wiring: Wiring,
        clean: Plain,
        corrupted: Plain,
        kept: Sequence[torch.Tensor],
    ) -> None:
        self._model, self._tracer, self._wiring = model, tracer, wiring
        self._clean, self._corrupted = clean, corrupted
        edges = [each.T.tolist() for each in kept]
        self._kept = [
            [[s for s, is_in in enumerate(row) if is_in] for row in rows] for rows in edges
        ]
        added = [
            one - other
            for one, other in zip(clean.added, corrupted.added, strict=True)
            if one is not None
        ]
        # What senders add beyond what they add in the corrupted run: first in the clean run, then
        # as it is found out.
        self._changes = [torch.cat([clean.start - corrupted.start, *added])]
        self._count = len(wiring.senders)
        # Which of them each sender adds in each circuit, None if it is as in the corrupted run.
        self._now: list[list[int | None]] = [[0] for _ in kept]

    def run_part(self, number: int) -> None:
        """Runs a part with all that it reads in any circuit."""
        part = self._wiring.parts[number]
        readings = [self._readings(circuit, part) for circuit in range(len(self._kept))]
        whole = tuple(range(part.upstream))
        states: list[dict[tuple[Reading, ...], int]] = [{} for _ in part.groups]
        for found in readings:
            for group, known in zip(part.groups, states, strict=True):
                state = tuple(found[receiver] for receiver in group.receivers)
                if any(state) and any(reading != whole for reading in state):
                    known.setdefault(state, len(known))
        if any(states):
            if part.by_heads:
                added = self._by_heads(number, states)
            else:
                added = self._whole(number, [state[0] for state in states[0]])
            self._changes.append((added - self._corrupted.added[number]).flatten(0, 1))
        for found, now in zip(readings, self._now, strict=True):
            now.extend([None] * len(part.senders))
            for group, known in zip(part.groups, states, strict=True):
                state = tuple(found[receiver] for receiver in group.receivers)
                for sender in group.senders:
                    place = part.first_sender + sender
                    if state in known:
                        row = known[state] * len(part.senders)
                        now[place] = self._count + row + sender
                    elif any(state):
                        now[place] = place
        self._count += max(map(len, states)) * len(part.senders)

    def logits(self) -> list[Any]:
        """Returns the logits of all circuits."""
        part = self._wiring.parts[-1]
        readings = [self._readings(circuit, part)[0] for circuit in range(len(self._kept))]
        whole = tuple(range(part.upstream))
        found: dict[Reading, Any] = {whole: self._clean.logits, (): self._corrupted.logits}
        new = [reading for reading in dict.fromkeys(readings) if reading not in found]
        if new:
            streams = self._streams(len(self._wiring.parts) - 1, new)
            with self._tracer.invoke(self._clean.ids.expand(len(new), -1)):
                part.reads.write(self._model, part.layer, streams)
                logits = self._model.logits
            found |= {reading: logits[row] for row, reading in enumerate(new)}
        return [found[reading] for reading in readings]

    def _readings(self, circuit: int, part: Part) -> list[Reading]:
        """What each receiver of a part reads in a circuit."""
        now, kept = self._now[circuit], self._kept[circuit]
        first = part.first_receiver
        return [
            tuple(
                change
                for sender in kept[first + receiver]
                if sender < part.upstream and (change := now[sender]) is not None
            )
            for receiver in range(len(part.receivers))
        ]

    def _streams(self, number: int, readings: Sequence[Reading]) -> Any:
        """The residual stream as it is read, `(reading, position, d_model)`."""
        if len(self._changes) > 1:
            self._changes = [torch.cat(self._changes)]
        chosen = torch.zeros(len(readings), self._count)
        for row, reading in enumerate(readings):
            chosen[row, list(reading)] = 1
        bank, stream = self._changes[0], self._corrupted.streams[number]
        weights = chosen.to(self._model.device)
        return (stream + torch.einsum("rc,cpd->rpd", weights, bank.float())).type_as(stream)

    def _whole(self, number: int, readings: Sequence[Reading]) -> Any:
        """What a part adds for each of some readings, `(reading, sender, position, d_model)`."""
        part = self._wiring.parts[number]
        streams = self._streams(number, readings)
        with self._tracer.invoke(self._clean.ids.expand(len(readings), -1)):
            part.reads.write(self._model, part.layer, streams)
            return part.added(self._model)

    def _by_heads(self, number: int, states: Sequence[dict[tuple[Reading, ...], int]]) -> Any:
        """What attention adds, each head from queries, keys and values of different readings.

        Args:
            number: of the part.
            states: of each group of heads what its receivers read, and in which row.

        Returns:
            `(row, sender, position, d_model)`; where a group has fewer rows than others, anything.
        """
        part = self._wiring.parts[number]
        whole = tuple(range(part.upstream))
        wanted = {reading: None for known in states for state in known for reading in state}
        places = {(): 0, whole: 1}
        new = [reading for reading in wanted if reading not in places]
        places |= {reading: 2 + row for row, reading in enumerate(new)}
        made = {
            kind: [self._corrupted.made[number][kind], self._clean.made[number][kind]]
            for kind in "qkv"
        }
        if new:
            streams = self._streams(number, new)
            with self._tracer.invoke(self._clean.ids.expand(len(new), -1)):
                part.reads.write(self._model, part.layer, streams)
                for kind in "qkv":
                    made[kind].append(site_of(kind).read(self._model, part.layer))
        rows = max(map(len, states))
        taken = torch.zeros(rows, len(part.receivers), dtype=torch.long)
        for group, known in zip(part.groups, states, strict=True):
            for state, row in known.items():
                for receiver, reading in zip(group.receivers, state, strict=True):
                    taken[row, receiver] = places[reading]
        with self._tracer.invoke(self._clean.ids.expand(rows, -1)):
            first = 0
            for kind in "qkv":
                site = site_of(kind)
                heads = sum(receiver.site == site for receiver in part.receivers)
                which = taken[:, first : first + heads].to(self._model.device)
                value = torch.cat(made[kind])[which, torch.arange(heads, device=which.device)]
                site.write(self._model, part.layer, value)
                first += heads
            return part.added(self._model)
