"""Optimisers that step before the gradients are there: inside of a block, or of its session.

Blocks run when they end. Until then `optimiser.step()` sees the gradients of nothing, or of an
earlier block, and would train by these or not at all.
"""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any

import torch.optim.optimizer as optimisation

from insitu.graph.autograd_history import computed_of
from insitu.graph.errors import BlockError
from insitu.graph.location import Location, Mark, here
from insitu.graph.recording import Recording

_waiting: weakref.WeakKeyDictionary[Recording, Mark] = weakref.WeakKeyDictionary()


def refuse_steps(recording: Recording, mark: Mark) -> None:
    """Lets optimisers of the user's tensors in a recording raise until its block runs.

    Args:
        recording: one with a backward pass.
        mark: the user's line that records it.
    """
    _waiting.setdefault(recording, mark)
    _look_before_steps()


@cache
def _look_before_steps() -> None:
    optimisation.register_optimizer_step_pre_hook(_check)


def _check(stepping: Any, args: Any, kwargs: Any) -> None:
    """Raises if the gradients that an optimiser is to use are still to come."""
    for one in _waiting.keyrefs():  # other threads may add to it meanwhile
        recording = one()
        mark = None if recording is None else _waiting.get(recording)
        if recording is None or mark is None:
            continue
        if not recording.open:
            _waiting.pop(recording, None)  # another thread may have found it too
            continue
        trained = {id(one) for group in stepping.param_groups for one in group["params"]}
        used = [one.tensor for one in recording.held.values()]
        # Also what they were computed of before, such as the weight of a parametrised layer.
        if trained & {*map(id, used), *computed_of(*used)}:
            raise BlockError(
                "This step comes before its gradients: the backward pass of this line runs when "
                f"its block or session ends.\n{Location(*mark)}\nStep after that, and with a "
                "block of its own for each step.",
                here(),
            )
