"""What each invocation demands of the passes of a run: what the planner is given, as plain data.

`models/` finds out what of it depends on a model, by trials whose values are compared.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from insitu.batching.asked import NOTHING, Asked
from insitu.engine.plan import Plan, written
from insitu.graph.operations import READ

if TYPE_CHECKING:  # of no use to one prompt
    from insitu.batching.cost_model import Costs
    from insitu.batching.crossings import Moments
    from insitu.batching.layout import Layouts
    from insitu.engine.fallback import Fallback
    from insitu.graph.node import Address, Graph, Place

Side = Literal["left", "right"]
"""Where shorter prompts of a batch are padded."""

_NO_LAYOUTS: Layouts = {}


class Work(NamedTuple):
    """What the passes of a run are for.

    Attributes:
        graph: the recorded experiment.
        plan: its plan.
        asked: what each invocation asks of the pass that it runs in.
        moments: when the sites of an invocation come.
    """

    graph: Graph
    plan: Plan
    asked: Sequence[Asked]
    moments: Moments

    @property
    def written(self) -> list[Address]:
        """The sites that are written, in place or not."""
        return written(self.graph, self.plan)

    @property
    def differentiated(self) -> list[Address]:
        """The sites of whose values gradients are wanted."""
        if self.plan.gradients is None:
            return []
        rows = [self.graph.rows[base] for base in self.plan.gradients.renewed]
        return [row[1] for row in rows if row[0] is READ]


class Terms(NamedTuple):
    """What a pass is like that several invocations share.

    Attributes:
        number: equal for equal terms of a block.
        options: keyword arguments of the call.
        layouts: how values are cut into the parts of invocations.
        side: where shorter prompts are padded.
        asked: what its invocations ask of it.
        later: how values are cut in the later steps of a generation.
    """

    number: int
    options: Mapping[str, Any]
    layouts: Layouts
    side: Side
    asked: Asked = NOTHING
    later: Layouts = _NO_LAYOUTS


class Demand(NamedTuple):
    """What an invocation demands.

    Attributes:
        rows: how many rows its prompt has; 0 where that is not known.
        length: how many positions each of them has.
        terms: on which terms it shares a pass with others; None if it shares none.
        apart: why it shares none, if others do or could.
        differentiates: whether autograd records its pass.
        like: equal for invocations of equal terms that are in one pass what they are alone.
        prompt: equal for equal prompts of equal terms, whose blocks may run once for all of them;
            None if they may not.
        tokens: how many tokens it may get at most, where it is generated.
    """

    rows: int = 0
    length: int = 0
    terms: Terms | None = None
    apart: Fallback | None = None
    differentiates: bool = False
    like: Hashable = None
    prompt: Hashable = None
    tokens: int = 0

    def key(self, number: int) -> Hashable:
        """Returns a key that is equal for invocations that may share a pass.

        Args:
            number: the number of the invocation.
        """
        return number if self.terms is None else (self.terms.number, self.like)


class Chain(NamedTuple):
    """Blocks that a model runs one after the other, each on what the one before it returned.

    Attributes:
        paths: their paths.
        whole: the places at which what arrives has a row for each row of the blocks' batch.
        tails: those of them at which positions can be left out too.
        handed: those of them at which a block is given just what the one before it returned.
    """

    paths: Sequence[str]
    whole: frozenset[Place]
    tails: frozenset[Place]
    handed: frozenset[Place]


_NO_CHAINS: Mapping[int, Chain | Fallback] = {}


class Demands(NamedTuple):
    """What all invocations of a block demand, and what the planner must know of the model.

    Attributes:
        each: what each invocation demands.
        budget: how many tokens a pass may have, where it has several invocations.
        costs: what forwards cost; None where only the budget divides prompts.
        always: whether blocks run once for several invocations wherever they can, also at a loss.
        chains: the blocks at which a forward can begin, or why it can begin at none, by the number
            of the terms. It is asked for those of `may_branch`.
        blocks: the paths of the model's blocks.
        head: the module that makes logits, if a forward can make those of some positions only.
    """

    each: Sequence[Demand]
    budget: int = 0
    costs: Costs | None = None
    always: bool = False
    chains: Mapping[int, Chain | Fallback] = _NO_CHAINS
    blocks: Sequence[str] = ()
    head: str | None = None
