"""What a block would give and what it would take, which is the same for all blocks of its shape.

What a plan does not depend on, the tokens of prompts and the content of tensors, this does not
depend on either: without data nobody sees it. So it is kept with the plan.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from insitu.batching.procedure import Subject
from insitu.batching.summary import Planned, Summary
from insitu.engine.budget import Budget
from insitu.engine.counting import Counts
from insitu.engine.probe import Call, ambient
from insitu.graph.errors import UnknownShapeError
from insitu.graph.operations import KEEP, SAVE
from insitu.graph.shapes import dtype_of, outlined, shape_of
from insitu.graph.structure import tensors_of
from insitu.tracing.graph_costs import GraphCosts, graph_costs
from insitu.tracing.planning import Prepared, explained
from insitu.tracing.run import Run
from insitu.tracing.running import prepare

_NONE = Counts(0.0, 0, 0, 0)
_MOST = 16  # checks that are kept with a plan: it is one for prompts of many lengths


@dataclass(frozen=True, slots=True)
class Expected:
    """A saved value, before there is one.

    Attributes:
        shape: the size of the tensor, or sizes in the structure of a nested value; None if that is
            not known before the run.
        dtype: its dtype, or dtypes in the structure of the value; None if not known.
        bytes: how many bytes it takes; None if not known.
        reason: why something of it is not known, or what it is an estimate of; "" if it is certain.
    """

    shape: Any
    dtype: Any
    bytes: int | None
    reason: str = ""


class PassCosts(NamedTuple):
    """What the passes of a block take.

    Attributes:
        flops: floating-point operations of the model.
        bytes: what the largest pass holds at once, beside the weights.
        how: how the numbers were made.
    """

    flops: float
    bytes: int
    how: str


class BlockCheck(NamedTuple):
    """What a block would give and what it would take.

    Attributes:
        plan: its passes.
        costs: what they take.
        recorded: what the recorded operations take.
        saves: what each save would give, by its node.
    """

    plan: Planned
    costs: PassCosts
    recorded: GraphCosts
    saves: Mapping[int, Expected]


def check_block(run: Run, budget: Budget | None = None) -> BlockCheck:
    """Returns what a block would give and what it would take.

    Args:
        run: the block, which will not run.
        budget: what may be spent, None if nothing is limited.

    Raises:
        LimitError: if it takes more, at the line of the operation.
        InsituError: if something is wrong with the run, as far as that is found beforehand.
    """
    prepared, _ = prepare(run, dry=True)
    form = _form(run, budget)
    known = prepared.checks.get(form)
    # A server checks the same form again and again: that takes a quarter of the first time.
    if isinstance(known, BlockCheck):
        return known
    found = _checked(run, prepared, budget)
    prepared.checks[_form(run, budget)] = found  # by now it is known whether contents matter
    while len(prepared.checks) > _MOST:
        prepared.checks.pop(next(iter(prepared.checks)), None)
    return found


def _form(run: Run, budget: Budget | None) -> Hashable:
    """What it depends on beside the graph and the model.

    What has passed under limits passes under the same ones.
    """
    lines, model = run.lines, run.model
    calls = [run.call(number) for number in range(len(run.requests))]
    return (
        None if budget is None else budget.limits,
        str(ambient()),
        (*lines.casts.items(),),
        lines.dtype,
        *(call.signature() for call in calls),
        *(call.contents() for call in calls if model.depends_on_contents(call)),
        *(run.procedure.steps_of(request) for request in run.requests),
    )


def _checked(run: Run, prepared: Prepared, budget: Budget | None) -> BlockCheck:
    plan, lines = explained(run), run.lines
    costs = _pass_costs(run, plan)
    counts = [run.procedure.steps_of(request) for request in run.requests]
    # As many as any of the prompts may have.
    steps = max([count or 1 for count in counts])
    recorded = graph_costs(lines, prepared.plan, steps, budget)
    saves = {
        index: _expected(run, index)
        for index, row in enumerate(lines.graph.rows)
        if row[0] in (SAVE, KEEP)
    }
    return BlockCheck(plan, costs, recorded, saves)


def _expected(run: Run, index: int) -> Expected:
    """What a save would give."""
    lines, procedure = run.lines, run.procedure
    graph = lines.graph
    try:
        value, reason = lines.fakes[index], ""
    except KeyError:
        try:
            value, reason = outlined(lines, index), "of a later step: sizes are those of the first"
        except UnknownShapeError as error:
            return Expected(None, None, None, str(error).splitlines()[0])
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(value))
    if graph.repeats_node(index):
        counts = [procedure.steps_of(request) for request in run.requests]
        known = [count for count in counts if count is not None]
        steps = max(known) if len(known) == len(counts) else None
        # The generation says when it ends, which no check can know.
        if steps is None:
            return Expected(shape_of(value), dtype_of(value), None, "a list, of unknown length")
        size *= steps
        reason = f"a list of at most {steps}, of which the first has this shape"
    if index in graph.optional:
        reason = reason or "it may be missing"
    return Expected(shape_of(value), dtype_of(value), size, reason)


def _pass_costs(run: Run, plan: Planned) -> PassCosts:
    """Returns what the model's passes of a block take.

    Args:
        run: the block.
        plan: its passes.
    """
    calls = [run.call(number) for number in range(len(run.requests))]
    counts = _counted(run.model, calls)
    steps = [run.procedure.steps_of(request) or 1 for request in run.requests]
    keeps = run.lines.graph.differentiates
    flops, most = 0.0, 0
    ways: set[str] = set()
    for single in plan.passes:
        own = [(calls[number], counts[number]) for number in single.invocations]
        most_steps = max(steps[number] for number in single.invocations)
        if single.flops:
            flops += single.flops
            ways.add("by the sizes of the blocks that its passes run")
        else:
            flops += sum(
                counts[at].flops * (1 + (steps[at] - 1) / _places(calls[at])[1])
                for at in single.invocations
            )
            ways.add(
                "left out: no forward can be made without data"
                if _NONE in (count for _, count in own)
                else "in forwards without data" + ", further steps in proportion" * (most_steps > 1)
            )
        most = max(most, _bytes(single, own, most_steps, keeps))
    return PassCosts(flops, most, " and ".join(sorted(ways)))


def _counted(model: Subject, calls: Sequence[Call]) -> list[Counts]:
    """What a forward of each prompt takes; nothing where that cannot be counted."""
    known: dict[str, Counts] = {}
    found: list[Counts] = []
    for call in calls:
        signature = call.signature()
        if signature not in known:
            try:
                known[signature] = model.count(call)
            except UnknownShapeError:
                known[signature] = _NONE
        found.append(known[signature])
    return found


def _places(call: Call) -> tuple[int, int]:
    """How many rows and positions a call has: those of a decoder, if it has one."""
    for name in ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds"):
        given = call.kwargs.get(name)
        if isinstance(given, torch.Tensor):
            return given.shape[0], max(given.shape[1], 1)
    return 1, 1


def _bytes(single: Summary, own: Sequence[tuple[Call, Counts]], steps: int, keeps: bool) -> int:
    """What a pass holds at once: with `keeps`, all that autograd may keep of it."""
    found = 0.0
    for call, count in own:
        rows, positions = _places(call)
        # Autograd may keep all that the forward has made.
        held = count.peak + (count.made if keeps else 0)
        held += count.left * (steps - 1) / positions  # its cache grows with each step
        if single.rows:  # which of its own places it shares with others is not looked at
            held *= single.rows * single.positions / (rows * positions * len(own))
        found += held
    return int(found)
