"""Which part of a transformer block is what, found in the dataflow of a forward.

Nothing here knows an architecture by name. Attention is where a softmax stands between two
products; the residual stream is what a block adds to; the parts that it adds are named.
"""

from __future__ import annotations

from collections.abc import Mapping

from insitu.engine.dataflow import Dataflow
from insitu.engine.places import first_argument
from insitu.models.anatomy.feedforward import mlp_of
from insitu.models.anatomy.heads import cores_of, heads_of
from insitu.models.anatomy.reading import Reading
from insitu.models.anatomy.stream import Stream, find_stream, middle, named, norms
from insitu.models.parts import Block, Spot, Summed

_TWICE = "this block attends twice, in modules of one kind: use their paths."


def block_of(reading: Reading, path: str, begins: str | None = None) -> Block | None:
    """Returns what a block consists of, None if it did not run.

    Args:
        reading: the forward.
        path: the block's path.
        begins: the module in it whose output is where the residual stream begins; None, or one
            that it does not have, for what the block is given.
    """
    flow = reading.flow
    index = next(flow.calls(path), None)
    if index is None or not flow.events[index].outputs:
        return None
    call = flow.events[index]
    args, kwargs = flow.arguments[index]
    entry = first_argument(reading.modules[path], args, kwargs) if args or kwargs else None
    exit = call.outputs[0]
    if type(entry) is not int:
        return None
    events = range(call.first, index)
    start = Spot(path, "input", 0, (), flow.shapes[entry])
    first = None if begins is None else next(flow.calls(f"{path}.{begins}"), None)
    if first is not None:
        entry = flow.events[first].outputs[0]
        start = Spot(f"{path}.{begins}", "output", 0, (), flow.shapes[entry])
    way = find_stream(reading, exit, entry, path)
    scaled = False
    if not way.chain:
        way = find_stream(reading, exit, entry, path, "factors")
        scaled = bool(way.chain)
    if not way.chain:
        way = find_stream(reading, exit, entry, path, "norms")
    chain, leaves = way.chain, way.leaves

    own = {entry, *chain}
    cores = cores_of(reading, events)
    attending = [core for core in cores if reading.leads_to(own, core.k, call.first)]
    attention = next(iter(attending), None)
    twice = attention is not None and any(
        core.path != attention.path and _of_a_kind(reading, core.path, attention.path)
        for core in attending
    )
    # What attends to something from outside of the block does so to an encoder's states.
    cross = next((core for core in cores if core not in attending), None)

    def width_inside(leaf: int) -> int:
        found = mlp_of(reading, leaf, path, events, attention)
        return found.post.shape[-1] if found is not None and found.post is not None else 0

    added = named(reading, leaves, own, attention, cross, call.first, width_inside)
    spots = {name: reading.spot(value, path) for name, value in added.items()}
    stream: dict[str, Spot] = {}
    if chain and not way.norms:
        stream["residual_in"] = start
        between = middle(reading, way, added, path, call.first)
        if between is not None:
            stream["residual_mid"] = between
        stream["residual_out"] = Spot(path, "output", 0, (0,), flow.shapes[exit])
    # Where nothing was told apart as the MLP's, the whole of the block may show which it has.
    last = added.get("mlp_out", None if stream and not scaled else exit)
    return Block(
        path,
        flow.shapes[exit][-1],
        stream,
        {name: spot for name, spot in spots.items() if spot is not None},
        norms(reading, path, events, [entry, *(chain if stream else ())], leaves if stream else ()),
        None if attention is None or twice else heads_of(reading, attention, path, index),
        None if cross is None else heads_of(reading, cross, path, index),
        None if last is None else mlp_of(reading, last, path, events, attention),
        summed=_summed(way, added, flow) if added else (),
        scaled=scaled,
        refused={"attention": _TWICE} if twice else {},
    )


def _of_a_kind(reading: Reading, one: str, other: str) -> bool:
    """Whether two modules are of one class, and lie side by side."""
    first, second = reading.modules[one], reading.modules[other]
    return type(first) is type(second) and one.rpartition(".")[0] == other.rpartition(".")[0]


def _summed(way: Stream, added: Mapping[str, int], flow: Dataflow) -> list[Summed]:
    """The values added before each norm on the way, and behind the last of them."""
    names = {value: name for name, value in added.items()}
    found: list[Summed] = []
    first = 0
    for norm, count in way.norms:
        event = flow.events[norm]
        before = tuple(names[leaf] for leaf in way.leaves[first:count])
        found.append(Summed(before, event.path, event.call))
        first = count
    behind = tuple(names[leaf] for leaf in way.leaves[first:])
    return [*found, Summed(behind)] if behind and found else found
