"""Standard names on every type of model that Transformers has: right by plain hooks, or refused.

Types are those of four of its auto classes. Each is built small, from its own default config, with
random weights; `every/judge.py` compares each name with what plain hooks see. `make architectures`
runs this with both generations of Transformers and writes docs/architectures.md from it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable

import pytest

from tests.fidelity.every.judge import judge
from tests.fidelity.every.models import CASES, inputs_for, small_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("task", "kind"), CASES, ids=[f"{task}-{kind}" for task, kind in CASES])
def test_names_of_every_type_are_right_or_refused(
    task: str, kind: str, record_property: Callable[[str, object], None]
) -> None:
    module = small_model(task, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = judge(module, inputs_for(module))
    cells = {column: (one.state, one.reason) for column, one in found.items()}
    record_property("verdicts", json.dumps({"task": task, "type": kind, "cells": cells}))
    bad = {column: cell for column, cell in cells.items() if cell[0] in ("wrong", "crash")}
    assert not bad, bad
    assert found["opens"].state == "right" or found["opens"].reason
