"""Which part of a transformer block is what, found in the dataflow of a forward.

Nothing here knows an architecture by name. Attention is where a softmax stands between two
products; the residual stream is what a block adds to; a contribution is what it adds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from insitu.models.parts import Block, Feedforward, Heads, Spot
from insitu.runtime.dataflow import Dataflow, Event
from insitu.runtime.inside import SEPARATOR


_SUMS = frozenset(["add", "iadd", "radd"])
# What leaves numbers as they are and where they are, but for the shape.
_MOVES = frozenset(
    """
    broadcast_to chunk clone contiguous expand flatten getitem index_select movedim narrow permute
    repeat_interleave reshape select split split_with_sizes squeeze swapaxes swapdims t to
    transpose type type_as unbind unflatten unsqueeze view view_as float half bfloat16
    """.split()
)
_RESHAPES = frozenset(
    "bfloat16 clone contiguous flatten float half reshape squeeze to type type_as unflatten "
    "unsqueeze view view_as dropout".split()
)
_PRODUCTS = frozenset(["matmul", "rmatmul", "bmm", "baddbmm", "einsum"])
_MATRICES = frozenset(["addmm", "bmm", "einsum", "linear", "matmul", "mm"])
_FUSED = "scaled_dot_product_attention"
_NONLINEAR = frozenset(
    "celu elu gelu glu hardsigmoid hardswish hardtanh leaky_relu mish relu relu6 selu sigmoid silu "
    "softplus square tanh".split()
)
_MIXES = frozenset(["conv1d"])  # positions: a state-space layer


class Anatomist:
    """Reads what a forward did.

    Args:
        flow: the dataflow of a forward.
        modules: the model's tree, by path.
        size: rows and positions of the hidden states in that forward.
        lengths: all numbers of positions that there were in it: an encoder's may differ.
        experts: how many experts the model's config speaks of, 0 if it does not.
    """

    def __init__(
        self,
        flow: Dataflow,
        modules: Mapping[str, nn.Module],
        size: tuple[int, int],
        lengths: Collection[int],
        experts: int = 0,
    ) -> None:
        self._flow = flow
        self._modules = modules
        self._size = size
        self._lengths = lengths
        self._experts = experts
        # The modules that multiply with matrices: not all of whose weights have two axes do.
        multiplying = (event.path for event in flow.events if event.function in _MATRICES)
        self._multiplying = frozenset(multiplying)

    def block(self, path: str) -> Block | None:
        """Returns what a block consists of, None if it did not run."""
        index = next(self._flow.calls(path), None)
        if index is None:
            return None
        call = self._flow.events[index]
        if not call.inputs or not call.outputs:
            return None
        events = range(call.first, index)
        cores = [self._core(at, path) for at in events if self._is_core(at)]
        cores = [core for core in cores if core is not None]
        entry, exit = call.inputs[0], call.outputs[0]
        for value in call.inputs:  # a block may be given other things before hidden states
            if self._flow.shapes[value] == self._flow.shapes[exit]:
                entry = value
                break
        chain, leaves = self._sums(exit, entry, path)
        found = Block(path, self._flow.shapes[exit][-1])
        stream = {
            "residual_in": Spot(path, "input", 0, (), self._flow.shapes[entry]),
            "residual_out": Spot(path, "output", 0, (0,), self._flow.shapes[exit]),
        }
        own = {entry, *chain}
        heads = [core for core in cores if self._leads_to(own, core.k, call.first)]
        crossing = [core for core in cores if core not in heads]
        attention = heads[0] if heads else None
        cross = crossing[0] if crossing else None
        if cross is not None:
            found = replace(found, cross_attention=self._heads(cross, path, index))
        if attention is not None:
            found = replace(found, attention=self._heads(attention, path, index))
        added: dict[str, int] = {}
        if chain:
            stops = {*chain, entry}
            cones = {leaf: set(self._cone(leaf, stops, call.first)) for leaf in leaves}
            added = self._named(leaves, cones, attention, cross)
            middle = self._middle(chain, leaves, added, path, call.first)
            if middle is not None:
                stream["residual_mid"] = middle
        else:
            del stream["residual_out"], stream["residual_in"]
        spots = {name: self.spot(value, path) for name, value in added.items()}
        last = added.get("mlp_out")
        if last is None:
            last = exit if not chain else None
        mlp = None if last is None else self._mlp(last, path, events, attention)
        return replace(
            found,
            stream=stream,
            added={name: spot for name, spot in spots.items() if spot is not None},
            norms=self._norms(path, events, [entry, *chain], leaves or [exit]),
            mlp=mlp,
        )

    def spot(self, value: int, within: str) -> Spot | None:
        """Returns where a value is to be read and written.

        That is the output of the outermost module in a block that returns it, as what is written
        to modules further inside is then in it; or of the function that makes it.

        Args:
            value: the value.
            within: the block's path.
        """
        flow = self._flow
        for returned in reversed(flow.returned.get(value, ())):
            event = flow.events[returned.event]
            if event.path != within and event.is_within(within):
                return Spot(event.path, "output", event.call, returned.item, flow.shapes[value])
        maker = flow.maker(value)
        if maker is None or not maker.function or value not in maker.outputs:
            return None
        item = (maker.outputs.index(value),) if len(maker.outputs) > 1 else ()
        place = f"{maker.path}{SEPARATOR}{maker.function}"
        return Spot(place, "output", maker.call, item, flow.shapes[value])

    # The residual stream

    def _sums(self, exit: int, entry: int, within: str) -> tuple[list[int], list[int]]:
        """The residual stream from a block's input to its output, and what is added to it.

        Returns:
            The values of the stream, from first to last, without the input, none if the output is
            no sum with it; and what is added, in the order in which it is.
        """
        flow = self._flow
        reached: dict[int, bool] = {entry: True}

        def reaches(value: int) -> bool:
            if value not in reached:
                reached[value] = False
                maker = flow.maker(value)
                if maker is not None and maker.is_within(within):
                    if maker.function in _SUMS:
                        reached[value] = any(map(reaches, maker.inputs))
                    elif maker.function in _RESHAPES and maker.inputs:
                        reached[value] = reaches(maker.inputs[0])
            return reached[value]

        def leaves_of(value: int) -> list[int]:
            """What a sum is made of, where the block itself makes it."""
            maker = flow.maker(value)
            if maker is None or maker.function not in _SUMS or maker.path != within:
                return [value]
            parts = [part for part in maker.inputs if flow.shapes[part] == flow.shapes[value]]
            return [leaf for part in parts for leaf in leaves_of(part)]

        if exit == entry or not reaches(exit):
            return [], []
        chain: list[int] = []
        added: list[list[int]] = []
        value = exit
        while value != entry:
            maker = flow.maker(value)
            assert maker is not None
            chain.append(value)
            if maker.function in _SUMS:
                onward = next(part for part in maker.inputs if reaches(part))
                others = [part for part in maker.inputs if part != onward]
                added.append([leaf for part in others for leaf in leaves_of(part)])
                value = onward
            else:
                value = maker.inputs[0]
        return chain[::-1], [leaf for leaves in reversed(added) for leaf in leaves]

    def _cone(self, value: int, stops: Collection[int], first: int) -> Iterator[int]:
        """The events of a block behind a value, up to values of the residual stream."""
        flow = self._flow
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

    def _named(
        self,
        leaves: Sequence[int],
        cones: Mapping[int, Collection[int]],
        attention: _Core | None,
        cross: _Core | None,
    ) -> dict[str, int]:
        """Which of the values that are added is what."""
        found: dict[str, int] = {}
        rest: list[int] = []
        for leaf in leaves:
            mixes = any(self._flow.events[at].function in _MIXES for at in cones[leaf])
            if mixes:
                rest.append(leaf)
            elif cross is not None and cross.event in cones[leaf]:
                found.setdefault("cross_attention_out", leaf)
            elif attention is not None and attention.event in cones[leaf]:
                found.setdefault("attention_out", leaf)
            else:
                rest.append(leaf)
        for leaf in rest:
            mixes = any(self._flow.events[at].function in _MIXES for at in cones[leaf])
            is_mixer = leaf == rest[0] and (mixes or (attention is None and len(rest) > 1))
            found.setdefault("mixer_out" if is_mixer else "mlp_out", leaf)
        return found if len(found) == len(leaves) else {}

    def _middle(
        self,
        chain: Sequence[int],
        leaves: Sequence[int],
        added: Mapping[str, int],
        within: str,
        first: int,
    ) -> Spot | None:
        """The residual stream between attention and MLP, where one comes after the other."""
        last = added.get("mlp_out")
        if last is None or len(leaves) < 2 or leaves[-1] != last:
            return None
        for value in reversed(chain):
            maker = self._flow.maker(value)
            if maker is not None and maker.function in _SUMS and last in maker.inputs:
                (onward,) = [part for part in maker.inputs if part != last] or [value]
                while onward in chain:
                    maker = self._flow.maker(onward)
                    if maker is None or maker.function in _SUMS:
                        one_by_one = self._leads_to({onward}, last, first)
                        return self.spot(onward, within) if one_by_one else None
                    onward = maker.inputs[0]
        return None

    def _norms(
        self, path: str, events: Sequence[int], stream: Sequence[int], leaves: Sequence[int]
    ) -> list[str]:
        """The norms of a block: those of the residual stream, else those of what is added to it."""
        flow = self._flow
        width = flow.shapes[stream[0]][-1]
        before: list[str] = []
        after: list[str] = []
        others: list[str] = []
        for at in events:
            event = flow.events[at]
            if event.function or not event.path.startswith(f"{path}.") or not event.inputs:
                continue
            module = self._modules[event.path]
            weight = getattr(module, "weight", None)
            vector = weight is not None and tuple(weight.shape) == (width,)
            named = "norm" in type(module).__name__.lower()
            if not (vector or named) or flow.shapes[event.inputs[0]][-1] != width:
                continue
            others.append(event.path)
            if event.inputs[0] in stream:
                before.append(event.path)
            elif not set(event.outputs).isdisjoint(leaves):
                after.append(event.path)
        return before or after or others

    # Attention

    def _is_core(self, at: int) -> bool:
        event = self._flow.events[at]
        if event.function == _FUSED:
            return True
        return event.function == "softmax" and self._product_before(at) is not None

    def _product_before(self, at: int) -> Event | None:
        """The product of queries and keys that a softmax is of."""
        flow, softmax = self._flow, self._flow.events[at]
        waiting, seen = [softmax.inputs[0]], set[int]()
        while waiting:  # through what scales, masks or caps it
            value = waiting.pop(0)
            maker = flow.maker(value)
            if value in seen or maker is None or maker.path != softmax.path:
                continue
            if maker.function in _PRODUCTS:
                return maker
            seen.add(value)
            waiting.extend(maker.inputs)
        return None

    def _core(self, at: int, within: str) -> _Core | None:
        """What a softmax, or a function that has it inside, is given and gives."""
        flow, event = self._flow, self._flow.events[at]
        if event.function == _FUSED:
            q, k, v = event.inputs[:3]
            return _Core(at, event.path, q, k, v, event.outputs[0], None, None)
        product = self._product_before(at)
        if product is None:
            return None
        q, k = product.inputs[-2:]
        weights = {event.outputs[0]}
        for later in flow.events[at + 1 :]:
            if not later.is_within(event.path):
                break
            if later.path != event.path or weights.isdisjoint(later.inputs):
                continue
            if later.function in _PRODUCTS:
                v = next(part for part in reversed(later.inputs) if part not in weights)
                scores, pattern = event.inputs[0], event.outputs[0]
                return _Core(at, event.path, q, k, v, later.outputs[0], scores, pattern)
            weights.update(later.outputs)
        return None

    def _projection(self, value: int, events: Sequence[int]) -> int | None:
        """The call of the last linear layer behind a value."""
        flow = self._flow
        seen: set[int] = set()
        waiting = [value]
        while waiting:
            now = waiting.pop(0)
            if now in seen:
                continue
            seen.add(now)
            for returned in flow.returned.get(now, ()):
                if returned.event in events and self._is_linear(flow.events[returned.event].path):
                    return returned.event
            made = flow.made[now]
            if made is not None and made in events:
                waiting.extend(flow.events[made].inputs)
        return None

    def _is_linear(self, path: str) -> bool:
        module = self._modules[path]
        if isinstance(module, nn.Linear) or "Linear" in type(module).__name__:
            return True
        weight = getattr(module, "weight", None)
        return getattr(weight, "ndim", 0) == 2 and path in self._multiplying

    def _heads(self, core: _Core, within: str, end: int) -> Heads:
        """What an attention works with, as sites."""
        flow = self._flow
        rows, _ = self._size
        count = 0
        shape = flow.shapes[core.q]
        if len(shape) == 4:
            count = shape[1]
        elif len(shape) == 3:
            count = shape[0] // rows
        out, z = self._output_projection(core, end)
        width = 0 if z is None else z.shape[-1]
        raw: dict[str, Spot] = {}
        projections: dict[str, str] = {}
        projected: list[str] = []
        events = range(flow.events[end].first, end)
        spots: dict[str, Spot | None] = {}
        for name, value in (("q", core.q), ("k", core.k), ("v", core.v)):
            size = flow.shapes[core.v if name == "v" else core.q][-1]
            spot = spots[name] = self._first_with_heads(value, size, within)
            call = self._projection(value, events)
            if call is None:
                continue
            projections[name] = flow.events[call].path
            if self._is_moved(value, flow.events[call].outputs):
                projected.append(name)
            if spot is not None:
                before = self._before_embedding(value, spot.shape, call, within)
                if before is not None:
                    raw[name] = before
        softmax = flow.events[core.event]
        scores = pattern = None
        if core.scores is not None and core.pattern is not None:
            place = f"{softmax.path}{SEPARATOR}softmax"
            scores = Spot(place, "input", softmax.call, (), flow.shapes[core.scores])
            pattern = Spot(place, "output", softmax.call, (), flow.shapes[core.pattern])
        return Heads(
            path=core.path,
            **spots,
            raw=raw,
            scores=scores,
            pattern=pattern,
            z=z,
            projections=projections,
            out=out,
            count=count,
            size=width // count if count else 0,
            projected=frozenset(projected),
        )

    def _is_moved(self, value: int, made: Collection[int]) -> bool:
        """Whether a value is a part of another one, brought into another form."""
        while value not in made:
            maker = self._flow.maker(value)
            if maker is None or maker.function not in _MOVES or not maker.inputs:
                return False
            value = maker.inputs[0]
        return True

    def _first_with_heads(self, value: int, size: int, within: str) -> Spot | None:
        """Where a value first has an axis of heads, before it is repeated, cached or moved on."""
        flow = self._flow
        best: int | None = None
        while True:
            shape = flow.shapes[value]
            known = best is not None and flow.shapes[best][2] in self._lengths
            if self._has_heads(shape, size) and (shape[2] in self._lengths or not known):
                best = value
            maker = flow.maker(value)
            if maker is None or flow.returned.get(value):
                break
            if maker.function == "cat" and self._is_cache(maker):
                value = maker.inputs[-1]
            elif maker.function in _MOVES and maker.inputs:
                value = maker.inputs[0]
            else:
                break
        if best is None:
            return None
        return self.spot(best, within) or self._where_used(best, within)

    def _where_used(self, value: int, within: str) -> Spot | None:
        """Where a value is given to a function: for what was put together by writes."""
        shape = self._flow.shapes[value]
        for event in self._flow.events:
            if not event.function or not event.is_within(within) or value not in event.inputs:
                continue
            place = f"{event.path}{SEPARATOR}{event.function}"
            number = event.inputs.index(value)
            if number == 0:
                return Spot(place, "input", event.call, (), shape)
            if event.function == _FUSED:
                return Spot(place, "inputs", event.call, (0, number), shape)
        return None

    def _has_heads(self, shape: Sequence[int], size: int) -> bool:
        """Whether a shape is `(batch, head, position, size)`, or with heads and positions swapped."""
        if len(shape) != 4 or shape[0] != self._size[0] or shape[-1] != size:
            return False
        return shape[1] in self._lengths or shape[2] in self._lengths

    def _is_cache(self, maker: Event) -> bool:
        """Whether what is put together are things from outside and then one value: a cache."""
        shapes = [self._flow.shapes[part] for part in maker.inputs]
        return len(shapes) == 2 and 0 in shapes[0]

    def _before_embedding(
        self, value: int, shape: Sequence[int], projection: int, within: str
    ) -> Spot | None:
        """Where a projection's output first has the axes of `shape`, in whatever order."""
        flow = self._flow
        behind = set(self._cone(value, (), projection))
        moved = set(flow.events[projection].outputs)
        for at in range(projection + 1, len(flow.events)):
            event = flow.events[at]
            if not event.function or moved.isdisjoint(event.inputs):
                continue
            if event.function not in _MOVES or at not in behind:
                continue
            outputs = [out for out in event.outputs if self._leads_to((out,), value, at)]
            moved.update(outputs)
            for out in outputs:
                found = flow.shapes[out]
                if len(found) == 4 and sorted(found[1:3]) == sorted(shape[1:3]):
                    if found[-1] == shape[-1]:
                        return self.spot(out, within)
        return None

    def _leads_to(self, values: Collection[int], end: int, first: int) -> bool:
        """Whether a value is made of one of some others, by events from a first one on."""
        flow = self._flow
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

    def _output_projection(self, core: _Core, end: int) -> tuple[str | None, Spot | None]:
        """The linear layer that takes all heads together, and what it takes."""
        flow = self._flow
        derived = {core.out}
        for event in flow.events[core.event : end]:
            if derived.isdisjoint(event.inputs):
                continue
            if not event.function and self._is_linear(event.path) and event.inputs[0] in derived:
                shape = flow.shapes[event.inputs[0]]
                return event.path, Spot(event.path, "input", event.call, (), shape)
            derived.update(event.outputs)
        return None, None

    # The MLP

    def _mlp(
        self, leaf: int, path: str, events: Sequence[int], attention: _Core | None
    ) -> Feedforward | None:
        """What an MLP works with, from what it adds."""
        flow = self._flow
        owner = self._owner(leaf, path, attention)
        down = self._projection(leaf, events)
        router, weights = self._router(owner or path, events)
        if router is not None:
            return Feedforward(owner, router=router, weights=weights)
        if down is None:
            return Feedforward(owner) if owner else None
        layer = flow.events[down]
        found = self._nonlinearity(layer.inputs[0], events)
        if owner is None:
            parent = layer.path.rpartition(".")[0]
            owner = parent if parent != path and parent.startswith(f"{path}.") else None
        if found is None:
            return Feedforward(owner, out=layer.path)
        pre, value = found
        if owner is not None and not pre.path.startswith(f"{owner}"):
            owner = None  # a part of the block's, and no module of its own
        into = self._projection(value, events)
        post = Spot(layer.path, "input", layer.call, (), flow.shapes[layer.inputs[0]])
        gates = self._gate(layer.inputs[0], events, into)
        return Feedforward(
            owner,
            pre,
            post,
            into=None if into is None else flow.events[into].path,
            gate=gates,
            out=layer.path,
        )

    def _owner(self, leaf: int, path: str, attention: _Core | None) -> str | None:
        """The outermost module with layers of its own that a contribution comes from."""
        flow = self._flow
        value = leaf
        for _ in range(10):
            modules = [flow.events[returned.event].path for returned in flow.returned.get(value, ())]
            inside = [other for other in modules if other.startswith(f"{path}.")]
            for other in reversed(inside):
                around = attention is not None and f"{attention.path}.".startswith(f"{other}.")
                deep = any(self._is_linear(f"{other}.{name}") for name in self._layers(other))
                if deep and not around:
                    return other
            maker = flow.maker(value)
            if maker is not None and maker.path != path and maker.path.startswith(f"{path}."):
                around = attention is not None and f"{attention.path}.".startswith(
                    f"{maker.path}."
                )
                deep = any(self._is_linear(f"{maker.path}.{name}") for name in self._layers(maker.path))
                if deep and not around:
                    return maker.path
            if maker is None or not maker.inputs:
                return None
            outer = [flow.events[r.event] for r in flow.returned.get(value, ())]
            outer = [event for event in outer if event.path.startswith(f"{path}.")]
            value = outer[-1].inputs[0] if outer and outer[-1].inputs else maker.inputs[0]
        return None

    def _layers(self, path: str) -> list[str]:
        return [name for name, _ in self._modules[path].named_modules() if name]

    def _nonlinearity(self, value: int, events: Sequence[int]) -> tuple[Spot, int] | None:
        """The nearest nonlinearity behind a value: what goes into it, and where that is read."""
        flow = self._flow
        seen: set[int] = set()
        waiting = [value]
        while waiting:
            now = waiting.pop(0)
            if now in seen:
                continue
            seen.add(now)
            calls = [flow.events[r.event] for r in flow.returned.get(now, ())]
            for event in calls:
                if self._is_linear(event.path):
                    break
                if self._is_activation(event, now):
                    return Spot(event.path, "input", event.call, (), flow.shapes[now]), event.inputs[0]
            else:
                maker = flow.maker(now)
                if maker is None or flow.made[now] not in events:
                    continue
                if maker.function in _NONLINEAR:
                    place = f"{maker.path}{SEPARATOR}{maker.function}"
                    shape = flow.shapes[maker.inputs[0]]
                    return Spot(place, "input", maker.call, (), shape), maker.inputs[0]
                waiting.extend(maker.inputs)
        return None

    def _is_activation(self, event: Event, value: int) -> bool:
        """Whether a module changes numbers one by one: it has no weights and keeps the shape."""
        if len(event.inputs) != 1 or event.inputs[0] == value or event.function:
            return False
        module = self._modules[event.path]
        if next(module.parameters(), None) is not None or isinstance(module, nn.Dropout):
            return False
        return self._flow.shapes[event.inputs[0]] == self._flow.shapes[value]

    def _gate(self, value: int, events: Sequence[int], into: int | None) -> str | None:
        """The layer whose output is multiplied with that of the nonlinearity."""
        flow = self._flow
        maker = flow.maker(value)
        while maker is not None and maker.function in _RESHAPES and maker.inputs:
            value = maker.inputs[0]
            maker = flow.maker(value)
        if maker is None or maker.function != "mul" or len(maker.inputs) != 2:
            return None
        found = {self._projection(part, events) for part in maker.inputs}
        others = [call for call in found if call is not None and call != into]
        return flow.events[others[0]].path if others else None

    def _router(self, path: str, events: Sequence[int]) -> tuple[Spot | None, Spot | None]:
        """The scores of the experts, and the weights of those that are chosen."""
        flow = self._flow
        if not self._experts:
            return None, None
        rows, positions = self._size
        sizes = ((rows * positions, self._experts), (rows, positions, self._experts))
        for at in events:
            event = flow.events[at]
            if not event.is_within(path) or event.function != "linear":
                continue
            scores = event.outputs[0]
            if flow.shapes[scores] not in sizes:
                continue
            return self.spot(scores, path), self._chosen(scores, path, at, events)
        return None, None

    def _chosen(self, scores: int, path: str, at: int, events: Sequence[int]) -> Spot | None:
        """What the chosen experts are weighted with: the last value of that form."""
        flow = self._flow
        for later in range(at, events[-1] + 1):
            event = flow.events[later]
            if event.function == "topk" and event.is_within(path):
                form = flow.shapes[event.outputs[0]]
                derived, last = {event.outputs[0]}, event.outputs[0]
                for index in range(later + 1, events[-1] + 1):
                    other = flow.events[index]
                    if not other.function or derived.isdisjoint(other.inputs):
                        continue
                    same = [out for out in other.outputs if flow.shapes[out] == form]
                    if other.path != event.path or not same:
                        continue
                    derived.update(same)
                    last = same[0]
                return self.spot(last, path)
        return None


@dataclass(frozen=True, slots=True)
class _Core:
    """Where attention is computed.

    Attributes:
        event: the softmax, or the function that has it inside.
        path: the module in whose forward.
        q: what goes into the first product as queries.
        k: as keys, perhaps transposed.
        v: what the weights are multiplied with.
        out: what comes out of that.
        scores: what goes into the softmax, if it can be seen.
        pattern: what comes out of it.
    """

    event: int
    path: str
    q: int
    k: int
    v: int
    out: int
    scores: int | None
    pattern: int | None
