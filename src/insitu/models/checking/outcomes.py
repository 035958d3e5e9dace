"""Outcomes of checks, in words."""

from __future__ import annotations

import math
from collections.abc import Iterable

from insitu.display.report import Check
from insitu.graph.node import readable
from insitu.models.checking.run import Run
from insitu.models.proof.identities import Difference
from insitu.tracing.vocabulary import Entry, Missing


def said(name: str, where: str, found: Difference, note: str = "") -> Check:
    """Returns whether something holds.

    Args:
        name: what has to hold.
        where: the path of the module in which.
        found: how far both sides are apart.
        note: what else there is to say.
    """
    outcome = "ok" if found.is_rounding else "differs"
    finite = math.isfinite(found.largest)
    largest = found.largest if finite else None
    if not finite and not found.note:
        note = "there are numbers that are none"
    return Check(name, readable(where), outcome, largest, found.allowed, found.note or note)


def not_checked(name: str, where: str, why: str) -> Check:
    """Returns that it is not known whether something holds.

    Args:
        name: what would have to hold.
        where: the path of the module in which.
        why: as a sentence.
    """
    return Check(name, readable(where), "not checked", note=why)


def unread(run: Run, name: str, path: str, *names: str) -> Check | None:
    """Returns that something was not checked, if a value that it is about could not be read.

    Args:
        run: the run.
        name: what would have to hold.
        path: the path of a transformer block, "" for the model.
        names: of the values that it is about.
    """
    for key in names:
        if (path, key) in run.failures:
            return not_checked(name, path or "model", f"`{key}` cannot be read.")
    return None


def listed(way: Iterable[str]) -> str:
    """Returns what stands on a way, as a list of modules.

    Args:
        way: functions in forwards, as `between` gives them.
    """
    return ", ".join(f"`{one}`" for one in dict.fromkeys(map(_place, way)))


def _place(one: str) -> str:
    """A function in a forward as one would speak of it: by its module."""
    owner, _, function = one.partition(">")
    return readable(owner) if owner else function


def why_not(entry: Entry | None) -> str:
    """Returns why a name stands for nothing.

    Args:
        entry: what it stands for.
    """
    return entry.reason if isinstance(entry, Missing) else "it is not known."
