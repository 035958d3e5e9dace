"""That the page says of every type of model what its judge has said, and no more."""

from __future__ import annotations

import json
from xml.sax.saxutils import quoteattr

from tests.fidelity.every.judge import COLUMNS
from tests.fidelity.every.page import MEANINGS, section, verdicts


def written(*rows: tuple[str, str, dict[str, tuple[str, str]]]) -> str:
    """What pytest writes of some types, as task, type and cells."""
    cases = "".join(
        f"<testcase><properties><property name='verdicts' value={quoteattr(told)}/></properties>"
        "</testcase>"
        for task, kind, cells in rows
        for told in [json.dumps({"task": task, "type": kind, "cells": cells})]
    )
    return f"<testsuites><testsuite>{cases}</testsuite></testsuites>"


def test_a_row_has_what_came_of_each_group_of_names() -> None:
    newest = verdicts(
        written(
            ("causal", "one", {"logits": ("right", ""), "heads": ("refused", "z: no heads")}),
            ("causal", "two", {"logits": ("wrong", "logits"), "heads": ("crash", "no")}),
            ("masked", "three", {"heads": ("refused", "z: no heads")}),
        )
    )
    oldest = verdicts(written(("causal", "one", {"logits": ("right", ""), "heads": ("right", "")})))
    totals, lines = section({"5.1": newest, "4.2": oldest})
    assert totals.startswith("3 types of model were tried with Transformers 5.1 and 4.2:")
    assert (
        "3 groups of names are right, 2 are refused with a reason, 1 are wrong, 1 fail." in totals
    )
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in lines if "|" in line}
    cell = {
        (kind, column): cells[COLUMNS.index(column)].strip()
        for kind, cells in rows.items()
        for column in COLUMNS
        if len(cells) == len(COLUMNS)
    }
    assert cell["one", "logits"] == "yes"
    assert cell["one", "heads"] == "(1) [5], yes [4]"
    assert cell["two", "logits"] == "**no** [5]"
    assert cell["two", "heads"] == "**error** [5]"
    assert cell["three", "heads"] == "(1) [5]"
    assert cell["three", "logits"] == "- [5]"
    assert "- (1) z: no heads." in lines


def test_every_column_has_a_meaning() -> None:
    assert tuple(MEANINGS) == COLUMNS
