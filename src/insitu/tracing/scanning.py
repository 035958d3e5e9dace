"""Scanning a block: it is planned and its shapes are inferred, and nothing runs."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib

from insitu.graph.cells import Missing
from insitu.graph.errors import UnknownShapeError
from insitu.graph.shapes import fake_value
from insitu.tracing.run import Run
from insitu.tracing.running import prepare


def scan_block(run: Run) -> None:
    """Finds the faults of a run, and fills the saved values with fake ones.

    Args:
        run: the block.

    Raises:
        InsituError: if something is wrong, at its line.
    """
    lines = run.lines
    prepare(run, dry=True)
    for index in range(len(lines.graph)):
        # Sizes that depend on values are no faults: the run will tell.
        with contextlib.suppress(UnknownShapeError):
            fake_value(lines, index)
    for index, holder in lines.saves.items():
        repeated = lines.graph.repeats_node(index)
        if index in lines.fakes and not repeated:
            holder._put(lines.fakes[index])
        else:
            holder._put(Missing("a scan runs nothing, and its shape depends on the run."))
