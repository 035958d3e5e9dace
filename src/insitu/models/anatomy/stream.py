"""The residual stream of a block: what it is, what is added to it, and what norms it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from insitu.models.anatomy.heads import Core
from insitu.models.anatomy.reading import RESHAPES, Reading
from insitu.models.parts import Spot

_SUMS = frozenset(["add", "iadd", "radd"])
_FOR_SHAPE = frozenset(["expand_as", "reshape_as", "type_as", "view_as"])  # of the second argument
_MIXES = frozenset(["conv1d"])  # positions: a state-space layer


def find_stream(
    reading: Reading, exit: int, entry: int, within: str
) -> tuple[list[int], list[int]]:
    """The residual stream from a block's input to its output, and what is added to it.

    Returns:
        The values of the stream, from first to last, without the input, none if the output is
        no sum with it; and what is added, in the order in which it is.
    """
    flow = reading.flow
    reached: dict[int, bool] = {entry: True}

    def reaches(value: int) -> bool:
        if value not in reached:
            reached[value] = False
            maker = flow.maker(value)
            if maker is not None and maker.is_within(within):
                if maker.function in _SUMS:
                    reached[value] = any(map(reaches, maker.inputs))
                elif maker.function in (*RESHAPES, "clamp") and maker.inputs:
                    reached[value] = reaches(maker.inputs[0])
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
) -> dict[str, int]:
    """Which of the values that are added is what, by name.

    Args:
        reading: the forward.
        leaves: what is added.
        stream: the values of the residual stream.
        attention: the block's attention.
        cross: its attention to an encoder's states.
        first: the block's first event.
    """
    found: dict[str, int] = {}
    rest: list[int] = []
    mixing: set[int] = set()
    for leaf in leaves:
        cone = set(reading.cone(leaf, stream, first))
        if any(reading.flow.events[at].function in _MIXES for at in cone):
            mixing.add(leaf)
            rest.append(leaf)
        elif cross is not None and cross.event in cone:
            found.setdefault("cross_attention_out", leaf)
        elif attention is not None and attention.event in cone:
            found.setdefault("attention_out", leaf)
        else:
            rest.append(leaf)
    for leaf in rest:
        # Of two that do not attend, the first mixes positions in some other way.
        is_first_of_two = attention is None and len(rest) > 1
        is_mixer = leaf == rest[0] and (leaf in mixing or is_first_of_two)
        found.setdefault("mixer_out" if is_mixer else "mlp_out", leaf)
    return found if len(found) == len(leaves) else {}


def middle(
    reading: Reading,
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
        maker = reading.flow.maker(value)
        if maker is not None and maker.function in _SUMS and last in maker.inputs:
            (onward,) = [part for part in maker.inputs if part != last] or [value]
            while onward in chain:
                maker = reading.flow.maker(onward)
                if maker is None or maker.function in _SUMS:
                    one_by_one = reading.leads_to({onward}, last, first)
                    return reading.spot(onward, within) if one_by_one else None
                onward = maker.inputs[0]
    return None


def norms(
    reading: Reading, path: str, events: Sequence[int], stream: Sequence[int], leaves: Sequence[int]
) -> list[str]:
    """The norms of a block: those of the residual stream, else those of what is added to it."""
    flow = reading.flow
    width = flow.shapes[stream[0]][-1]
    before: list[str] = []
    after: list[str] = []
    others: list[str] = []
    for at in events:
        event = flow.events[at]
        if event.function or not event.path.startswith(f"{path}.") or not event.inputs:
            continue
        module = reading.modules[event.path]
        weight = getattr(module, "weight", None)
        vector = isinstance(weight, torch.Tensor) and tuple(weight.shape) == (width,)
        named = "norm" in type(module).__name__.lower()
        if not (vector or named) or flow.shapes[event.inputs[0]][-1] != width:
            continue
        others.append(event.path)
        if event.inputs[0] in stream:
            before.append(event.path)
        elif not set(event.outputs).isdisjoint(leaves):
            after.append(event.path)
    return before or after or others
