"""What trials of a model have in common: how many tokens they take, and how values are compared."""

from __future__ import annotations

from typing import Any

POSITIONS = 8  # of the prompt: what a model is made of does not depend on how long that is


def difference(value: Any, other: Any) -> Any:
    """Returns by how much a value differs from another, as a share of that one's norm.

    Args:
        value: the value, recorded or not.
        other: the other.
    """
    size = other.float().norm().clamp(min=1e-12)
    return (value.float() - other.float()).norm() / size
