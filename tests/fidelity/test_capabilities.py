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
from tests.fidelity.capabilities import CAPABILITIES, KINDS, results, table
from tests.fidelity.zoo import EVERY

MODULES = (
    *(test_architectures, test_standard_names, test_named_weights, test_named_logits),
    *(test_named_gradients, test_named_prompts),
)
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
TITLES = [one.title for one in CAPABILITIES]


def names_in(module: ModuleType) -> list[str]:
    return [name for name in vars(module) if name.startswith("test_")]


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_test_of_architectures_shows_a_capability() -> None:
    listed = [test for one in CAPABILITIES for test in one.tests]
    assert sorted(listed) == sorted(name for module in MODULES for name in names_in(module))


def test_the_page_has_a_column_for_each_capability_and_a_row_for_each_architecture() -> None:
    head, _, *body = rows()
    assert head == ["architecture", *TITLES], "run `make architectures`"
    names = [row[0] for row in body if not row[0].startswith("*")]
    by_kind = [one.name for kind in KINDS for one in EVERY if one.kind == kind]
    assert names == by_kind, "run `make architectures`"


def test_cells_say_with_which_versions_or_why_not() -> None:
    text = PAGE.read_text()
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


def outcome(**bodies: str) -> dict[str, tuple[bool, str]]:
    """What comes of some capabilities of gpt2, of which all tests but those given pass."""
    cases = [
        CASE.format(test, "gpt2", bodies.get(test, ""))
        for one in CAPABILITIES
        for test in one.tests
    ]
    found = results(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    return {title: (found["gpt2", title].works, found["gpt2", title].reason) for title in TITLES}


def test_something_works_only_where_all_tests_of_it_ran_and_passed() -> None:
    assert set(outcome().values()) == {(True, "")}
    assert outcome(test_a_vector_steers=FAILED)["write"] == (False, "")
    assert outcome(test_a_vector_steers=SKIPPED)["write"] == (False, "why not")
    assert outcome(test_a_vector_steers=SKIPPED)["read"] == (True, "")


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
        CASE.format(test, one.name, "" if one.name != "mamba" else SKIPPED)
        for one in EVERY
        for capability in CAPABILITIES
        for test in capability.tests
    ]
    good = results(f"<testsuites>{''.join(cases)}</testsuites>")
    bad = results(f"<testsuites>{''.join(cases).replace('[gpt2]', '[none]')}</testsuites>")
    lines = table({"5.1.0": good, "4.9.0": bad}).splitlines()
    (gpt2,) = [line for line in lines if line.startswith("| gpt2 |")]
    assert gpt2 == f"| gpt2 |{' 5 |' * len(TITLES)}"
    (llama,) = [line for line in lines if line.startswith("| llama |")]
    assert llama == f"| llama |{' both |' * len(TITLES)}"
    (mamba,) = [line for line in lines if line.startswith("| mamba |")]
    assert mamba == f"| mamba |{' — (a) |' * len(TITLES)}"
    assert "- (a) why not." in lines
