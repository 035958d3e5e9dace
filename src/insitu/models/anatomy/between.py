"""What stands between two values of a forward, by its dataflow."""

from __future__ import annotations

from collections.abc import Collection

from insitu.engine.dataflow import Dataflow

MOVES = frozenset(
    (
        *("bfloat16", "clone", "contiguous", "dropout", "expand", "flatten", "float", "getitem"),
        *("half", "movedim", "permute", "reshape", "select", "slice", "squeeze", "swapaxes"),
        *("swapdims", "t", "to", "transpose", "type", "type_as", "unflatten", "unsqueeze", "view"),
        "view_as",
    )
)
"""Functions that leave numbers as they are."""

SCALES = frozenset(["div", "mul", "rmul", "truediv"])
"""Functions that only scale them, if what they multiply with is one number."""


def between(flow: Dataflow, first: Collection[int], last: int) -> list[str] | None:
    """Returns what changes numbers on the way from one value to another, None if there is no way.

    Args:
        flow: the dataflow of a forward.
        first: the values at the beginning, any of them.
        last: the value at the end.

    Returns:
        Modules by their paths, and functions as "path>function", in the order in which they ran.
    """
    made = {flow.made[value] for value in first if flow.made[value] is not None}
    start = min((at for at in made if at is not None), default=-1)
    leads: dict[int, bool] = {}
    waiting = [last]
    order: list[int] = []
    while waiting:  # what is behind the end and not before the beginning
        value = waiting.pop()
        if value in leads:
            continue
        leads[value] = value in first
        at = flow.made[value]
        if value in first or at is None or at < start:
            continue
        order.append(value)
        waiting.extend(flow.events[at].inputs)
    for value in sorted(order, key=lambda value: flow.made[value] or 0):
        maker = flow.maker(value)
        leads[value] = maker is not None and any(leads.get(part, False) for part in maker.inputs)
    if not leads[last]:
        return None
    makers = {flow.made[value] for value in order if leads[value]}
    events = [flow.events[at] for at in sorted(at for at in makers if at is not None)]
    return [f"{e.path}>{e.function}" for e in events if e.function and e.function not in MOVES]
