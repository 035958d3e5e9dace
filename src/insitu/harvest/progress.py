"""How far a harvest has come: tokens a second, bytes, and the time that is left."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from insitu.methods.progress import VARIABLE

_EVERY = 0.5  # seconds between two reports


@dataclass(frozen=True, slots=True)
class HarvestProgress:
    """How far a harvest has come.

    Attributes:
        tokens: how many tokens were run, with those of earlier calls.
        of: how many there will be; None if that is not known.
        bytes: how many bytes are committed.
        tokens_per_second: in this call.
        seconds_left: how long it will take; None if that is not known.
    """

    tokens: int
    of: int | None
    bytes: int
    tokens_per_second: float
    seconds_left: float | None


Shown = bool | Callable[[HarvestProgress], object] | None
"""What may be given as `progress`: whether a bar is shown, None for on a terminal or in a notebook;
or a function that is told instead, some times a second."""


class Report:
    """Counts tokens and bytes, and tells how far it has come.

    Args:
        tell: who is told; None for nobody.
        of: how many tokens there will be.
        tokens: how many there are already.
        bytes: how many bytes there are already.
    """

    def __init__(
        self,
        tell: Callable[[HarvestProgress], object] | None,
        of: int | None,
        tokens: int,
        bytes: int,
    ) -> None:
        self._tell, self._of = tell, of
        self._before, self._tokens, self._bytes = tokens, tokens, bytes
        self._start = time.monotonic()
        self._told = 0.0

    def ran(self, tokens: int) -> None:
        """Notes that tokens were run."""
        self._tokens += tokens
        now = time.monotonic()
        if self._tell is not None and now - self._told >= _EVERY:
            self._told = now
            self._tell(self.now())

    def wrote(self, bytes: int) -> None:
        """Notes that bytes were committed."""
        self._bytes += bytes

    def ended(self) -> None:
        """Tells a last time."""
        if self._tell is not None:
            self._tell(self.now())

    def now(self) -> HarvestProgress:
        """Returns how far it has come."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        speed = (self._tokens - self._before) / seconds
        left = None
        if self._of is not None and speed > 0:
            left = max(self._of - self._tokens, 0) / speed
        return HarvestProgress(self._tokens, self._of, self._bytes, speed, left)


@contextmanager
def told(shown: Shown) -> Generator[Callable[[HarvestProgress], object] | None]:
    """Gives who is told how far a harvest has come, None for nobody.

    Args:
        shown: as of `harvest`.
    """
    if callable(shown):
        yield shown
        return
    bar = _bar(shown)
    if bar is None:
        yield None
        return
    task = bar.add_task("Harvesting", total=None, note="")

    def tell(now: HarvestProgress) -> None:
        note = f"{now.tokens:,} tokens, {now.tokens_per_second:,.0f} a second, {size(now.bytes)}"
        bar.update(task, completed=now.tokens, total=now.of, note=note)

    with bar:
        yield tell


def size(count: int) -> str:
    """Returns a number of bytes as one reads it.

    Args:
        count: the number.
    """
    number, units = float(count), ["bytes", "KB", "MB", "GB", "TB"]
    while number >= 1000 and units[1:]:
        number, units = number / 1000, units[1:]
    return f"{number:.0f} {units[0]}" if units[0] == "bytes" else f"{number:.1f} {units[0]}"


def _bar(shown: bool | None) -> Any:
    if shown is False or (shown is None and os.environ.get(VARIABLE) == "0"):
        return None
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if shown is None and not (console.is_terminal or console.is_jupyter):
        return None
    note = TextColumn("{task.fields[note]}", style="dim", markup=False)
    title = TextColumn("{task.description}", markup=False)
    return Progress(title, BarColumn(), note, TimeRemainingColumn(), console=console)
