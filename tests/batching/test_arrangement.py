"""How runs become passes: each in one, after what it uses, within the budget, the cheapest way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.batching.arrangement import CircleError, Edges, Group, arrange
from insitu.batching.cost_model import Costs
from insitu.batching.pass_plan import Row, rows_by_level
from tests.batching.costs import CALLS, TOKENS


def whole(invocation: int, length: int, rows: int = 1) -> Row:
    return Row(invocation, rows, length, [])


def later(invocation: int, level: int, start: int = 0, base: int = 0, length: int = 10) -> Row:
    return Row(invocation, 1, length, [], level, start, base)


def arranged(rows: list[Row], edges: Edges, costs: Costs | None, budget: int) -> list[Group] | None:
    """The passes of rows that may all share one."""
    return arrange(rows, [0] * len(rows), edges, costs, budget)


def members(groups: list[Group] | None) -> list[list[int]]:
    assert groups is not None
    return [sorted(numbers) for numbers, _ in groups]


def test_like_lengths_share_a_pass_as_far_as_padding_is_cheaper_than_a_call() -> None:
    runs = [whole(0, 10), whole(1, 3), whole(2, 10), whole(3, 3)]
    assert members(arranged(runs, {}, CALLS, 1000)) == [[0, 1, 2, 3]]
    assert members(arranged(runs, {}, TOKENS, 1000)) == [[1, 3], [0, 2]]


def test_what_is_used_comes_before_what_uses_it() -> None:
    runs = [whole(number, 5) for number in range(4)]
    edges = {(3, 2): False, (2, 0): False, (1, 0): True}
    assert members(arranged(runs, edges, CALLS, 1000)) == [[1, 3], [2], [0]]


def test_one_pass_does_for_what_is_used_at_a_later_site() -> None:
    runs = [whole(number, 5) for number in range(3)]
    assert members(arranged(runs, {(2, 0): True, (1, 2): True}, CALLS, 1000)) == [[0, 1, 2]]


def test_runs_that_need_each_other_share_a_pass_whatever_the_budget() -> None:
    runs = [whole(number, 5) for number in range(3)]
    edges = {(0, 1): False, (1, 2): False, (2, 0): False}
    assert members(arranged(runs, edges, TOKENS, 1)) == [[0, 1, 2]]


def test_runs_that_need_each_other_do_not_begin_at_blocks() -> None:
    runs = [whole(0, 10), later(1, 1), later(2, 1)]
    edges = {(0, 1): False, (0, 2): False, (1, 2): True, (2, 1): True}
    assert arranged(runs, edges, CALLS, 1000) is None


def test_runs_that_leave_out_blocks_share_a_pass_after_the_one_that_has_run_them() -> None:
    runs = [whole(0, 10), later(1, 3), later(2, 1), later(3, 2)]
    edges = {(0, number): False for number in (1, 2, 3)}
    assert members(arranged(runs, edges, CALLS, 1000)) == [[0], [1, 2, 3]]


def test_positions_that_are_left_out_are_those_of_all_in_the_pass() -> None:
    runs = [whole(0, 10), later(1, 1, start=2), later(2, 1, start=8), later(3, 1, start=9)]
    edges = {(0, number): False for number in (1, 2, 3)}
    assert [(members([g])[0], g[1]) for g in arranged(runs, edges, CALLS, 1000) or ()] == [
        ([0], 0),
        ([1, 2, 3], 2),
    ]
    starts = [start for _, start in arranged(runs, edges, TOKENS, 1000) or ()]
    assert starts == [0, 2, 8, 9]


def test_lengths_are_not_mixed_where_blocks_are_left_out() -> None:
    runs = [whole(0, 10), whole(1, 7), later(2, 1), later(3, 1, base=1, length=7)]
    edges = {(0, 2): False, (1, 3): False}
    assert members(arranged(runs, edges, CALLS, 1000)) == [[0, 1], [2], [3]]


def test_rows_enter_at_their_levels() -> None:
    runs = [later(0, 2), later(1, 1), later(2, 3), Row(3, 2, 10, [], 3)]
    assert rows_by_level(runs, 5) == [1, 2, 5, 5]
    assert rows_by_level([whole(0, 4, rows=3)], 2) == [3, 3]


@st.composite
def work(draw: Callable[..., Any]) -> tuple[list[Row], dict[tuple[int, int], bool]]:
    """Prompts that use each other, but none of them itself, and runs that go on from them."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=7))
    runs = [Row(number, rows, length, []) for number, (rows, length) in enumerate(sizes)]
    order = draw(st.permutations(range(len(runs))))
    edges: dict[tuple[int, int], bool] = {}
    for at, target in enumerate(order):
        for source in draw(st.sets(st.sampled_from(order[:at]), max_size=2)) if at else ():
            alike = runs[source].length == runs[target].length
            edges[source, target] = alike and draw(st.booleans())
    for base in draw(st.lists(st.integers(0, len(runs) - 1), max_size=6)):
        rows, length = sizes[base]
        level, start = draw(st.integers(1, 4)), draw(st.integers(0, length - 1))
        edges[base, len(runs)] = False
        runs.append(Row(len(runs), rows, length, [], level, start, base))
    return runs, edges


@given(work(), st.integers(1, 60), st.sampled_from([CALLS, TOKENS]))
def test_passes_are_right_whatever_is_to_be_done(
    given_work: tuple[list[Row], dict[tuple[int, int], bool]], budget: int, costs: Costs
) -> None:
    runs, edges = given_work
    groups = arranged(runs, edges, costs, budget)
    assert groups is not None
    home = {number: at for at, (numbers, _) in enumerate(groups) for number in numbers}
    assert sorted(number for numbers, _ in groups for number in numbers) == list(range(len(runs)))
    for numbers, start in groups:
        own = [runs[number] for number in numbers]
        length = max(run.length for run in own) - start
        assert len(own) == 1 or sum(run.rows for run in own) * length <= budget
        assert all(start <= run.first_position for run in own)
        assert len({bool(run.first_block) for run in own}) == 1
        if own[0].first_block:
            assert len({run.length for run in own}) == 1
    for (source, target), shares in edges.items():  # they run in the order in which they are given
        assert home[source] < home[target] or (shares and home[source] == home[target])


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(0, 2)), min_size=1),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans()), max_size=9),
    st.integers(1, 60),
    st.sampled_from([CALLS, TOKENS, None]),
)
def test_what_may_share_does_whoever_uses_whom(
    sizes: list[tuple[int, int, int]],
    pairs: list[tuple[int, int, bool]],
    budget: int,
    costs: Costs | None,
) -> None:
    rows = [Row(number, count, length, []) for number, (count, length, _) in enumerate(sizes)]
    keys = [key for _, _, key in sizes]
    found = {(a % len(rows), b % len(rows)): shares for a, b, shares in pairs}
    edges = {pair: shares for pair, shares in found.items() if pair[0] < pair[1]}
    groups = arrange(rows, keys, edges, costs, budget)
    assert groups is not None
    home = {number: at for at, (numbers, _) in enumerate(groups) for number in numbers}
    assert home.keys() == set(range(len(rows)))
    for numbers, _ in groups:
        assert len({keys[number] for number in numbers}) == 1
    for (source, target), shares in edges.items():
        assert home[source] < home[target] or (shares and home[source] == home[target])


def test_passes_that_would_need_each_other_run_later_instead() -> None:
    """0 goes into 2, and 3 into 1, at later sites: one pass would do for each pair."""
    rows = [whole(number, 5) for number in range(4)]
    edges = {(0, 2): True, (3, 1): True}
    assert members(arrange(rows, [0, 0, 1, 1], edges, CALLS, 1000)) == [[0], [3], [1], [2]]
    assert members(arrange(rows, [0, 0, 1, 1], {(0, 2): True}, CALLS, 1000)) == [[0, 1], [2, 3]]


def test_rows_that_need_each_other_and_may_not_share_are_named() -> None:
    rows = [whole(number, 5) for number in range(3)]
    with pytest.raises(CircleError) as caught:
        arrange(rows, [0, 1, 0], {(0, 1): True, (1, 0): True}, CALLS, 1000)
    assert {0, 1} <= set(caught.value.rows)


def test_without_costs_only_the_budget_divides_and_tokens_to_come_count() -> None:
    rows = [Row(number, 1, length, [], tokens=10) for number, length in enumerate([30, 2, 3, 4])]
    assert members(arrange(rows, [0] * 4, {}, None, 160)) == [[0, 1, 2, 3]]
    assert members(arrange(rows, [0] * 4, {}, None, 159)) == [[1, 2, 3], [0]]
    assert members(arrange(rows, [0] * 4, {}, None, 1)) == [[1], [2], [3], [0]]
