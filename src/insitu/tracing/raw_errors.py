"""Errors of Python and torch that a block raises because of a proxy, said in our words.

Assigning an attribute, or giving a proxy to `torch.vmap`, fails before anything of ours is
called. So it is looked at when the block ends with that error, which costs other blocks nothing.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import re
from types import TracebackType
from typing import Any

from insitu.graph.errors import InsituError, OperationError, PathError
from insitu.graph.location import Location
from insitu.graph.proxy import AnyProxy
from insitu.graph.recorded import unassignable
from insitu.graph.structure import map_structure


def raise_explained(error: BaseException) -> None:
    """Raises an error of Insitu instead of one that a block raised; does nothing if that fits.

    Args:
        error: the error.
    """
    if isinstance(error, InsituError) or error.__traceback__ is None:
        return
    steps = _steps(error.__traceback__)
    instead = _assigned(error, steps[-1]) or _saved(error, steps[-1]) or _transformed(error, steps)
    if instead is not None:
        raise instead from error


def _steps(traceback: TracebackType | None) -> list[TracebackType]:
    """The frames that an error went through, the outermost first."""
    steps: list[TracebackType] = []
    while traceback is not None:
        steps.append(traceback)
        traceback = traceback.tb_next
    return steps


def _assigned(error: BaseException, last: TracebackType) -> InsituError | None:
    """The error for `proxy.name = value`."""
    found = _NO_ATTRIBUTE.match(str(error)) if isinstance(error, AttributeError) else None
    return None if found is None else unassignable(found[1], _location(last))


def _saved(error: BaseException, last: TracebackType) -> InsituError | None:
    """The error for `[].save()` and the like."""
    found = _NOT_SAVED.match(str(error)) if isinstance(error, AttributeError) else None
    if found is None:
        return None
    filled = "values[name] = x.save()" if found[1] == "dict" else "values.append(x.save())"
    empty = {"list": "[]", "dict": "{}"}.get(found[1])
    return PathError(
        f"A {found[1]} of Python's has no `.save()`: save the values in it. "
        + (f"Write `values = {empty}`, and `{filled}`." if empty else "Write `x.save()`."),
        _location(last),
    )


def _transformed(error: BaseException, steps: list[TracebackType]) -> InsituError | None:
    """The error for a function transform of torch's, such as `torch.vmap`, on a proxy."""
    inside = [n for n, step in enumerate(steps) if _TRANSFORMS in step.tb_frame.f_code.co_filename]
    if not inside[:1] or inside[0] == 0 or not any(_takes_proxies(steps[n]) for n in inside):
        return None
    return OperationError(
        "`torch.vmap` and the functions of `torch.func` need values, and a recorded one has none "
        "while the block is open. Write `insitu.apply(torch.vmap(f), value)`, which calls it while "
        "the model runs, or save what it needs and call it after the block. (torch: "
        f"{str(error).partition(chr(10))[0]})",
        _location(steps[inside[0] - 1]),
    )


def _takes_proxies(step: TracebackType) -> bool:
    """Whether a frame has a proxy among its arguments."""
    found: list[Any] = []

    def leaf(item: Any) -> None:
        if isinstance(item, AnyProxy):
            found.append(item)

    map_structure(leaf, list(step.tb_frame.f_locals.values()))
    return bool(found)


def _location(step: TracebackType) -> Location:
    return Location(step.tb_frame.f_code, step.tb_lasti)


_NOT_SAVED = re.compile(r"'(list|dict|tuple|set)' object has no attribute 'save'")
_TRANSFORMS = "_functorch"
_NO_ATTRIBUTE = re.compile(r"'(?:\w*Proxy|_Part)' object has no attribute '(\w+)'")
