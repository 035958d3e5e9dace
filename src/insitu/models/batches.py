"""The passes of a `trace` with several prompts: what is batched, shared and left out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from insitu.models.batching import ALL_UNEMBEDDED, Unembedded, cuts, join, lie_apart
from insitu.models.prompts import Prompt
from insitu.models.resume import Blocks, Entering, Prefix, Resumed, Tail
from insitu.runtime.branches import Chain, Given, find_runs, part_of
from insitu.runtime.extent import Extents
from insitu.runtime.hooks import Cut, Place
from insitu.runtime.layout import Layouts
from insitu.runtime.passes import Deliver, Pass
from insitu.runtime.procedure import Work
from insitu.runtime.schedule import Group, Run, arrange, rows_by_level
from insitu.runtime.summary import Summary

if TYPE_CHECKING:
    from insitu.models.language_model import LanguageModel


class Batches:
    """The passes of one run with several prompts.

    Args:
        model: the model.
        options: keyword arguments for its forward.
        layouts: how values are cut.
        module: the wrapped module, with its weights.
        requests: the prompts.
        work: what the passes are for.
    """

    def __init__(
        self,
        model: LanguageModel,
        options: Mapping[str, Any],
        layouts: Layouts,
        module: nn.Module,
        requests: Sequence[Prompt],
        work: Work,
    ) -> None:
        self._model, self._options, self._layouts = model, options, layouts
        self._module, self._requests, self._work = module, requests, work
        self._costs = model.costs
        self._extents: Extents | None = None
        self._prefixes: dict[int, tuple[Prefix, slice]] = {}

    def passes(self, budget: int | None = None, share: bool | None = None) -> list[Pass]:
        """Returns the passes, in an order in which they can run.

        Args:
            budget: how many tokens a pass may have, where it has several invocations; None for
                what fits into memory.
            share: whether invocations of one prompt share what they have in common; None for
                where that is faster.
        """
        work, requests = self._work, self._requests
        given = [_given(number, prompt, share) for number, prompt in enumerate(requests)]
        costs = None if share else self._costs
        budget = budget or self._default_budget()

        def runs_and_groups(chain: Any) -> tuple[list[Run], list[Group] | None]:
            runs, edges = find_runs(work.graph, work.plan, given, chain, work.moments, costs)
            return runs, arrange(runs, edges, self._costs, budget)

        runs, groups = runs_and_groups(self._chain)
        if groups is None:  # invocations need each other in both directions
            runs, groups = runs_and_groups(lambda: None)
        assert groups is not None
        self._prefixes = {}
        leaving = self._leaving(runs, groups)
        passes: list[Pass] = []
        for group in groups:
            if runs[group.runs[0]].level:
                passes.append(self._resumed(runs, group))
            else:
                passes.extend(self._whole(runs, part, leaving) for part in self._parts(runs, group))
        self._prefixes = {}  # which the summaries must not keep
        return passes

    def _chain(self) -> Chain | None:
        return self._model.chain(self._module, self._layouts, self._options)

    def _leaving(
        self, runs: Sequence[Run], groups: Sequence[Group]
    ) -> Mapping[int, tuple[set[int], bool]]:
        """What runs are to leave for others: at which levels, and whether keys and values too."""
        leaving: dict[int, tuple[set[int], bool]] = {}
        for group in groups:
            for number in group.runs:
                base = runs[number].base
                if base is not None:
                    levels, cached = leaving.get(base, (set[int](), False))
                    levels.add(runs[number].level)
                    levels.update(runs[other].level for other in group.runs)
                    leaving[base] = (levels, cached or bool(group.start))
        return leaving

    def _parts(self, runs: Sequence[Run], group: Group) -> list[Sequence[int]]:
        """Runs as they can share a batch if something is written in place."""
        prompts = [self._requests[runs[number].invocation] for number in group.runs]
        if self._work.graph.mutations and lie_apart(prompts):
            return [[number] for number in group.runs]
        return [group.runs]

    def _whole(
        self,
        runs: Sequence[Run],
        numbers: Sequence[int],
        leaving: Mapping[int, tuple[set[int], bool]],
    ) -> Pass:
        """The pass of runs from the model's beginning."""
        prompts = [self._requests[runs[number].invocation] for number in numbers]
        batch = join(prompts, "right", self._model.pad_id)
        whole = Prompt(batch.ids, prompts[0].mark, batch.mask)
        rows, length = batch.ids.shape
        reads = [address for number in numbers for address in runs[number].reads]
        unembedded = self._unembedded(reads, [(p, 0) for p in prompts], length)
        shares = cuts(batch, self._layouts, unembedded)
        own: dict[int, Cut | None] = {}
        for number, share in zip(numbers, shares, strict=True):
            own[runs[number].invocation] = share
            own.update({address[0]: share for address in runs[number].reads})
        kwargs = arguments(self._model, whole, self._options)
        if unembedded.places:
            kwargs["logits_to_keep"] = torch.tensor(unembedded.positions)
        left = [leaving[number] for number in numbers if number in leaving]
        model, module, requests = self._model, self._module, prompts
        through: Place | None = None
        shared = bool(left)
        if left:
            levels = set[int]().union(*(levels for levels, _ in left))
            prefix = Prefix(self._blocks, levels, any(cached for _, cached in left))
            through = prefix.through
            for number, part in zip(numbers, batch.parts, strict=True):
                self._prefixes[number] = (prefix, part.rows)

            def call(_: Deliver) -> Any:
                with prefix.left_by(kwargs) as given:
                    return forward(model, module, given, requests)

        else:

            def call(_: Deliver) -> Any:
                return forward(model, module, kwargs, requests)

        invocations = sorted(own)

        def summary() -> Summary:
            run = self._blocks_run(reads, through)
            kept = len(unembedded.positions) if unembedded.places else length
            logits = rows * kept * self._unembeds(reads)
            flops = self._costs.flops([rows] * run, length, length, logits)
            why = "what invocations of one prompt share" if shared else "prompts of like length"
            return Summary(invocations, rows, length, run, 0, flops, why, self._alone(invocations))

        return Pass(call, own, True, False, reads, through, summary)

    def _resumed(self, runs: Sequence[Run], group: Group) -> Pass:
        """The pass of runs that begin at a block."""
        numbers = sorted(group.runs, key=lambda number: runs[number].level)
        entering: list[Entering] = []
        for number in numbers:
            base = runs[number].base
            assert base is not None
            prefix, origin = self._prefixes[base]
            entering.append(Entering(runs[number].level, prefix, origin))
        length = runs[numbers[0]].length
        resumed = Resumed(self._blocks, entering, group.start, length)
        reads = [address for number in numbers for address in runs[number].reads]
        prompts = [(self._requests[runs[number].invocation], group.start) for number in numbers]
        unembedded = self._unembedded(reads, prompts, length - group.start)
        own: dict[int, Cut | None] = {}
        count = 0
        for number, row in zip(numbers, entering, strict=True):
            mine = slice(count, count + row.rows)
            count += row.rows
            entry: Place = (self._blocks.paths[row.level - 1], "output", 0)
            own[runs[number].invocation] = Tail(
                self._layouts, mine, resumed, row, entry, unembedded
            )
        first = prompts[0][0]
        tail = Prompt(first.ids[:1, group.start :], first.mark)
        kwargs = arguments(self._model, tail, self._options)
        if unembedded.places:
            kwargs["logits_to_keep"] = torch.tensor(unembedded.positions)
        model, module = self._model, self._module

        def call(_: Deliver) -> Any:
            with resumed.entered(kwargs) as given:
                return forward(model, module, given, [first])

        last: Place = (self._blocks.paths[entering[-1].level - 1], "output", 0)
        invocations = sorted(own)
        levels = [runs[number] for number in numbers]
        skipped = entering[0].level

        def summary() -> Summary:
            rows = rows_by_level(levels, self._costs.blocks)
            positions = length - group.start
            rows = rows[: max(self._blocks_run(reads, last) - skipped, 0)]
            kept = len(unembedded.positions) if unembedded.places else positions
            logits = count * kept * self._unembeds(reads)
            flops = self._costs.flops(rows, positions, length, logits)
            why = f"like their prompt up to block {skipped - 1}"
            if group.start:
                why += f" and position {group.start - 1}"
            alone = self._alone(invocations)
            run = len(rows)
            return Summary(invocations, count, positions, run, skipped, flops, why, alone)

        return Pass(call, own, True, False, reads, last, summary)

    def _alone(self, invocations: Sequence[int]) -> Mapping[int, float]:
        """What invocations would cost alone."""
        costs = self._costs
        found: dict[int, float] = {}
        for number in invocations:
            rows, length = self._requests[number].ids.shape
            found[number] = costs.flops([rows] * costs.blocks, length, length, rows * length)
        return found

    @property
    def _blocks(self) -> Blocks:
        views = self._model.block_views[False]
        modules = self._model.modules
        return Blocks(tuple(views), [modules[path] for path in views], list(views.values()))

    def _blocks_run(self, reads: Sequence[Any], through: Place | None) -> int:
        """How many blocks a pass goes through before it ends."""
        paths = self._blocks.paths
        order = self._work.moments(reads[0][0] if reads else 0)
        places = [address[1:4] for address in reads] + ([through] if through is not None else [])
        if order is None or any(place not in order for place in places):
            return len(paths)
        last = max((order[place] for place in places), default=-1)
        return sum(order.get((path, "inputs", 0), -1) < last for path in paths)

    def _unembeds(self, reads: Sequence[Any]) -> bool:
        """Whether a pass comes as far as the logits."""
        ends = {(path, kind, 0) for path in self._model.unembedding for kind in ("output",)}
        ends.add(("", "output", 0))
        return any(address[1:4] in ends for address in reads)

    def _unembedded(
        self, reads: Sequence[Any], prompts: Sequence[tuple[Prompt, int]], length: int
    ) -> Unembedded:
        """Which positions of a batch have to become logits."""
        model, plan = self._model, self._work.plan
        if "logits_to_keep" not in model.forward_parameters or not model.unembedding:
            return ALL_UNEMBEDDED
        places: set[Place] = {("", "output", 0)}
        places.update((path, "output", 0) for path in model.unembedding)
        others = {(path, kind, 0) for path in model.unembedding for kind in ("input", "inputs")}
        if any(address[1:4] in others for address in reads):
            return ALL_UNEMBEDDED
        self._extents = self._extents or Extents(self._work.graph)
        wanted: set[int] = set()
        start = prompts[0][1]
        for address in reads:
            if address[1:4] not in places:
                continue
            own = self._requests[address[0]].ids.shape[1]
            part = part_of(address, self._blocks.paths)
            found = self._extents.read(plan.reads[address], own, part)
            if found is None:
                return ALL_UNEMBEDDED
            wanted.update(position - start for position in found)
        if not wanted or len(wanted) > length // 2:
            return ALL_UNEMBEDDED
        return Unembedded(frozenset(places), sorted(wanted))

    def _default_budget(self) -> int:
        """How many tokens fit into a quarter of the memory that is free now."""
        tokens = sum(prompt.ids.numel() for prompt in self._requests)
        if tokens <= _SMALL:
            return _SMALL
        device = self._model.device
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
        else:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return max(_SMALL, free // 4 // self._model.bytes_per_token)


_SMALL = 4096  # tokens that are always thought to fit


def _given(number: int, prompt: Prompt, share: bool | None) -> Given:
    rows, length = prompt.ids.shape
    if share is False or prompt.mask is not None or prompt.ids.device.type != "cpu":
        return Given(number, rows, length)
    return Given((rows, prompt.ids.numpy().tobytes()), rows, length)


def arguments(model: LanguageModel, prompt: Prompt, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keyword arguments of a prompt's forward."""
    kwargs: dict[str, Any] = {"input_ids": prompt.ids, **prompt.extras, **options}
    if prompt.mask is not None:
        kwargs["attention_mask"] = prompt.mask
    start = model.decoder_start
    if start is not None and kwargs.keys().isdisjoint(_GIVEN_TO_A_DECODER):
        kwargs["decoder_input_ids"] = torch.full((prompt.ids.shape[0], 1), start)
    return kwargs


_GIVEN_TO_A_DECODER = ("decoder_input_ids", "decoder_inputs_embeds", "labels")


def forward(
    model: LanguageModel, module: nn.Module, kwargs: dict[str, Any], requests: Sequence[Prompt]
) -> Any:
    """Makes a forward, in the thread whose turn it is to use the model."""
    # Moved here and not before: until its turn comes, another thread's probe may have put fake
    # weights in, and those do not say where the real ones are.
    if kwargs["input_ids"].device != model.device:
        kwargs = model.placed(kwargs)
    try:
        return module(**kwargs)
    except IndexError:
        model.explain(requests)
        raise
