"""A run with limits: counts what it has spent, and looks at operations before they run.

What has a size that is known beforehand was looked at in the check. Other operations are run
without data first, with the sizes that their arguments have by then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from insitu.engine.counting import Counting, Held
from insitu.engine.largest import asked, largest
from insitu.engine.limits import Limits
from insitu.graph.bounds import counting
from insitu.graph.errors import LimitError
from insitu.graph.fake_tensors import Fakes, on_fake_tensors
from insitu.graph.node import Function, Row
from insitu.graph.operations import APPLY, READ, Operation
from insitu.graph.structure import map_structure, tensors_of


@dataclass(frozen=True, slots=True)
class Beforehand:
    """What a check found out about a block.

    Attributes:
        known: the nodes whose sizes are known.
        held: the bytes that are in use beside recorded values: a pass, and earlier results.
    """

    known: Collection[int]
    held: int


class Budget:
    """What a job may still spend.

    Args:
        limits: what it may take in all.

    Attributes:
        limits: as given.
        blocks: the facts that were found beforehand of each of its blocks, where that was needed.
        flops: floating-point operations so far, those that are sure to come included.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.blocks: Sequence[Beforehand] = ()
        self.flops = 0.0
        self._nodes = self._before = 0  # so far, and in the blocks before
        self._begun: float | None = None
        self._block = Beforehand((), 0)
        self._held = Held()
        self._looks = False

    @contextmanager
    def spending(self, block: int | None = None) -> Generator[None]:
        """Lets what runs in a `with` block be counted, from nothing on.

        Args:
            block: which block of the job runs; None if it is only checked.
        """
        self._before = self._nodes if block else 0
        self._nodes = self._before
        if block is not None and block < len(self.blocks):
            self._block = self.blocks[block]
        token = counting.set(self)
        try:
            yield
        finally:
            counting.reset(token)

    @contextmanager
    def part(self, nodes: Sequence[int]) -> Generator[None]:
        """Lets a part of what runs be run again in a `with` block, as if it had not run.

        Args:
            nodes: its nodes, by their numbers in what runs.
        """
        block, flops = self._block, self.flops
        known = [at for at, node in enumerate(nodes) if node in block.known]
        self._block = replace(block, known=frozenset(known))
        try:
            yield
        finally:
            self._block, self.flops = block, flops

    def tick(self) -> None:
        """Looks at the clock, which the first call starts."""
        if self.limits.seconds is None:
            return
        now = time.monotonic()
        if self._begun is None:
            self._begun = now
        spent = now - self._begun
        self.limits.check("seconds", spent, f"The job has run for {spent:.3g} seconds")

    def stop_clock(self) -> None:
        """Lets the clock begin anew: the run has its own time, after that of its check."""
        self._begun = None

    def call(self, nodes: int) -> None:
        """Counts a call of a recorded function, or values that are made one by one."""
        self._nodes += nodes
        self.limits.check("nodes", self._nodes, f"takes the job to {self._nodes:,} nodes")
        self.tick()

    def repeated(self, nodes: int) -> None:
        """Raises if a function of so many nodes cannot be called as often as it will be."""
        whole = self._nodes + nodes
        self.limits.check("nodes", whole, f"takes the job to {whole:,} nodes or more")

    def inner(self, operation: Operation) -> Callable[..., Any]:
        """Returns what computes an operation in a recorded function."""
        return self._guarded(operation, False) if self._looks else operation.function

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        """Returns the nodes of a graph with operations that count what they take.

        Args:
            rows: the nodes.
        """
        self._nodes = self._before + len(rows)
        self.tick()
        known, made = self._block.known, list[Row]()
        looks = self.limits.bounds_costs
        for index, row in enumerate(rows):
            operation, args, *_ = row
            mine = operation is APPLY and isinstance(args[0], Function)  # it may do anything
            seen = index in known or mine or not looks
            guarded = replace(operation, function=self._guarded(operation, seen))
            made.append(row if operation is READ else (guarded, *row[1:]))
        return made

    def _guarded(self, operation: Operation, known: bool) -> Callable[..., Any]:
        function = operation.function

        def called(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            if known:
                result = function(*args, **kwargs)
            else:
                self._look(operation, args, kwargs)
                looked, self._looks = self._looks, True
                try:
                    result = function(*args, **kwargs)
                finally:
                    self._looks = looked
            if self.limits.peak_bytes is not None:
                for tensor in tensors_of(result):
                    self._held.add(tensor)
                self._check_bytes(0)
            return result

        return called

    def _look(self, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Finds out what an operation takes before it runs."""
        size = asked(operation.short, args, kwargs)
        if size is not None:
            self._check_bytes(size)
            return
        nodes, counted = self._nodes, Counting()
        mode = Fakes()

        def leaf(item: Any) -> Any:
            return mode.from_tensor(item.detach()) if isinstance(item, torch.Tensor) else item

        try:
            with on_fake_tensors(mode):
                given, named = cast("tuple[Any, Any]", map_structure(leaf, (args, kwargs)))
                try:
                    with counted:
                        operation.function(*given, **named)
                except LimitError:
                    raise
                except Exception:  # its size depends on values, or it fails, as it will
                    with counted:
                        largest(operation.short, given, named)
        except LimitError:
            raise
        except Exception:
            return  # it fails in the run too
        finally:
            self._nodes = nodes
        self._check_bytes(counted.counts.peak)
        self.flops += counted.counts.flops
        what = f"would take the job to {self.flops:.3g} floating-point operations"
        self.limits.check("operations", self.flops, what)

    def _check_bytes(self, size: int) -> None:
        whole = self._held.bytes + self._block.held + size
        what = f"would take {size:,} bytes, which makes {whole:,} at once"
        self.limits.check("peak_bytes", whole, what)
