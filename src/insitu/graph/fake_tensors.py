"""Running on tensors without data."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch._subclasses import FakeTensorMode

from insitu.graph.changes import changing
from insitu.graph.ordinary import ordinary_tensors


@contextmanager
def on_fake_tensors(
    mode: FakeTensorMode, *others: AbstractContextManager[Any] | None
) -> Generator[None, None, None]:
    """Runs its block on tensors without data. Autograd records nothing of it.

    Args:
        mode: makes the tensors.
        others: further contexts, entered in their order.
    """
    with changing() as changes:  # a mode that stayed would make all tensors fake
        # It prints failures, which are raised too.
        log = logging.getLogger("torch._subclasses.fake_tensor")
        changes.afterwards(partial(setattr, log, "disabled", log.disabled))
        log.disabled = True
        changes.enter(ordinary_tensors())
        changes.enter(mode)
        changes.gradients(False)
        for context in others:
            if context is not None:
                changes.enter(context)
        yield
