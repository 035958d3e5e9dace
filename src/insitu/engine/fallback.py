"""What runs in the slower way, and why: the plan shows the reason, and the log has it.

A trial of the model decides whether the faster way gives the same values. The model may raise in
a trial: then it cannot run in the faster way, and that is the reason. What Insitu raises itself
there is a fault of Insitu, and is logged as an error.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from insitu.graph.errors import InsituError
from insitu.graph.node import Site

_Found = TypeVar("_Found")
_LONGEST = 120  # characters of a message that are shown in a table
# Whose frames do not tell whether the model or Insitu called them.
_BETWEEN = frozenset(["insitu", "torch", *sys.stdlib_module_names])

_CALLS_FOR_THE_MODEL = ("__torch_", "visit", "called_at_its_places")
"""How functions of ours begin that stand between a model and the functions of torch it calls."""

logger = logging.getLogger("insitu")


@dataclass(frozen=True, slots=True)
class Fallback:
    """Why something runs in the slower way.

    Attributes:
        why: the reason, in the words of the plan.
        site: the site that cannot be cut out of a batch, if that is the reason.
    """

    why: str
    site: Site | None = None


SEEN_ALONE = Fallback("your own hooks on its modules see each prompt alone")


def uncut(site: Site) -> Fallback:
    """Returns the reason that what arrives at a site cannot be cut out of a batch."""
    return Fallback(f"`{site}` cannot be cut out of a batch", site)


def tried(trial: Callable[[], _Found], what: str) -> _Found | Fallback:
    """Returns what a trial of the model finds out, or why it failed.

    Args:
        trial: runs the model.
        what: names the trial, for the reason: "a trial of a batch".
    """
    try:
        return trial()
    except Exception as error:
        return Fallback(reason(error, what))


def reason(error: Exception, what: str) -> str:
    """Returns why a trial failed. An exception of Insitu's own is logged as an error.

    Args:
        error: what was raised.
        what: names the trial.
    """
    lines = str(error).strip().splitlines()
    message = f"{type(error).__name__}: {lines[0][:_LONGEST]}" if lines else type(error).__name__
    if is_own(error):
        logger.error("Insitu failed in %s; please report this", what, exc_info=error)
        return f"Insitu failed in {what} ({message})"
    return f"{what} raised {message}"


def is_own(error: Exception) -> bool:
    """Returns whether Insitu raised an exception without meaning to.

    Its documented errors are meant. Others are its own where no frame of the model comes after
    the last frame of Insitu.

    Args:
        error: what was raised.
    """
    if isinstance(error, InsituError):
        return False
    own = True
    frame: TracebackType | None = error.__traceback__
    while frame is not None:
        code = frame.tb_frame
        name = str(code.f_globals.get("__name__", ""))
        package = name.partition(".")[0]
        if package == "insitu" and not code.f_code.co_name.startswith(_CALLS_FOR_THE_MODEL):
            own = True
        elif name.startswith("torch.nn.modules") or package not in _BETWEEN:
            own = False
        frame = frame.tb_next
    return own
