"""That docs/architectures.md says of every architecture what its tests have shown, and no more."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.fidelity import (
    test_architectures,
    test_named_gradients,
    test_named_logits,
    test_named_prompts,
    test_named_weights,
    test_standard_names,
)
from tests.fidelity.capabilities import CAPABILITIES, KINDS, Capability, results, table
from tests.fidelity.zoo import EVERY
from tests.fidelity.zoo.absent import ABSENT

MODULES = (
    *(test_architectures, test_standard_names, test_named_weights, test_named_logits),
    *(test_named_gradients, test_named_prompts),
)
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
TITLES = [one.title for one in CAPABILITIES]


def names_in(module: ModuleType) -> list[str]:
    return [name for name in vars(module) if name.startswith("test_")]


def in_depth() -> str:
    """The part of the page on what is tested in depth."""
    return PAGE.read_text().partition("## Tested in depth")[2]


def rows() -> list[list[str]]:
    lines = [line for line in in_depth().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_test_of_architectures_shows_a_capability_or_that_it_is_not_there() -> None:
    listed = [test for one in CAPABILITIES for test in one.tests]
    absences = {one.absence for one in CAPABILITIES if one.absence}
    assert len(listed) == len(set(listed)) and not absences & set(listed)
    assert {*listed, *absences} == {name for module in MODULES for name in names_in(module)}


def test_what_is_not_there_is_written_down_of_what_there_is() -> None:
    assert set(ABSENT) == {one.title for one in CAPABILITIES if one.absence}
    names = {one.name for one in EVERY}
    for absent in ABSENT.values():
        assert set(absent) < names and all(absent.values())


def test_no_cell_says_that_something_works_which_is_not_there() -> None:
    cells = {
        (row[0], title): cell
        for row in rows()[2:]
        for title, cell in zip(TITLES, row[1:], strict=True)
    }
    for title, absent in ABSENT.items():
        for name in absent:
            assert cells[name, title][0] in "—*", (name, title)


def test_the_page_has_a_column_for_each_capability_and_a_row_for_each_architecture() -> None:
    head, _, *body = rows()
    assert head == ["architecture", *TITLES], "run `make architectures`"
    names = [row[0] for row in body if not row[0].startswith("*")]
    by_kind = [one.name for kind in KINDS for one in EVERY if one.kind == kind]
    assert names == by_kind, "run `make architectures`"


def test_cells_say_with_which_versions_or_why_not() -> None:
    text = in_depth()
    versions = re.search(r"with\s+Transformers\s+(\S+)\s+and\s+(\S+)\.", text)
    assert versions is not None
    for row in rows()[2:]:
        for cell in row[1:] if not row[0].startswith("*") else ():
            assert re.fullmatch(r"both|\*\*no\*\*|\d|— \([a-z]\)", cell), (row[0], cell)
            if cell.startswith("—"):
                assert f"\n- {cell[2:]} " in text


CASE = '<testcase classname="tests.fidelity" name="{}[{}]">{}</testcase>'
SKIPPED = '<skipped message="why not"/>'
FAILED = '<failure message="it failed"/>'


def outcome(name: str = "gpt2", **bodies: str) -> dict[str, tuple[bool, str]]:
    """What comes of the capabilities of one architecture.

    Args:
        name: which.
        bodies: what came of some tests of those that it has, if not that they passed; "none" if
            they did not run.
    """
    tests = [test for one in CAPABILITIES for test in shown_by(one, name)]
    cases = [
        CASE.format(test, name, bodies.get(test, ""))
        for test in dict.fromkeys(tests)
        if bodies.get(test) != "none"
    ]
    found = results(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    return {title: (found[name, title].works, found[name, title].reason) for title in TITLES}


def shown_by(one: Capability, name: str) -> tuple[str, ...]:
    """Which tests are about a capability of an architecture: of it, or that it is not there."""
    return (one.absence,) if name in ABSENT.get(one.title, {}) else one.tests


def test_something_works_only_where_all_tests_of_it_ran_and_passed() -> None:
    every = outcome()
    assert every.pop("experts") == (False, "it has no experts")
    assert set(every.values()) == {(True, "")}
    for body in (FAILED, SKIPPED, "none"):
        found = outcome(test_a_vector_steers=body)
        assert found["write"] == (False, "")
        assert found["read"] == (True, "")


def test_something_is_not_there_only_where_a_test_of_that_ran_and_passed() -> None:
    assert outcome("mamba")["heads"] == (False, "it has no attention")
    for body in (FAILED, SKIPPED, "none"):
        found = outcome("mamba", test_without_attention_nothing_has_a_name_of_its=body)
        assert found["heads"] == found["patterns"] == (False, "")
        assert found["W_Q"] == (False, "it has no attention")


def test_what_did_not_run_is_said_not_to_work() -> None:
    case = CASE.format("test_the_blocks_are_found", "gpt2", "")
    found = results(f"<testsuites>{case}</testsuites>")
    assert not found["gpt2", "read"].works  # one of its two tests is missing
    assert "does not have it" in found["llama", "read"].reason


@pytest.mark.parametrize(
    ("given", "name"),
    [("in place-gpt2", "gpt2"), ("falcon-parallel", "falcon-parallel"), ("falcon-x", "falcon")],
)
def test_architectures_are_told_apart_among_parameters(given: str, name: str) -> None:
    test = "test_what_a_model_notes_of_its_blocks_is_what_was_written"
    case = CASE.format(test, given, "")
    found = results(f"<testsuites>{case}</testsuites>")
    assert [key for key, result in found.items() if result.works] == [(name, "noted")]


def test_versions_are_told_apart() -> None:
    cases = [
        CASE.format(test, one.name, "")
        for one in EVERY
        for test in dict.fromkeys(t for each in CAPABILITIES for t in shown_by(each, one.name))
    ]
    good = results(f"<testsuites>{''.join(cases)}</testsuites>")
    bad = results(f"<testsuites>{''.join(cases).replace('[gpt2]', '[none]')}</testsuites>")
    lines = table({"5.1.0": good, "4.9.0": bad}).splitlines()
    cells = {line.split(" ")[1]: line.strip("| ").split(" | ")[1:] for line in lines if "|" in line}
    at = TITLES.index("experts")
    assert cells["gpt2"][:at] == ["5"] * at and cells["gpt2"][at] == "— (a)"
    assert set(cells["llama"]) == {"both", "— (a)"} and cells["llama"][at] == "— (a)"
    assert cells["mixtral"][at] == "both"
    assert "- (a) it has no experts." in lines
    mamba = dict(zip(TITLES, cells["mamba"], strict=True))
    assert mamba["heads"] == mamba["patterns"] == mamba["W_Q"] != mamba["experts"]
    assert f"- {mamba['heads'][2:]} it has no attention." in lines
