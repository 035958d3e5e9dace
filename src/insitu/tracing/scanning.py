"""Scanning a block: it is planned and its shapes are inferred, and nothing runs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from insitu.batching.pass_plan import PassPlan
from insitu.batching.procedure import Procedure, Subject
from insitu.graph.cells import Missing
from insitu.graph.errors import UnknownShapeError
from insitu.graph.lines import Lines
from insitu.graph.shapes import fake_value
from insitu.tracing.planning import prepare


def scan_block(
    model: Subject,
    procedure: Procedure[Any],
    lines: Lines,
    requests: Sequence[Any],
    planned: list[PassPlan],
) -> None:
    """Finds what is wrong with a run, and fills the saved values with fake ones.

    Args:
        model: the model.
        procedure: how it would run.
        lines: what was recorded.
        requests: what each invocation was given.
        planned: gets what each pass does.

    Raises:
        InsituError: for what is wrong, at its line.
    """
    prepared, _ = prepare(
        model, procedure, lines.graph, lines.saves, requests, model.snapshot.root, dry=True
    )
    planned[:] = prepared.passes
    for index in range(len(lines.graph)):
        with contextlib.suppress(UnknownShapeError):
            fake_value(lines, index)
    for index, holder in lines.saves.items():
        repeated = any(start <= index < end for start, end in lines.graph.repeats)
        if index in lines.fakes and not repeated:
            holder._put(lines.fakes[index])
        else:
            holder._put(Missing("a scan runs nothing, and its shape depends on the run."))
