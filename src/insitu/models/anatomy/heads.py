"""The attention of a block: where a softmax stands between two products."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from insitu.engine.dataflow import Event
from insitu.graph.node import SEPARATOR
from insitu.models.anatomy.reading import FUSED, MOVES, Reading
from insitu.models.parts import Heads, Spot

_PRODUCTS = frozenset(["matmul", "rmatmul", "bmm", "baddbmm", "einsum"])


@dataclass(frozen=True, slots=True)
class Core:
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


def cores_of(reading: Reading, events: Sequence[int]) -> list[Core]:
    """Returns where attention is computed.

    Args:
        reading: the forward.
        events: the events of a block.
    """
    found = [_core(reading, at) for at in events]
    return [core for core in found if core is not None]


def _product_before(reading: Reading, at: int) -> Event | None:
    """The product of queries and keys that a softmax is of."""
    flow, softmax = reading.flow, reading.flow.events[at]
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


def _core(reading: Reading, at: int) -> Core | None:
    """What a softmax, or a function that has it inside, is given and gives; None if it is neither.

    A softmax that is of no product and in none, such as a router's, is no attention.
    """
    flow, event = reading.flow, reading.flow.events[at]
    if event.function == FUSED:
        q, k, v = event.inputs[:3]
        return Core(at, event.path, q, k, v, event.outputs[0], None, None)
    if event.function != "softmax":
        return None
    product = _product_before(reading, at)
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
            return Core(at, event.path, q, k, v, later.outputs[0], scores, pattern)
        weights.update(later.outputs)
    return None


def heads_of(reading: Reading, core: Core, within: str, end: int) -> Heads:
    """Returns what an attention works with, as sites.

    Args:
        reading: the forward.
        core: where it is computed.
        within: the block's path.
        end: the call of the block.
    """
    flow = reading.flow
    rows, _ = reading.size
    count = 0
    shape = flow.shapes[core.q]
    if len(shape) == 4:
        count = shape[1]
    elif len(shape) == 3:
        count = shape[0] // rows
    out, z = _output_projection(reading, core, end)
    width = 0 if z is None else z.shape[-1]
    raw: dict[str, Spot] = {}
    projections: dict[str, str] = {}
    projected: list[str] = []
    events = range(flow.events[end].first, end)
    spots: dict[str, Spot | None] = {}
    for name, value in (("q", core.q), ("k", core.k), ("v", core.v)):
        size = flow.shapes[core.v if name == "v" else core.q][-1]
        spot = spots[name] = _first_with_heads(reading, value, size, within)
        call = reading.projection(value, events)
        if call is None:
            continue
        projections[name] = flow.events[call].path
        if _is_moved(reading, value, flow.events[call].outputs):
            projected.append(name)
        if spot is not None:
            before = _before_embedding(reading, value, spot.shape, range(call, end), within)
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


def _is_moved(reading: Reading, value: int, made: Collection[int]) -> bool:
    """Whether a value is a part of another one, brought into another form."""
    while value not in made:
        maker = reading.flow.maker(value)
        if maker is None or maker.function not in MOVES or not maker.inputs:
            return False
        value = maker.inputs[0]
    return True


def _first_with_heads(reading: Reading, value: int, size: int, within: str) -> Spot | None:
    """Where a value first has an axis of heads, before it is repeated, cached or moved on."""
    flow = reading.flow
    best: int | None = None
    while True:
        shape = flow.shapes[value]
        known = best is not None and flow.shapes[best][2] in reading.lengths
        if _has_heads(reading, shape, size) and (shape[2] in reading.lengths or not known):
            best = value
        maker = flow.maker(value)
        if maker is None or flow.returned.get(value):
            break
        if maker.function == "cat" and _is_cache(reading, maker):
            value = maker.inputs[-1]
        elif maker.function in MOVES and maker.inputs:
            value = maker.inputs[0]
        else:
            break
    if best is None:
        return None
    return reading.spot(best, within) or _where_used(reading, best, within)


def _where_used(reading: Reading, value: int, within: str) -> Spot | None:
    """Where a value is given to a function: for what was put together by writes."""
    shape = reading.flow.shapes[value]
    for event in reading.flow.events:
        if not event.function or not event.is_within(within) or value not in event.inputs:
            continue
        place = f"{event.path}{SEPARATOR}{event.function}"
        number = event.inputs.index(value)
        if number == 0:
            return Spot(place, "input", event.call, (), shape)
        if event.function == FUSED:
            return Spot(place, "inputs", event.call, (0, number), shape)
    return None


def _has_heads(reading: Reading, shape: Sequence[int], size: int) -> bool:
    """Whether a shape is `(batch, head, position, size)`, or with heads and positions swapped."""
    if len(shape) != 4 or shape[0] != reading.size[0] or shape[-1] != size:
        return False
    return shape[1] in reading.lengths or shape[2] in reading.lengths


def _is_cache(reading: Reading, maker: Event) -> bool:
    """Whether the parts put together are things from outside and then one value: a cache."""
    shapes = [reading.flow.shapes[part] for part in maker.inputs]
    return len(shapes) == 2 and 0 in shapes[0]


def _before_embedding(
    reading: Reading, value: int, shape: Sequence[int], events: Sequence[int], within: str
) -> Spot | None:
    """Where a projection's output first has the axes of `shape`, in any order."""
    flow = reading.flow
    behind = set(reading.cone(value, (), events[0]))
    moved = set(flow.events[events[0]].outputs)
    for at in events[1:]:
        event = flow.events[at]
        if event.function not in MOVES or at not in behind or moved.isdisjoint(event.inputs):
            continue
        for out in event.outputs:
            if not reading.leads_to((out,), value, at):
                continue
            moved.add(out)
            found = flow.shapes[out]
            same = len(found) == 4 and sorted(found[1:3]) == sorted(shape[1:3])
            if same and found[-1] == shape[-1]:
                return reading.spot(out, within)
    return None


def _output_projection(reading: Reading, core: Core, end: int) -> tuple[str | None, Spot | None]:
    """The linear layer that takes all heads together, and what it takes."""
    flow = reading.flow
    derived = {core.out}
    for event in flow.events[core.event : end]:
        if derived.isdisjoint(event.inputs):
            continue
        if not event.function and reading.is_linear(event.path) and event.inputs[0] in derived:
            whole = _whole_layer(reading, core, event, end)
            shape = flow.shapes[event.inputs[0]]
            return whole.path, Spot(whole.path, "input", whole.call, (), shape)
        derived.update(event.outputs)
    return None, None


def _whole_layer(reading: Reading, core: Core, layer: Event, end: int) -> Event:
    """The outermost layer around a linear one that takes the same: adapters stand around theirs."""
    whole = layer
    for event in reading.flow.events[:end]:
        around = layer.path.startswith(f"{event.path}.") and len(event.path) < len(whole.path)
        if (
            around
            and not event.function
            and event.path != core.path
            and event.inputs[:1] == layer.inputs[:1]
            and reading.is_linear(event.path)
        ):
            whole = event
    return whole
