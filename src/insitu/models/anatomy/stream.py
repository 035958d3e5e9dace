"""The residual stream of a block: its values, the parts added to it, and the norms on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from insitu.models.anatomy.heads import Core
from insitu.models.anatomy.reading import RESHAPES, Reading
from insitu.models.parts import Spot

_SUMS = frozenset(["add", "iadd", "radd"])
_SCALES = frozenset(["div", "imul", "itruediv", "mul", "multiply", "rmul", "truediv"])
Through = Literal["sums", "factors", "norms"]
_FOR_SHAPE = frozenset(["expand_as", "reshape_as", "type_as", "view_as"])  # of the second argument
_MIXES = frozenset(["conv1d"])  # positions: a state-space layer


@dataclass(frozen=True, slots=True)
class Stream:
    """The way of the residual stream through a block.

    Attributes:
        chain: its values from first to last, without the input; none if the output is not reached.
        leaves: the added values, in the order in which they are added.
        sums: those values of the chain that something is added in.
        norms: the calls of norms on the way, and how many leaves are added before each.
    """

    chain: Sequence[int] = ()
    leaves: Sequence[int] = ()
    sums: Sequence[int] = ()
    norms: Sequence[tuple[int, int]] = ()


def find_stream(
    reading: Reading, exit: int, entry: int, within: str, through: Through = "sums"
) -> Stream:
    """The residual stream from a block's input to its output, and the values added to it.

    Args:
        reading: the forward.
        exit: what the block returns.
        entry: what it is given.
        within: the block's path.
        through: what may stand on the way: nothing but sums; factors too, which are the same at all
            positions; or norms of the sum besides.
    """
    flow = reading.flow
    reached: dict[int, bool] = {entry: True}
    width = flow.shapes[exit][-1]

    def is_small(value: int) -> bool:
        """Whether a value is of one number or of one a channel, and not made of the input."""
        shape = flow.shapes[value]
        single = math.prod(shape) in (1, width) and math.prod(shape[:-1]) == 1
        return single and not _is_made_of(reading, value, entry)

    def onwards(value: int) -> Sequence[int]:
        """The values along which the stream may have come to one."""
        norm = _norm_behind(reading, value, within) if through == "norms" else None
        if norm is not None:
            return [flow.events[norm].inputs[0]]
        maker = flow.maker(value)
        if maker is None or not maker.is_within(within):
            return ()
        if maker.function in _SUMS:
            return maker.inputs
        if maker.function in (*RESHAPES, "clamp"):
            return maker.inputs[:1]
        # The whole of a value may be taken as a part of it, beside an empty one.
        same = bool(maker.inputs) and flow.shapes[maker.inputs[0]] == flow.shapes[value]
        if through != "sums" and maker.function == "getitem" and same:
            return maker.inputs[:1]
        if through != "sums" and maker.function in _SCALES:
            large = [part for part in maker.inputs if not is_small(part)]
            return large if len(large) == 1 else ()
        return ()

    def reaches(value: int) -> bool:
        if value not in reached:
            reached[value] = False
            reached[value] = any(map(reaches, onwards(value)))
        return reached[value]

    def leaves_of(value: int) -> list[int]:
        """What a sum is made of, where the block itself makes it."""
        maker = flow.maker(value)
        if maker is None or maker.function not in _SUMS or maker.path != within:
            return [value]
        parts = [part for part in maker.inputs if flow.shapes[part] == flow.shapes[value]]
        # A bias that is added to a part belongs to it.
        if not all(_is_made_of(reading, part, entry) for part in parts):
            return [value]
        return [leaf for part in parts for leaf in leaves_of(part)]

    if exit == entry or not reaches(exit):
        return Stream()
    chain: list[int] = []
    sums: list[int] = []
    added: list[list[int]] = []
    norms: list[tuple[int, int]] = []
    value = exit
    while value != entry:
        chain.append(value)
        parts = onwards(value)
        onward = next(part for part in parts if reaches(part))
        norm = _norm_behind(reading, value, within) if through == "norms" else None
        if norm is not None:
            norms.append((norm, len(added)))
        elif (maker := flow.maker(value)) is not None and maker.function in _SUMS:
            others = [part for part in parts if part != onward]
            if through != "sums":  # a bias of the stream is no part of what is added
                others = [part for part in others if not is_small(part)]
                if not others:
                    value = onward
                    continue
            sums.append(value)
            added.append([leaf for part in others for leaf in leaves_of(part)])
        value = onward
    behind = [len(leaves) for leaves in added]
    return Stream(
        chain[::-1],
        [leaf for leaves in reversed(added) for leaf in leaves],
        sums[::-1],
        [(norm, sum(behind[count:])) for norm, count in reversed(norms)],
    )


def _norm_behind(reading: Reading, value: int, within: str) -> int | None:
    """The call of the norm in a block that has returned a value, None if none has."""
    flow = reading.flow
    for returned in flow.returned.get(value, ()):
        event = flow.events[returned.event]
        if event.path == within or not event.is_within(within) or len(event.inputs) != 1:
            continue
        if flow.shapes[event.inputs[0]] != flow.shapes[value] or event.inputs[0] == value:
            continue
        if _is_norm(reading, event.path, flow.shapes[value][-1]):
            return returned.event
    return None


def _is_norm(reading: Reading, path: str, width: int) -> bool:
    """Whether a module looks like a norm of values of a width."""
    module = reading.modules[path]
    weight = getattr(module, "weight", None)
    vector = isinstance(weight, torch.Tensor) and tuple(weight.shape) == (width,)
    return vector or "norm" in type(module).__name__.lower()


def _is_made_of(reading: Reading, value: int, entry: int) -> bool:
    """Whether numbers of a value come from those of another, and not just its shape."""
    waiting, seen = [value], set[int]()
    while waiting:
        now = waiting.pop()
        if now == entry:
            return True
        maker = reading.flow.maker(now)
        if now in seen or maker is None:
            continue
        seen.add(now)
        waiting.extend(maker.inputs[:1] if maker.function in _FOR_SHAPE else maker.inputs)
    return False


def named(
    reading: Reading,
    leaves: Sequence[int],
    stream: Collection[int],
    attention: Core | None,
    cross: Core | None,
    first: int,
    width_inside: Callable[[int], int],
) -> dict[str, int]:
    """Which of the values that are added is what, by name.

    Args:
        reading: the forward.
        leaves: the added values.
        stream: the values of the residual stream.
        attention: the block's attention.
        cross: its attention to an encoder's states.
        first: the block's first event.
        width_inside: how wide the layers are that make a value.
    """
    found: dict[str, int] = {}
    rest: list[int] = []
    mixing: set[int] = set()
    # A convolution of queries, keys or values is a part of attention.
    own: set[int] = set()
    for core in (attention, cross):
        if core is not None:
            own.update(reading.cone(reading.flow.events[core.event].outputs[0], stream, first))
    for leaf in leaves:
        cone = set(reading.cone(leaf, stream, first))
        if any(reading.flow.events[at].function in _MIXES for at in cone - own):
            mixing.add(leaf)
            rest.append(leaf)
        elif cross is not None and cross.event in cone:
            found.setdefault("cross_attention_out", leaf)
        elif attention is not None and attention.event in cone:
            found.setdefault("attention_out", leaf)
        else:
            rest.append(leaf)
    # Of two that do not attend, the first mixes positions in some other way.
    if rest and (rest[0] in mixing or (attention is None and len(rest) > 1)):
        found["mixer_out"] = rest.pop(0)
    if len(rest) == 2:
        # Behind the MLP there may be one more, narrower: an adapter, an embedding of each layer's.
        mlp, behind = rest
        if width_inside(mlp) <= width_inside(behind) or not reading.leads_to({mlp}, behind, first):
            return {}
        found["extra_out"] = rest.pop()
    if rest:
        found["mlp_out"] = rest[0]
    return found if len(found) == len(leaves) else {}


def middle(
    reading: Reading,
    way: Stream,
    added: Mapping[str, int],
    within: str,
    first: int,
) -> Spot | None:
    """The residual stream between attention and MLP, where one comes after the other."""
    last = added.get("mlp_out")
    if last is None or last not in way.leaves[1:]:
        return None
    before = None
    for value in way.sums:
        maker = reading.flow.maker(value)
        if before is not None and maker is not None and last in maker.inputs:
            one_by_one = reading.leads_to({before}, last, first)
            return reading.spot(before, within) if one_by_one else None
        before = value
    return None


def norms(
    reading: Reading, path: str, events: Sequence[int], stream: Sequence[int], leaves: Sequence[int]
) -> list[str]:
    """The norms of a block: those of the residual stream, else those of the values added to it."""
    flow = reading.flow
    width = flow.shapes[stream[0]][-1]
    before: list[str] = []
    after: list[str] = []
    others: list[str] = []
    for at in events:
        event = flow.events[at]
        if event.function or not event.path.startswith(f"{path}.") or not event.inputs:
            continue
        if not _is_norm(reading, event.path, width) or flow.shapes[event.inputs[0]][-1] != width:
            continue
        others.append(event.path)
        if event.inputs[0] in stream:
            before.append(event.path)
        elif not set(event.outputs).isdisjoint(leaves):
            after.append(event.path)
    return before or after or others
