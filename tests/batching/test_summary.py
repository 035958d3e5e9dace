import pytest

from insitu.batching.cost_model import Costs
from insitu.batching.pass_plan import PassPlan, Row
from insitu.batching.summary import Planned, Summary, summaries
from insitu.engine.fallback import Fallback, uncut
from insitu.graph.node import Site


def unknown(numbers: list[int], apart: Fallback | None) -> Summary:
    """The summary of a pass of which only its invocations are known."""
    rows = [Row(number, 0, 0, []) for number in numbers]
    return summaries([PassPlan(rows, 0, apart=apart)], None, lambda _: None)[0]


SHARED = Summary([0, 1], 1, 12, 4, 0, 2e9, "what they share", {0: 3e9, 1: 3e9})
REST = Summary([1, 2, 4, 5, 6], 5, 3, 2, 2, 1e9, "like their prompt", {1: 3e9, 2: 3e9, 4: 3e9})


def test_operations_are_added_up_and_each_invocation_counts_once() -> None:
    planned = Planned([SHARED, REST])
    assert planned.flops == 3e9
    assert planned.naive_flops == 12e9


def test_the_table_has_a_line_for_each_pass() -> None:
    lines = Planned([SHARED, REST]).explain().splitlines()
    assert [line.split() for line in lines] == [
        ["pass", "invocations", "rows", "positions", "blocks", "skipped", "GFLOP", "why"],
        ["0", "0-1", "1", "12", "4", "0", "2", "what", "they", "share"],
        ["1", "1-2,", "4-6", "5", "3", "2", "2", "1", "like", "their", "prompt"],
        "3 GFLOP; each invocation alone, in full: 12 (4.0 times as much)".split(),  # noqa: SIM905
    ]


@pytest.mark.parametrize(
    ("numbers", "shown"),
    [([3], "3"), ([0, 1, 2, 3], "0-3"), ([5, 0, 2], "0, 2, 5"), ([0, 2, 4, 6], "0, 2, 4, ... (4)")],
    ids=str,
)
def test_invocations_are_shown_shortly(numbers: list[int], shown: str) -> None:
    line = Planned([unknown(numbers, None)]).explain().splitlines()[1]
    assert f" {shown} " in line


def test_what_is_not_known_of_a_pass_is_not_shown() -> None:
    table = Planned([unknown([0], uncut(Site(0, "h.2", "output")))]).explain()
    assert "?" in table
    assert "`h[2].output` cannot be cut out of a batch" in table
    assert len(table.splitlines()) == 2


def test_costs_of_a_pass_by_hand() -> None:
    costs = Costs(
        blocks=3, token=10, pair=2, moved=5, scored=3, block=1000, call=100, unembedding=7
    )
    # Two blocks of 1 and 4 rows, 6 of 8 positions, 5 logits.
    tokens = (1 + 4) * 6
    flops = tokens * 10 + tokens * 8 * 2 + 5 * 7
    assert costs.flops([1, 4], 6, 8, 5) == flops
    assert costs.work([1, 4], 6, 8, 5) == flops + tokens * 5 + tokens * 8 * 3
    assert costs.time([1, 4], 6, 8, 5) == costs.work([1, 4], 6, 8, 5) + 2 * 1000 + 100
