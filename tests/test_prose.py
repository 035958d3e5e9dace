"""Pages, docstrings and messages are plain English: see `tests/prose.py` for what that means."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.prose import docstring_faults, faults, message_faults, page_faults

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "insitu").rglob("*.py"))
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for folder in ("docs", "src", "training")
    for page in (ROOT / folder).rglob("*.md")
) + sorted(page.name for page in ROOT.glob("*.md"))

NOT_YET = frozenset[str]()
"""Pages that are not plain yet. A page that is leaves this list, and none comes in."""


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_plain(page: str) -> None:
    found = page_faults(ROOT / page)
    if page in NOT_YET:
        assert found, f"{page} is plain now: take it off the list"
    else:
        assert found == []


def test_the_list_of_pages_that_are_not_plain_only_shrinks() -> None:
    assert NOT_YET.issubset(PAGES)
    assert len(NOT_YET) == MOST, "a page that is plain leaves both the list and the number"


MOST = 0
"""How many pages are on the list. It may only go down."""


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_docstrings_and_messages_are_plain(source: Path) -> None:
    text = source.read_text()
    assert docstring_faults(text) == []
    assert message_faults(text) == []


LONG = " ".join(["Word"] * 36) + "."


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (LONG, "36 words"),
        ("It is short. " + LONG, "36 words"),
        ("Finds what is wrong.", "`what is`"),
        ("What is not named is left out.", "`What is`"),
        ("kwargs: likewise.", "`likewise`"),
        ("It runs whatever comes.", "`whatever`"),
        ("Two values, of which one is kept.", "`of which`"),
        ("Which it is, is found out later.", "`is found out`"),
        ("Short (and what is in it). Then more.", "`what is`"),
    ],
)
def test_a_bad_sentence_is_found(text: str, fault: str) -> None:
    (found,) = faults(text)
    assert found.startswith(fault)


@pytest.mark.parametrize(
    "text",
    [
        " ".join(["word"] * 35) + ".",
        " ".join(["word"] * 30) + ". " + " ".join(["Word"] * 30) + ".",
        " ".join(["word"] * 30) + " `a long line of code that counts once, and no more than that`.",
        "What is a site?",
        'Not "what is ...", and no "likewise".',
        "It finds out of what it is made, and what it holds.",
        "One sentence ends in `code`. `Another` begins with it.",
        "Whatsoever, what isn't.",
    ],
)
def test_a_good_sentence_is_left_alone(text: str) -> None:
    assert [*faults(text)] == []


def test_a_page_is_cut_into_its_sentences(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    half = " ".join(["word"] * 20)
    page.write_text(
        f"# {half}\n\n- {half}\n- {half}\n\n| {half} | {half} |\n| --- | --- |\n"
        f"| {half} | {half} |\n"
        f"\n```python\nwhatever = 'likewise'\n```\n\n```text\n{LONG}\n```\n\n[{half}](of which)\n"
    )
    assert page_faults(page) == []
    page.write_text(
        f"{half}\n{half}.\n\n- It says what is there.\n\n| a | likewise |\n| --- | --- |\n"
    )
    assert [fault.partition(":")[0] for fault in page_faults(page)] == [
        "40 words",
        "`what is`",
        "`likewise`",
    ]


def test_docstrings_are_cut_into_their_sentences() -> None:
    half = " ".join(["word"] * 20)
    source = f'''"""{half}."""

LIMIT = 3
"""What is allowed."""


def function(first, second):
    """Does it.

    Args:
        first: {half}
        second: {half}, likewise
            {half}

    Example:
        >>> whatever = "of which"
        >>> print("{LONG}")
        what is printed
    """
    note = "likewise"
'''
    found = docstring_faults(source)
    assert [fault.partition(": ")[2].partition(":")[0] for fault in found] == [
        "`What is`",
        "41 words",
        "`likewise`",
    ]
    assert found[0].startswith("line 4:")


def test_messages_are_found_in_errors_and_warnings_alone() -> None:
    source = (
        "x = 'likewise'\n"
        "raise OptionError(f'{name!r} is what is ' + 'meant.', here())\n"
        "warnings.warn('Whatever comes.')\n"
        "raise errors.PathError('A line\\nAnother line')\n"
        "print('likewise')\n"
    )
    assert [fault.partition(": ")[0::2] for fault in message_faults(source)] == [
        ("line 2", "`what is`: thing is what is meant. ..."),
        ("line 3", "`Whatever`: Whatever comes. ..."),
    ]


def test_the_checker_is_short() -> None:
    assert len((ROOT / "tests" / "prose.py").read_text().splitlines()) < 100
