"""What the anatomy of blocks reads in a dataflow: what values come from, and where they are."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import nn

from insitu.engine.dataflow import Dataflow
from insitu.graph.node import SEPARATOR
from insitu.models.parts import Spot

# What leaves numbers as they are, but for their places.
MOVES = frozenset(
    (
        *("bfloat16", "broadcast_to", "chunk", "clone", "contiguous", "expand", "flatten", "float"),
        *("getitem", "half", "index_select", "movedim", "narrow", "permute", "repeat_interleave"),
        *("reshape", "select", "split", "split_with_sizes", "squeeze", "swapaxes", "swapdims"),
        *("t", "to", "transpose", "type", "type_as", "unbind", "unflatten", "unsqueeze", "view"),
        "view_as",
    )
)
# What leaves them in their places too.
RESHAPES = frozenset(
    (
        *("bfloat16", "clone", "contiguous", "dropout", "flatten", "float", "half", "reshape"),
        *("squeeze", "to", "type", "type_as", "unflatten", "unsqueeze", "view", "view_as"),
    )
)
FUSED = "scaled_dot_product_attention"
_MATRICES = frozenset(["addmm", "bmm", "einsum", "linear", "matmul", "mm"])


class Reading:
    """The dataflow of a forward, and what it was made with.

    Args:
        flow: the dataflow.
        modules: the model's tree, by path.
        size: rows and positions of the hidden states in that forward.
        lengths: all numbers of positions that there were in it: an encoder's may differ.
        experts: how many experts the model's config speaks of, 0 if it does not.
        chosen: how many of them a token passes.
    """

    def __init__(
        self,
        flow: Dataflow,
        modules: Mapping[str, nn.Module],
        size: tuple[int, int],
        lengths: Collection[int],
        experts: int = 0,
        chosen: int = 0,
    ) -> None:
        self.flow = flow
        self.modules = modules
        self.size = size
        self.lengths = lengths
        self.experts = experts
        self.chosen = chosen
        # The modules that multiply with matrices: not all of whose weights have two axes do.
        multiplying = (event.path for event in flow.events if event.function in _MATRICES)
        self._multiplying = frozenset(multiplying)

    def spot(self, value: int, within: str) -> Spot | None:
        """Returns where a value is to be read and written.

        That is the output of the outermost module in a block that returns it, as writes to modules
        further inside are then in it; or of the function that makes it. A module that has used the
        value itself before it returns it is none of these: a write to its output would come too
        late. A router that returns its scores beside its choice is one.

        Args:
            value: the value.
            within: the block's path.
        """
        flow = self.flow
        for returned in reversed(flow.returned.get(value, ())):
            event = flow.events[returned.event]
            if event.path == within or not event.is_within(within):
                continue
            if not self._is_used_before(value, returned.event):
                return Spot(event.path, "output", event.call, returned.item, flow.shapes[value])
        maker = flow.maker(value)
        if maker is None or not maker.function or maker.call < 0 or value not in maker.outputs:
            return None
        item = (maker.outputs.index(value),) if len(maker.outputs) > 1 else ()
        place = f"{maker.path}{SEPARATOR}{maker.function}"
        return Spot(place, "output", maker.call, item, flow.shapes[value])

    def _is_used_before(self, value: int, end: int) -> bool:
        """Whether something is made of a value before a module's call has returned it."""
        made = self.flow.made[value]
        between = self.flow.events[0 if made is None else made + 1 : end]
        return any(e.function and e.outputs and value in e.inputs for e in between)

    def cone(self, value: int, stops: Collection[int], first: int) -> Iterator[int]:
        """Yields the events that made a value, and what it is made of, as far as some values.

        Args:
            value: the value.
            stops: the values behind which nobody looks.
            first: the first event that counts.
        """
        flow = self.flow
        seen: set[int] = set()
        waiting = [value]
        while waiting:
            now = waiting.pop()
            made = flow.made[now]
            if now in seen or made is None or made < first or (now in stops and now != value):
                continue
            seen.add(now)
            yield made
            waiting.extend(flow.events[made].inputs)

    def leads_to(self, values: Collection[int], end: int, first: int) -> bool:
        """Returns whether a value is, or is made of, one of some others.

        Args:
            values: these.
            end: the value.
            first: the first event that counts.
        """
        flow = self.flow
        waiting, seen = [end], set[int]()
        while waiting:
            now = waiting.pop()
            if now in values:
                return True
            made = flow.made[now]
            if now in seen or made is None or made < first:
                continue
            seen.add(now)
            waiting.extend(flow.events[made].inputs)
        return False

    def projection(self, value: int, events: Sequence[int]) -> int | None:
        """Returns the call of the nearest linear layer behind a value, None if there is none.

        Args:
            value: the value.
            events: the events that count.
        """
        flow = self.flow
        seen: set[int] = set()
        waiting = [value]
        while waiting:
            now = waiting.pop(0)
            if now in seen:
                continue
            seen.add(now)
            for returned in flow.returned.get(now, ()):
                if returned.event in events and self.is_linear(flow.events[returned.event].path):
                    return returned.event
            made = flow.made[now]
            if made is not None and made in events:
                waiting.extend(flow.events[made].inputs)
        return None

    def is_linear(self, path: str) -> bool:
        """Returns whether a module is a linear layer, of any kind.

        Args:
            path: its path.
        """
        module = self.modules[path]
        if isinstance(module, nn.Linear) or "Linear" in type(module).__name__:
            return True
        weight = getattr(module, "weight", None)
        return getattr(weight, "ndim", 0) == 2 and path in self._multiplying
