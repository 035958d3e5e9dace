"""The passes of a `trace` with several prompts: the plan of each becomes a call of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from insitu.batching.layout import Part
from insitu.batching.pass_plan import PassPlan, Row
from insitu.batching.shares import Offset, Share
from insitu.engine.interpose import Own
from insitu.engine.model_call import Cut, Deliver, Pass
from insitu.graph.node import Kind, Place
from insitu.models.calls import alone, arguments, forward, forward_with
from insitu.models.joined_prompts import join
from insitu.models.prompts import Prompt, counted
from insitu.models.resume import Blocks, Entering, Prefix, Resumed, blocks_of
from insitu.models.unembedding import unembedding

if TYPE_CHECKING:
    from insitu.models.language_subject import LanguageSubject

_PASSED_ON: tuple[Kind, ...] = ("output", "input")  # where what a block returned stands


class ForwardPasses:
    """Makes the forwards of one run.

    Args:
        model: the model.
        options: keyword arguments for the forwards of single prompts.
        module: the wrapped module, with its weights.
        requests: the prompts of all invocations.
    """

    def __init__(
        self,
        model: LanguageSubject,
        options: Mapping[str, Any],
        module: nn.Module,
        requests: Sequence[Prompt],
    ) -> None:
        self._model, self._options = model, options
        self._module, self._requests = module, requests
        heads = model.traits.unembedding_paths
        # Not `modules`, which compares the tree: the block has done so when it was prepared.
        self._head = model.snapshot.modules[heads[0]] if len(heads) == 1 else None
        self._made: Blocks | None = None
        self._left: dict[
            int, tuple[Prefix, slice]
        ] = {}  # by invocation, for those that begin there

    @property
    def _blocks(self) -> Blocks:
        """The model's blocks, which most runs do not need."""
        if self._made is None:
            self._made = blocks_of(self._model.modules, self._model.traits.block_views[False])
        return self._made

    def passes(self, plans: Sequence[PassPlan]) -> list[Pass]:
        """Returns forwards ready to be called.

        Args:
            plans: what each of them does.
        """
        return [self._pass(single, len(plans) == 1) for single in plans]

    def _pass(self, single: PassPlan, only: bool) -> Pass:
        """One forward; `only` says whether it gives all that is read."""
        if single.terms is None:
            prompt = self._requests[single.rows[0].invocation]
            return alone(self._model, self._module, self._options, single, prompt)
        call, cuts = self._resumed(single) if single.first_block else self._whole(single)
        own: dict[int, Cut | None] = {}
        for row, cut in zip(single.rows, cuts, strict=True):
            own[row.invocation] = cut
            for address in row.reads:
                own[address[0]] = cut
        reads = None if only else single.reads
        return Pass(call, own, True, None, reads, single.through, single.differentiates)

    def _whole(self, single: PassPlan) -> tuple[Any, list[Cut]]:
        """The call of rows from the model's beginning, and their shares."""
        terms, model, module, head = single.terms, self._model, self._module, self._head
        assert terms is not None
        prompts = [self._requests[row.invocation] for row in single.rows]
        batch = join(prompts, terms.side, model.traits.pad_id)
        whole = counted(Prompt(batch.ids, prompts[0].mark, batch.mask), terms.side)
        kwargs = arguments(model, whole, terms.options)
        logits = single.logits.positions if single.logits is not None else [()] * len(prompts)
        shares: list[Cut] = [
            Share(terms.layouts, part, single.logits, own)
            for part, own in zip(batch.parts, logits, strict=True)
        ]
        if not single.leaves:

            def call(_: Deliver, is_own: Own) -> Any:
                with unembedding(head, single, is_own):
                    return forward(model, module, kwargs, prompts)

            return call, shares
        prefix = Prefix(self._blocks, single.leaves, single.caches)
        for row, part in zip(single.rows, batch.parts, strict=True):
            self._left[row.invocation] = prefix, part.rows

        def leave(_: Deliver, is_own: Own) -> Any:
            with (
                prefix.left_by(kwargs, is_own) as given,
                unembedding(head, single, is_own),
            ):
                return forward_with(model, module, given, prompts)

        return leave, shares

    def _resumed(self, single: PassPlan) -> tuple[Any, list[Cut]]:
        """The call of rows that begin at a block, and their shares."""
        terms, model, module, head = single.terms, self._model, self._module, self._head
        assert terms is not None
        entering = [self._entering(row) for row in single.rows]
        start, length = single.first_position, single.rows[0].length
        resumed = Resumed(self._blocks, entering, start, length)
        logits = single.logits.positions if single.logits is not None else [()] * len(entering)
        shares: list[Cut] = []
        count = 0
        for row, own in zip(entering, logits, strict=True):
            mine = Part(slice(count, count + row.rows), slice(0, length - start), 0, length - start)
            count += row.rows
            paths = zip(self._blocks.paths[row.level - 1 :], _PASSED_ON, strict=False)
            entry = frozenset[Place]((path, kind, 0) for path, kind in paths)
            before = partial(row.before, start)
            offset = Offset(start, length, resumed.batch, entry, before)
            shares.append(Share(terms.layouts, mine, single.logits, own, offset=offset))
        first = self._requests[single.rows[0].invocation]
        kwargs = arguments(model, Prompt(first.ids[:1, start:], first.mark), terms.options)

        def call(_: Deliver, is_own: Own) -> Any:
            with (
                resumed.entered(kwargs, is_own) as given,
                unembedding(head, single, is_own),
            ):
                return forward_with(model, module, given, [first])

        return call, shares

    def _entering(self, row: Row) -> Entering:
        """Where a row enters, and the rows of an earlier forward that it is like until there."""
        assert row.origin is not None
        return Entering(row.first_block, *self._left[row.origin])
