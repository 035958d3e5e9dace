"""Scanning a block: it is planned and its shapes are inferred, and nothing runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from insitu.batching.procedure import Procedure, Subject
from insitu.graph.cells import Missing
from insitu.graph.errors import UnknownShapeError
from insitu.graph.lines import Lines
from insitu.graph.shapes import fake_value
from insitu.runtime.summary import Summary
from insitu.tracing.planning import prepare


def scan_block(
    model: Subject,
    procedure: Procedure[Any],
    lines: Lines,
    requests: Sequence[Any],
    told: list[Callable[[], Summary]],
) -> None:
    """Finds what is wrong with a run, and fills the saved values with fake ones.

    Args:
        model: the model.
        procedure: how it would run.
        lines: what was recorded.
        requests: what each invocation was given.
        told: gets, for each pass, the function that summarises it.

    Raises:
        InsituError: for what is wrong, at its line.
    """
    _, passes = prepare(
        model, procedure, lines.graph, lines.saves, requests, model.snapshot.root, dry=True
    )
    told[:] = [single.told for single in passes if single is not None]
    for index in range(len(lines.graph)):
        with contextlib.suppress(UnknownShapeError):
            fake_value(lines, index)
    for index, holder in lines.saves.items():
        repeated = any(start <= index < end for start, end in lines.graph.repeats)
        if index in lines.fakes and not repeated:
            holder._put(lines.fakes[index])
        else:
            holder._put(Missing("a scan runs nothing, and its shape depends on the run."))
