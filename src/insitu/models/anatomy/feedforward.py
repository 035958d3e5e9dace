"""The MLP of a block: what stands around a nonlinearity, or the router of experts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from insitu.engine.dataflow import Event
from insitu.graph.node import SEPARATOR
from insitu.models.anatomy.heads import Core
from insitu.models.anatomy.reading import RESHAPES, Reading
from insitu.models.parts import Feedforward, Spot

_NONLINEAR = frozenset(
    (
        *("celu", "elu", "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu"),
        *("mish", "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "square", "tanh"),
    )
)


def mlp_of(
    reading: Reading, leaf: int, path: str, events: Sequence[int], attention: Core | None
) -> Feedforward | None:
    """Returns what an MLP works with, None if there is none.

    Args:
        reading: the forward.
        leaf: what it adds to the residual stream, or what the block returns.
        path: the block's path.
        events: the block's events.
        attention: the block's attention.
    """
    flow = reading.flow
    owner = _owner(reading, leaf, path, attention)
    down = reading.projection(leaf, events)
    router, weights = _router(reading, owner or path, events)
    if router is not None:
        return Feedforward(owner, router=router, weights=weights)
    if down is None:
        return Feedforward(owner) if owner else None
    layer = flow.events[down]
    found = _nonlinearity(reading, layer.inputs[0], events)
    if owner is None:
        parent = layer.path.rpartition(".")[0]
        owner = parent if parent != path and parent.startswith(f"{path}.") else None
    if found is None:
        return Feedforward(owner, out=layer.path)
    pre, value = found
    if owner is not None and not pre.path.startswith(f"{owner}"):
        owner = None  # a part of the block's, and no module of its own
    into = reading.projection(value, events)
    post = Spot(layer.path, "input", layer.call, (), flow.shapes[layer.inputs[0]])
    gates = _gate(reading, layer.inputs[0], events, into)
    return Feedforward(
        owner,
        pre,
        post,
        into=None if into is None else flow.events[into].path,
        gate=gates,
        out=layer.path,
    )


def _owner(reading: Reading, leaf: int, path: str, attention: Core | None) -> str | None:
    """The outermost module with linear layers in it that a contribution comes from."""
    flow, inside = reading.flow, f"{path}."

    def owns(module: str) -> bool:
        around = attention is not None and f"{attention.path}.".startswith(f"{module}.")
        if around or not module.startswith(inside):
            return False
        within = f"{module}." if module else ""
        return any(
            other.startswith(within) and reading.is_linear(other) for other in reading.modules
        )

    value = leaf
    while True:
        calls = [flow.events[returned.event] for returned in flow.returned.get(value, ())]
        calls = [call for call in calls if call.path.startswith(inside)]
        maker = flow.maker(value)
        paths = [call.path for call in reversed(calls)]
        if maker is not None:
            paths.append(maker.path)
        owner = next(filter(owns, paths), None)
        if owner is not None or maker is None:
            return owner
        # A module may return what it was given, as dropout does that drops nothing.
        calls = [call for call in calls if value not in call.inputs]
        inputs = calls[-1].inputs if calls else maker.inputs
        if not inputs or flow.made[inputs[0]] is None:
            return None
        value = inputs[0]


def _nonlinearity(reading: Reading, value: int, events: Sequence[int]) -> tuple[Spot, int] | None:
    """The nearest nonlinearity behind a value: what goes into it, and where that is read.

    One that is made of several, such as the square of what a ReLU gives, is one.
    """
    flow = reading.flow
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        now = waiting.pop(0)
        if now in seen:
            continue
        seen.add(now)
        found = _activated(reading, now, events)
        if found is not None:
            while (deeper := _activated(reading, found[1], events)) is not None:
                found = deeper
            return found
        maker = flow.maker(now)
        if maker is None or flow.made[now] not in events or _comes_from_a_layer(reading, now):
            continue
        waiting.extend(maker.inputs)
    return None


def _activated(reading: Reading, value: int, events: Sequence[int]) -> tuple[Spot, int] | None:
    """What goes into the nonlinearity that gives a value, None if none gives it."""
    flow = reading.flow
    for event in (flow.events[returned.event] for returned in flow.returned.get(value, ())):
        if reading.is_linear(event.path):
            return None
        if _is_activation(reading, event, value):
            place = Spot(event.path, "input", event.call, (), flow.shapes[value])
            return place, event.inputs[0]
    maker = flow.maker(value)
    if maker is None or flow.made[value] not in events or maker.function not in _NONLINEAR:
        return None
    place = f"{maker.path}{SEPARATOR}{maker.function}"
    return Spot(place, "input", maker.call, (), flow.shapes[maker.inputs[0]]), maker.inputs[0]


def _comes_from_a_layer(reading: Reading, value: int) -> bool:
    flow = reading.flow
    calls = (flow.events[returned.event] for returned in flow.returned.get(value, ()))
    return any(reading.is_linear(event.path) for event in calls)


def _is_activation(reading: Reading, event: Event, value: int) -> bool:
    """Whether a module changes numbers one by one: it has no weights and keeps the shape."""
    if len(event.inputs) != 1 or event.inputs[0] == value or event.function:
        return False
    module = reading.modules[event.path]
    if next(module.parameters(), None) is not None or isinstance(module, nn.Dropout):
        return False
    return reading.flow.shapes[event.inputs[0]] == reading.flow.shapes[value]


def _gate(reading: Reading, value: int, events: Sequence[int], into: int | None) -> str | None:
    """The layer whose output is multiplied with that of the nonlinearity."""
    flow = reading.flow
    maker = flow.maker(value)
    while maker is not None and maker.function in RESHAPES and maker.inputs:
        value = maker.inputs[0]
        maker = flow.maker(value)
    if maker is None or maker.function != "mul" or len(maker.inputs) != 2:
        return None
    found = {reading.projection(part, events) for part in maker.inputs}
    others = [call for call in found if call is not None and call != into]
    return flow.events[others[0]].path if others else None


def _router(reading: Reading, path: str, events: Sequence[int]) -> tuple[Spot | None, Spot | None]:
    """The scores of the experts, and the weights of those that are chosen."""
    flow = reading.flow
    if not reading.experts:
        return None, None
    rows, positions = reading.size
    sizes = ((rows * positions, reading.experts), (rows, positions, reading.experts))
    for at in events:
        event = flow.events[at]
        if not event.is_within(path) or event.function != "linear":
            continue
        scores = event.outputs[0]
        if flow.shapes[scores] not in sizes:
            continue
        return reading.spot(scores, path), _chosen(reading, scores, path, at, events)
    return None, None


def _chosen(
    reading: Reading, scores: int, path: str, at: int, events: Sequence[int]
) -> Spot | None:
    """The weights of the chosen experts: the last value made of the choice in its forward.

    It has a number for each of the chosen, or for each of all, 0 for those that are not.
    """
    flow = reading.flow
    choices = [
        index
        for index in range(at, events[-1] + 1)
        if (event := flow.events[index]).function == "topk"
        and event.is_within(path)
        and flow.shapes[event.outputs[0]][-1] == reading.chosen
        and reading.leads_to((scores,), event.inputs[0], at)
    ]
    if not choices:
        return None
    choice = flow.events[choices[-1]]
    *rows, count = flow.shapes[choice.outputs[0]]
    forms = ((*rows, count), (*rows, reading.experts), (reading.experts, *rows))
    last, derived = choice.outputs[0], {choice.outputs[0]}
    chosen = set(choice.outputs[1:])
    for index in range(choices[-1] + 1, events[-1] + 1):
        event = flow.events[index]
        if event.path != choice.path or not event.function or not event.outputs:
            continue
        gathered = event.function == "gather" and not chosen.isdisjoint(event.inputs)
        made = event.outputs[0]
        if (gathered or not derived.isdisjoint(event.inputs)) and flow.shapes[made] in forms:
            derived.add(made)
            last = made
    return reading.spot(last, path)
