"""The planner: from what invocations demand to passes, with nothing but plain data.

The blocks here have no model. What they read and write is recorded by hand, and what `models/`
finds out by trials is stated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.batching.asked import asked_by
from insitu.batching.causality import check_order
from insitu.batching.cost_model import Costs
from insitu.batching.crossings import uses
from insitu.batching.demand import Chain, Demand, Demands, Terms, Work
from insitu.batching.layout import Axis, TensorLayout
from insitu.batching.pass_plan import PassPlan, Row, alone
from insitu.batching.planner import plan_passes
from insitu.batching.shared_blocks import may_branch
from insitu.batching.summary import Facts, Planned, summaries
from insitu.engine.fallback import Fallback, uncut
from insitu.engine.plan import make_plan
from insitu.graph.errors import CausalityError, OperationError
from insitu.graph.intervention import write
from insitu.graph.location import mark
from insitu.graph.node import EVERY, Place, Site
from insitu.graph.proxy import Proxy
from insitu.graph.recording import Recording
from tests.batching.costs import CALLS, TOKENS

BLOCKS = [f"h.{number}" for number in range(4)]
HEAD = "lm_head"
PLACES: list[Place] = [
    (path, kind, 0)  # in the order in which they come
    for path, kind in [
        *((path, kind) for path in BLOCKS for kind in ("inputs", "input", "output")),
        (HEAD, "input"),
        (HEAD, "output"),
        ("", "output"),
    ]
]
MOMENTS = {place: at for at, place in enumerate(PLACES)}
LAYOUT = TensorLayout((Axis.ROWS, Axis.POSITIONS, Axis.FIXED))
TERMS = Terms(0, {}, dict.fromkeys(PLACES, LAYOUT), "right")
CHAIN = Chain(BLOCKS, frozenset(PLACES), frozenset(PLACES), frozenset(PLACES))
APART = Fallback("it is of one prompt at a time")


@dataclass
class Block:
    """A block that is recorded by hand."""

    recording: Recording = field(default_factory=Recording)

    def read(self, number: int, path: str, step: int = 0) -> Any:
        return Proxy(self.recording, self.recording.read((number, path, "output", 0, step), mark()))

    def write(self, number: int, path: str, value: Any) -> None:
        write(self.recording, (number, path, "output", 0, 0), value, False, mark())

    def work(self, count: int) -> Work:
        graph = self.recording.graph
        plan = make_plan(graph, self.recording.saves)
        return Work(graph, plan, asked_by(graph, plan, count), lambda _: MOMENTS)


def shared(length: int = 10, rows: int = 1, **others: Any) -> Demand:
    return Demand(rows, length, TERMS, **others)


def planned(block: Block, *each: Demand, **others: Any) -> list[PassPlan]:
    options = {"budget": 1000, "costs": CALLS, "blocks": BLOCKS, **others}
    return plan_passes(block.work(len(each)), Demands(each, **options))


def invocations(passes: list[PassPlan]) -> list[list[int]]:
    return [[row.invocation for row in single.rows] for single in passes]


def test_prompts_of_equal_terms_share_a_pass_and_others_have_their_own() -> None:
    block = Block()
    for number in range(5):
        block.read(number, "h.1").save()
    others = TERMS._replace(number=1)
    passes = planned(
        block,
        shared(),
        Demand(1, 10, others),
        shared(7, rows=3),
        Demand(1, 10, None, APART, differentiates=True),
        shared(like="longer than the rotary embeddings were trained for"),
    )
    assert invocations(passes) == [[0, 2], [1], [3], [4]]
    first, second, third, fourth = passes
    assert (first.positions, first.terms, first.apart, first.why) == (
        10, TERMS, None, "prompts of like length",
    )  # fmt: skip
    assert first.rows[1] == Row(2, 3, 7, [(2, "h.1", "output", 0, 0)])
    assert (second.terms, second.why) == (others, "one prompt")
    assert (third.terms, third.apart, third.differentiates) == (None, APART, True)
    assert fourth.why == "one prompt"


def test_passes_are_equal_for_equal_data() -> None:
    def once() -> list[PassPlan]:
        block = Block()
        block.write(1, "h.2", block.read(0, "h.2") * 2)
        return planned(block, shared(), shared(prompt="p"), shared(prompt="p"))

    assert once() == once()


def test_what_is_written_runs_after_the_pass_that_gives_it() -> None:
    block = Block()
    block.write(0, "h.0", block.read(1, "h.3") * 2)
    passes = planned(block, shared(), shared())
    assert invocations(passes) == [[1], [0]]
    block = Block()
    block.write(0, "h.3", block.read(1, "h.0") * 2)
    assert invocations(planned(block, shared(), shared())) == [[0, 1]]
    # Not if they may not share one, and not if lengths may be parted.
    assert invocations(planned(block, shared(), Demand(1, 10, None, APART))) == [[1], [0]]
    assert invocations(planned(block, shared(), shared(9))) == [[1], [0]]
    # Of a generation nothing parts lengths but the budget.
    tokens = {"costs": None, "budget": 1000}
    assert invocations(planned(block, shared(tokens=3), shared(9, tokens=3), **tokens)) == [[0, 1]]


def test_a_value_of_a_later_site_in_one_pass_is_found_beforehand() -> None:
    block = Block()
    block.write(0, "h.0", block.read(1, "h.3") * 2)
    block.write(1, "h.1", block.read(0, "h.1") * 2)
    work = block.work(2)
    passes = plan_passes(work, Demands([shared(), shared()], 1000, CALLS))
    assert invocations(passes) == [[0, 1]]  # each needs the other
    with pytest.raises(CausalityError, match="comes later in the run"):
        check_order(work, passes)


def test_invocations_that_need_each_other_and_cannot_share_are_refused() -> None:
    block = Block()
    block.write(0, "h.1", block.read(1, "h.1") * 2)
    block.write(1, "h.2", block.read(0, "h.2") * 2)
    assert invocations(planned(block, shared(), shared())) == [[0, 1]]
    why = uncut(Site(1, "h.1", "output"))
    with pytest.raises(CausalityError, match=r"what arrives at `h\[1\]\.output` cannot be cut"):
        planned(block, shared(), Demand(1, 10, None, why))
    with pytest.raises(CausalityError, match="they cannot run as one batch"):
        planned(block, shared(like=0), shared(like=1))


def test_values_of_every_step_that_are_used_together_share_a_pass_or_are_refused() -> None:
    block = Block()
    begun = len(block.recording.graph)
    (block.read(0, "h.1", EVERY) + block.read(1, "h.1", EVERY)).save()
    block.recording.graph.repeats = [(begun, len(block.recording.graph))]
    tokens = {"costs": None, "budget": 1}
    assert invocations(planned(block, shared(tokens=2), shared(3, tokens=2), **tokens)) == [[0, 1]]
    with pytest.raises(OperationError, match=r"take their steps together here \(it is of one"):
        planned(block, shared(tokens=2), Demand(1, 3, None, APART, tokens=2), **tokens)


def sweep(costs: Costs = CALLS, **others: Any) -> list[PassPlan]:
    """One prompt as it is, patched at a position of block 1, and scaled behind block 2."""
    block = Block()
    for number in range(3):
        block.read(number, HEAD)[0, -1].save()
    block.read(1, "h.0").save()
    block.read(1, "h.1")[0][:, 6] = 0
    block.write(2, "h.2", block.read(2, "h.2") * 2)
    each = [shared(prompt="p") for _ in range(3)]
    assert may_branch(each, block.work(3)) == {0: 0}
    given = {"chains": {0: CHAIN}, "costs": costs, "always": True, "head": HEAD, **others}
    return planned(block, *each, **given)


def test_rows_of_one_prompt_begin_where_they_leave_it() -> None:
    whole, later = sweep()
    assert [row.invocation for row in whole.rows] == [0]
    assert whole.invocations == [0, 1]  # what 1 reads before its patch is of the shared run
    assert (1, "h.0", "output", 0, 0) in whole.reads
    assert (whole.leaves, whole.caches, whole.through) == ({2, 3}, False, ("h.2", "output", 0))
    assert [(row.invocation, row.first_block, row.origin) for row in later.rows] == [
        (1, 2, 0),
        (2, 3, 0),
    ]
    assert (later.first_block, later.first_position, later.positions) == (2, 0, 10)
    assert later.through == ("h.2", "output", 0)
    assert later.why == "like their prompt up to blocks 1-2"


def test_positions_before_a_patch_are_left_out_where_that_pays() -> None:
    whole, *others = sweep(TOKENS)
    found = {row.invocation: single for single in others for row in single.rows}
    assert (found[1].first_position, found[1].positions) == (6, 4)
    assert found[2].first_position == 0
    assert whole.caches
    assert whole.through == ("h.3", "output", 0)  # keys and values are of all blocks
    assert found[1].why == "like their prompt up to block 1 and before position 6"
    assert found[1].logits is not None
    assert found[1].logits.positions == ((3,),)  # counted from the first that is computed


def test_only_the_logits_that_are_read_are_made() -> None:
    whole, later = sweep()
    assert whole.logits is not None
    assert whole.logits.positions == ((9,),)
    assert later.logits is not None
    assert (later.logits.positions, later.logits.most) == (((9,), (9,)), 1)
    assert all(single.logits is None for single in sweep(head=None))


def test_where_no_forward_begins_at_a_block_the_plan_says_why() -> None:
    (only,) = sweep(chains={0: Fallback("its blocks are not known")})
    assert [row.first_block for row in only.rows] == [0, 0, 0]
    assert only.why == (
        "prompts of like length; equal prompts share no blocks: its blocks are not known"
    )


def test_summaries_say_what_the_plans_do() -> None:
    passes = sweep()
    found = summaries(passes, Facts(BLOCKS, [HEAD], CALLS), lambda _: MOMENTS)
    assert [(one.rows, one.positions, one.run, one.skipped) for one in found] == [
        (1, 10, 4, 0),
        (2, 10, 2, 2),
    ]
    # Rows enter behind blocks 1 and 2, and each makes one position's logits.
    assert [one.flops for one in found] == [4 * 10 + 1, (1 + 2) * 10 + 2]
    assert found[1].alone == {1: 4 * 10 + 10, 2: 4 * 10 + 10}
    assert "like their prompt up to blocks 1-2" in Planned(found).explain()
    early = alone(0, Demand(1, 10), [(0, "h.1", "output", 0, 0)])
    (one,) = summaries([early], Facts(BLOCKS, [HEAD], CALLS), lambda _: MOMENTS)
    assert (one.run, one.reason) == (2, "one prompt; nothing is read after block 1")


Made = tuple[Block, list[Demand], dict[str, Any]]


@st.composite
def blocks(draw: Callable[..., Any]) -> Made:
    """Prompts that read, write and use each other, but never in both directions."""
    block, each = Block(), list[Demand]()
    earlier: list[Any] = []  # values of other invocations
    tokens = draw(st.sampled_from([0, 0, 3]))
    terms = [TERMS, TERMS._replace(number=1), None]
    for number in range(draw(st.integers(2, 7))):
        own = draw(st.sampled_from(terms))
        prompt = draw(st.sampled_from([None, "p", "q"])) if not tokens else None
        length = {"p": 4, "q": 9}.get(prompt) or draw(st.integers(1, 9))
        given = (own, None if own else APART, False, draw(st.integers(0, 1)) if tokens else None)
        each.append(
            Demand(1 if prompt else draw(st.integers(1, 3)), length, *given, prompt, tokens)
        )
        paths = draw(st.lists(st.sampled_from([*BLOCKS, HEAD]), max_size=2))
        values = [block.read(number, path)[:, -1] for path in paths]
        if draw(st.booleans()):
            path = draw(st.sampled_from(BLOCKS))
            there = block.read(number, path)
            if earlier and draw(st.booleans()):
                there[:, draw(st.integers(-length, length - 1))] = draw(st.sampled_from(earlier))
                block.write(number, path, there)
            else:
                block.write(number, path, there * 0.5)
        earlier += values
    costs = None if tokens else draw(st.sampled_from([CALLS, TOKENS]))
    options = {"budget": draw(st.integers(1, 60)), "costs": costs, "always": draw(st.booleans())}
    return block, each, {**options, "chains": {0: CHAIN, 1: CHAIN}, "head": HEAD}


@given(blocks())
def test_every_plan_can_run(made: Made) -> None:
    block, each, options = made
    work = block.work(len(each))
    passes = planned(block, *each, **options)
    home = [(address, at) for at, single in enumerate(passes) for address in single.reads]
    assert sorted(address for address, _ in home) == sorted(work.plan.reads)  # each once
    left: set[int] = set()
    for single in passes:
        own = [each[row.invocation] for row in single.rows]
        assert len({each[row.invocation].key(row.invocation) for row in single.rows}) == 1
        assert len(own) == 1 or all(demand.terms is not None for demand in own)
        longest = max(demand.length for demand in own)
        assert single.positions == longest - single.first_position
        tokens = sum(demand.rows for demand in own) * (single.positions + own[0].tokens)
        assert len(own) == 1 or tokens <= options["budget"]
        assert [row.first_block for row in single.rows] == sorted(
            row.first_block for row in single.rows
        )
        for row in single.rows:
            assert single.first_position <= row.first_position
            assert (row.origin is None) == (row.first_block == 0)
            assert row.origin is None or row.origin in left  # it has run before
        if single.leaves:
            left.update(row.invocation for row in single.rows)
    where = dict(home)
    for one in work.plan.writes:
        target = work.plan.places[work.plan.bits[one]]
        for address, at in home:
            if work.plan.needs[work.plan.writes[one]] & work.plan.bits[work.plan.reads[address]]:
                assert at <= where[target]
    check_order(work, passes)
    assert {*uses(work.graph, work.plan)} == {
        (source[0], target[0])
        for target in work.written
        for source in work.plan.reads
        if source[0] != target[0]
        and work.plan.needs[work.plan.writes[work.plan.reads[target]]]
        & work.plan.bits[work.plan.reads[source]]
    }
