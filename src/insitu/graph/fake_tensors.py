"""Running on tensors without data."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch._subclasses import FakeTensorMode

from insitu.graph.changes import changing
from insitu.graph.ordinary import ordinary_tensors


@contextmanager
def on_fake_tensors(
    mode: FakeTensorMode, *others: AbstractContextManager[Any] | None
) -> Generator[None, None, None]:
    """Runs its block on tensors without data, of which autograd records nothing.

    Args:
        mode: makes the tensors.
        others: further contexts, entered in their order.
    """
    with changing() as changes:  # a mode that stayed would make all tensors fake
        changes.enter(unlogged_failures())
        changes.enter(ordinary_tensors())
        changes.enter(mode)
        changes.gradients(False)
        for context in others:
            if context is not None:
                changes.enter(context)
        yield


@contextmanager
def unlogged_failures() -> Generator[None, None, None]:
    """Keeps torch from printing failures on fake tensors, which are raised too."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled = log.disabled
    try:
        try:
            log.disabled = True
            yield
        finally:
            log.disabled = was_disabled
    finally:
        log.disabled = was_disabled  # an exception may come at any line, also at the one above
