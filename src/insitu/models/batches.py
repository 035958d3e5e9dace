"""The passes of a `trace` with several prompts: what is batched, shared and left out."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from insitu.batching.arrangement import Group, Run, arrange
from insitu.batching.procedure import Work
from insitu.batching.shared_blocks import Chain, Given, find_runs, part_of
from insitu.batching.touched_positions import Extents
from insitu.engine.interpose import Own
from insitu.graph.node import Address, Kind, Place
from insitu.models.accounts import Accounts
from insitu.models.batching import cuts, join
from insitu.models.calls import alone, arguments, content, forward
from insitu.models.pieces import lengths_of
from insitu.models.prompts import Prompt, counted
from insitu.models.resume import Entering, Prefix, Resumed, blocks_of
from insitu.models.sharing import chain_of
from insitu.models.tail import Tail
from insitu.models.terms import Terms
from insitu.models.unembedding import ALL_UNEMBEDDED, Unembedded, unembed_only, unembedding
from insitu.runtime.fallback import Fallback, logger
from insitu.runtime.hooks import Cut
from insitu.runtime.passes import Deliver, Pass
from insitu.runtime.plan import Plan
from insitu.runtime.summary import Summary

if TYPE_CHECKING:
    from insitu.models.language_model import LanguageModel


_SHIFTED = Fallback("positions begin behind the padding of each row")
_PASSED_ON: tuple[Kind, ...] = ("output", "input")  # where what a block returned stands


class _Stretch(NamedTuple):
    """What one pass does, of what can be said before there are prompts.

    Attributes:
        runs: the numbers of its runs, by the block at which they begin.
        reads: the sites of which it gives the values.
        skipped: how many blocks it leaves out.
        start: how many positions it leaves out.
        positions: how many it computes.
        unembedded: which of those become logits.
        leaves: the blocks at which other passes go on from it.
        caches: whether those take its keys and values too.
    """

    runs: Sequence[int]
    reads: Sequence[Address]
    skipped: int
    start: int
    positions: int
    unembedded: Unembedded
    leaves: frozenset[int]
    caches: bool


class Batches:
    """How several prompts are divided into passes.

    It keeps nothing of what the prompts say or of the graph's constants, so that it serves every
    run of the same shape.

    Args:
        model: the model.
        options: keyword arguments for its forward, for the passes of single invocations.
        terms: on which terms each invocation shares a pass, or why it shares none.
        module: the wrapped module, with its weights.
        requests: the prompts.
        work: what the passes are for.
        budget: how many tokens a pass may have, where it has several invocations.
        share: whether invocations of one prompt share what they have in common; None for where
            that is faster.
    """

    def __init__(
        self,
        model: LanguageModel,
        options: Mapping[str, Any],
        terms: Sequence[Terms | Fallback],
        module: nn.Module,
        requests: Sequence[Prompt],
        work: Work,
        budget: int,
        share: bool | None,
    ) -> None:
        self._model, self._options, self._terms = model, options, terms
        self._asked = work.asked
        views = model.block_views[False]
        self._blocks = blocks_of(model.modules, views)
        heads = model.unembedding_paths
        self._head = model.modules[heads[0]] if len(heads) == 1 else None
        given = [
            _given(number, prompt, term, share)
            for number, (prompt, term) in enumerate(zip(requests, terms, strict=True))
        ]
        self._sizes = [(prompt.rows, prompt.length) for prompt in given]
        self._accounts = Accounts(model, work, self._sizes)
        costs = None if share else model.costs

        def runs_and_groups(chain: Any) -> tuple[list[Run], list[Group] | None]:
            runs, edges = find_runs(work.graph, work.plan, given, chain, work.moments, costs)
            return runs, arrange(runs, edges, model.costs, budget)

        def shared_blocks(number: int) -> Chain | None:
            term = terms[number]
            assert isinstance(term, Terms)
            found: Chain | Fallback = _SHIFTED
            if term.side == "right":
                found = chain_of(model, module, term.layouts, term.options)
            if isinstance(found, Fallback):
                logger.info("Prompts that are equal share no blocks: %s", found.why)
                self._unshared[term.number] = f"; equal prompts share no blocks: {found.why}"
                return None
            return found

        self._unshared: dict[int, str] = {}
        runs, groups = runs_and_groups(shared_blocks)
        if groups is None:  # invocations need each other in both directions
            runs, groups = runs_and_groups(lambda _: None)
        assert groups is not None
        groups = [part for group in groups for part in self._of_like_lengths(runs, group)]
        self._runs = runs
        self._stretches = self._planned(groups, work)

    def passes(self, module: nn.Module, requests: Sequence[Prompt]) -> list[Pass]:
        """Returns the passes for some prompts, in an order in which they can run."""
        prefixes: dict[int, tuple[Prefix, slice]] = {}
        passes: list[Pass] = []
        for stretch in self._stretches:
            first = self._runs[stretch.runs[0]].invocation
            term = self._terms[first]
            if isinstance(term, Fallback):
                summary = partial(self._accounts.alone, first, term.why)
                rest = (self._options, summary, term, self._asked[first].differentiates)
                passes.append(alone(self._model, first, *rest)(module, requests[first]))
            elif stretch.skipped:
                passes.append(self._resumed(stretch, term, module, requests, prefixes))
            else:
                passes.append(self._whole(stretch, term, module, requests, prefixes))
        return passes

    def _planned(self, groups: Sequence[Group], work: Work) -> list[_Stretch]:
        """What each pass does, of what can be said before there are prompts."""
        runs, extents = self._runs, Extents(work.graph)
        leaving: dict[int, tuple[set[int], bool]] = {}  # at which levels; whether keys and values
        for group in groups:
            for number in group.runs:
                base = runs[number].base
                if base is not None:
                    levels, cached = leaving.get(base, (set[int](), False))
                    levels.update(runs[other].level for other in group.runs)
                    leaving[base] = (levels, cached or bool(group.start))
        stretches: list[_Stretch] = []
        for group in groups:
            numbers = sorted(group.runs, key=lambda number: runs[number].level)
            reads = [address for number in numbers for address in runs[number].reads]
            length = max(runs[number].length for number in numbers) - group.start
            unembedded = self._unembedded(numbers, group.start, length, work.plan, extents)
            left = [leaving[number] for number in numbers if number in leaving]
            levels = set[int]().union(*(levels for levels, _ in left))
            cached = any(cached for _, cached in left)
            stretches.append(
                _Stretch(
                    numbers,
                    reads,
                    runs[numbers[0]].level,
                    group.start,
                    length,
                    unembedded,
                    frozenset(levels),
                    cached,
                )
            )
        return stretches

    def _of_like_lengths(self, runs: Sequence[Run], group: Group) -> list[Group]:
        """Divides runs so that none depends on a longer one's length."""
        lengths = lengths_of(self._model)
        parts: dict[Hashable, list[int]] = {}
        for number in group.runs:
            parts.setdefault(lengths.sharing(runs[number].length), []).append(number)
        if len(parts) == 1:
            return [group]
        return [Group(part) for part in parts.values()]

    def _whole(
        self,
        stretch: _Stretch,
        terms: Terms,
        module: nn.Module,
        requests: Sequence[Prompt],
        prefixes: dict[int, tuple[Prefix, slice]],
    ) -> Pass:
        """The pass of runs from the model's beginning."""
        runs = [self._runs[number] for number in stretch.runs]
        prompts = [requests[run.invocation] for run in runs]
        batch = join(prompts, terms.side, self._model.pad_id)
        whole = counted(Prompt(batch.ids, prompts[0].mark, batch.mask), terms.side)
        own: dict[int, Cut | None] = {}
        for run, share in zip(runs, cuts(batch, terms.layouts, stretch.unembedded), strict=True):
            own[run.invocation] = share
            for address in run.reads:
                own[address[0]] = share
        model = self._model
        kwargs = arguments(model, whole, terms.options)
        differentiates = terms.asked.differentiates
        if not stretch.leaves:

            def call(_: Deliver, is_own: Own) -> Any:
                with unembedding(self._head, stretch.unembedded, is_own):
                    return forward(model, module, kwargs, prompts)

            summary = partial(self._of_whole, stretch, sorted(own), batch.ids.shape[0], None)
            # The only pass gives all that is read.
            reads = None if len(self._stretches) == 1 else stretch.reads
            return Pass(call, own, True, summary, None, reads, None, None, differentiates)

        prefix = Prefix(self._blocks, stretch.leaves, stretch.caches)
        for number, part in zip(stretch.runs, batch.parts, strict=True):
            prefixes[number] = (prefix, part.rows)

        def leave(_: Deliver, is_own: Own) -> Any:
            with (
                prefix.left_by(kwargs, is_own) as given,
                unembedding(self._head, stretch.unembedded, is_own),
            ):
                return forward(model, module, given, prompts)

        through = prefix.through
        summary = partial(self._of_whole, stretch, sorted(own), batch.ids.shape[0], through)
        rest = (None, stretch.reads, through, None, differentiates)
        return Pass(leave, own, True, summary, *rest)

    def _resumed(
        self,
        stretch: _Stretch,
        terms: Terms,
        module: nn.Module,
        requests: Sequence[Prompt],
        prefixes: Mapping[int, tuple[Prefix, slice]],
    ) -> Pass:
        """The pass of runs that begin at a block."""
        runs = [self._runs[number] for number in stretch.runs]
        entering: list[Entering] = []
        for run in runs:
            assert run.base is not None
            prefix, origin = prefixes[run.base]
            entering.append(Entering(run.level, prefix, origin))
        resumed = Resumed(self._blocks, entering, stretch.start, runs[0].length)
        own: dict[int, Cut | None] = {}
        count = 0
        unembedded = stretch.unembedded
        logits = unembedded.positions or [()] * len(runs)
        for run, row, kept in zip(runs, entering, logits, strict=True):
            mine = slice(count, count + row.rows)
            count += row.rows
            paths = zip(self._blocks.paths[row.level - 1 :], _PASSED_ON, strict=False)
            entry = frozenset[Place]((path, kind, 0) for path, kind in paths)
            own[run.invocation] = Tail(terms.layouts, mine, resumed, row, entry, unembedded, kept)
        first = requests[runs[0].invocation]
        model = self._model
        prompt = Prompt(first.ids[:1, stretch.start :], first.mark)
        kwargs = arguments(model, prompt, terms.options)

        def call(_: Deliver, is_own: Own) -> Any:
            with (
                resumed.entered(kwargs, is_own) as given,
                unembedding(self._head, unembedded, is_own),
            ):
                return forward(model, module, given, [first])

        last: Place = (self._blocks.paths[entering[-1].level - 1], "output", 0)
        summary = partial(self._of_resumed, stretch, last)
        return Pass(call, own, True, summary, None, stretch.reads, last)

    def _of_whole(
        self, stretch: _Stretch, invocations: Sequence[int], rows: int, through: Place | None
    ) -> Summary:
        """The summary of a pass from the model's beginning."""
        why = "one prompt" if len(invocations) == 1 else "prompts of like length"
        if stretch.leaves:
            why = "what invocations of one prompt share"
        terms = self._terms[invocations[0]]
        why += self._unshared.get(terms.number, "") if isinstance(terms, Terms) else ""
        size = rows, stretch.positions
        return self._accounts.whole(
            invocations, *size, stretch.reads, through, stretch.unembedded.count or None, why
        )

    def _of_resumed(self, stretch: _Stretch, through: Place) -> Summary:
        """The summary of a pass that begins at a block."""
        runs = [self._runs[number] for number in stretch.runs]
        return self._accounts.resumed(
            runs, stretch.positions, stretch.reads, through, stretch.unembedded.count or None
        )

    def _unembedded(
        self, numbers: Sequence[int], start: int, length: int, plan: Plan, extents: Extents
    ) -> Unembedded:
        """Which positions of each row of a batch have to become logits."""
        model, terms = self._model, self._terms[self._runs[numbers[0]].invocation]
        if not isinstance(terms, Terms) or terms.side == "left" or terms.asked.differentiates:
            return ALL_UNEMBEDDED
        if "logits_to_keep" not in model.forward_parameters or len(model.unembedding_paths) != 1:
            return ALL_UNEMBEDDED
        head = model.unembedding_paths[0]
        places = frozenset[Place]([("", "output", 0), (head, "output", 0)])
        if not places <= terms.layouts.keys():
            return ALL_UNEMBEDDED
        found: list[Sequence[int]] = []
        for number in numbers:
            run = self._runs[number]
            wanted: set[int] = set()
            for address in run.reads:
                if address[1:4] in ((head, "input", 0), (head, "inputs", 0)):
                    return ALL_UNEMBEDDED
                if address[1:4] not in places:
                    continue
                part = part_of(address, self._blocks.paths)
                _, own = self._sizes[address[0]]
                positions = extents.read(plan.reads[address], own, part)
                if positions is None:
                    return ALL_UNEMBEDDED
                wanted.update(position - start for position in positions)
            found.append(sorted(wanted))
        if not 0 < max(map(len, found)) <= length // 2:
            return ALL_UNEMBEDDED
        return unembed_only(places, found, [self._runs[number].rows for number in numbers])


def _given(number: int, prompt: Prompt, terms: Terms | Fallback, share: bool | None) -> Given:
    rows, length = prompt.ids.shape
    if isinstance(terms, Fallback):
        return Given(number, rows, length, f"alone {number}")
    shares = share is not False and terms.shares
    key = (terms.number, content(number, prompt)) if shares else number
    return Given(key, rows, length, terms.number)
