"""Parameters of which the fast suite keeps some, and `make test-all` runs all."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def thinned(values: Iterable[Any], keep: Collection[Any]) -> list[Any]:
    """The values as parameters; those that are not kept are slow.

    Args:
        values: the values.
        keep: those that the fast suite runs with: one of each kind that code tells apart.
    """
    values = [*values]
    assert all(one in values for one in keep), "what is kept is one of the values"
    return [one if one in keep else pytest.param(one, marks=pytest.mark.slow) for one in values]
