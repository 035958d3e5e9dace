"""Parameters of which some suites run a part: `make test` the fewest, and `make test-all` all."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def thinned(values: Iterable[Any], keep: Collection[Any]) -> list[Any]:
    """The values as parameters; those that are not kept are slow: `make test-all` runs them.

    Args:
        values: the values.
        keep: those that CI runs too: one of each kind that code tells apart.
    """
    return _marked(values, keep, pytest.mark.slow)


def sampled(values: Iterable[Any], keep: Collection[Any]) -> list[Any]:
    """The values as parameters; those that are not kept are thorough: CI runs them.

    Args:
        values: the values, or what `thinned` has made of them.
        keep: those that `make test` runs too: one or two that stand for all.
    """
    return _marked(values, keep, pytest.mark.thorough)


def _marked(values: Iterable[Any], keep: Collection[Any], mark: pytest.MarkDecorator) -> list[Any]:
    values = [*values]
    assert all(one in values for one in keep), "what is kept is one of the values"
    return [
        one if one in keep or isinstance(one, ParameterSet) else pytest.param(one, marks=mark)
        for one in values
    ]
