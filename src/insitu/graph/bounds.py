"""What operations may make of Python's own values, bounded before they make it.

Tensors are bounded by memory, and by the `Limits` of a run. Python's integers, strings and lists
are not: `1 << (1 << 40)` and `"%1000000000d" % 1` are short to write. In every run they stay below
the numbers here, and so do the items of a `fold` and the tensors into which one is divided. An
operation on tensors asks for nothing but the type of its first operand.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, Protocol, cast

from torch import Tensor

from insitu.graph.errors import LimitError, OperationError

MOST_BITS = 4096
"""Of an integer. Python prints no integer of more than 4300 digits, which is 14 284 bits."""

MOST_ENTRIES = 2**16
"""Of a tuple, list or dictionary with all that is in it, an entry counted where it stands."""

MOST_NUMBERS = 2**20
"""Of the list that `tolist` makes, and the characters of a string."""

MOST_AXES = 64
"""Of a tensor: as many as most of what torch computes takes."""

MOST_ITEMS = 2**20
"""Of a `fold`, times those of the ones around it."""

DEEPEST = 100
"""How many containers may stand in each other."""

_CONTAINERS = (tuple, list, dict)
_SEQUENCES = (tuple, list, str, bytes)


class Counter(Protocol):
    """Counts what runs in functions that were recorded, for the limits of a run."""

    def call(self, nodes: int) -> None:
        """Counts a call of a function of so many nodes, and raises if that is too much."""
        ...

    def repeated(self, nodes: int) -> None:
        """Raises if a function of so many nodes cannot be called as often as it will be."""
        ...

    def inner(self, operation: Any) -> Callable[..., Any]:
        """Returns what computes an operation in a function that was recorded."""
        ...

    def rows(self, rows: Any) -> Any:
        """Returns the nodes of a graph with operations that count what they take."""
        ...

    def tick(self) -> None:
        """Raises if there is no time left."""
        ...

    def part(self, nodes: Sequence[int]) -> AbstractContextManager[None]:
        """Lets these nodes be run again in a `with` block, as if they had not run."""
        ...


counting: ContextVar[Counter | None] = ContextVar("counting", default=None)
"""What counts the nodes that run, where a run has limits."""

_around: ContextVar[int] = ContextVar("around", default=1)


def exceeded(what: str, found: float, most: float, instead: str) -> LimitError:
    """Returns the error for an operation that would make too much.

    Args:
        what: what it makes, with its number.
        found: the number.
        most: the bound.
        instead: what to write instead.
    """
    message = f"{what}, and at most {most:,} are made in a run: {instead}"
    return LimitError(message, limit="values", found=found, allowed=most)


def is_container(value: Any) -> bool:
    """Returns whether a value is a tuple, list or dictionary that may hold others."""
    return isinstance(value, _CONTAINERS)


def check_entries(value: Any, times: int = 1) -> None:
    """Checks that a structure is neither too large nor too deep.

    Args:
        value: any structure. What stands in it twice counts twice, and is looked at once.
        times: how often it is to stand in another.

    Raises:
        LimitError: if it has more than `MOST_ENTRIES` entries, or is nested deeper than `DEEPEST`.
    """
    entries = times * _counted(value, 0, {})[0]
    if entries > MOST_ENTRIES:
        raise exceeded(f"makes a structure of {entries:,} entries", entries, MOST_ENTRIES, _STACK)


def _counted(item: Any, depth: int, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many entries a structure has, and how deep it is. It raises as `check_entries` does."""
    if not isinstance(item, _CONTAINERS):
        return 1, 0
    held = cast("Any", item)
    found = known.get(id(held))
    if found is None:
        if depth > DEEPEST:
            raise exceeded("makes a structure nested deeper", depth, DEEPEST, _FLAT)
        inner = [_counted(one, depth + 1, known) for one in _items(held)]
        found = 1 + sum(one for one, _ in inner), 1 + max((one for _, one in inner), default=0)
        known[id(held)] = found
    if depth + found[1] > DEEPEST + 1:
        raise exceeded("makes a structure nested deeper", depth, DEEPEST, _FLAT)
    return found


_FLAT = "save the values in it one by one"
_STACK = "keep numbers in a tensor, and save the values in it one by one"
_AFTER = "save what it is made of, and compute it with the saved values after the block"


def _items(value: Any) -> Any:
    return cast("Any", value).values() if isinstance(value, dict) else value


def _check_sum(first: Any, second: Any) -> None:
    if isinstance(first, _SEQUENCES) and isinstance(second, _SEQUENCES):
        if isinstance(first, str | bytes) or isinstance(second, str | bytes):
            _check_length(len(cast("Any", first)) + len(cast("Any", second)))
        else:
            check_entries((first, second))


def _check_product(first: Any, second: Any) -> None:
    if isinstance(first, int) and isinstance(second, int):
        _check_bits(first.bit_length() + second.bit_length())
        return
    for one, times in ((first, second), (second, first)):
        if isinstance(one, _SEQUENCES) and isinstance(times, int):
            if isinstance(one, str | bytes):
                _check_length(len(one) * max(times, 0))
            else:
                check_entries(one, max(times, 0))


def _check_power(first: Any, second: Any) -> None:
    if isinstance(first, int) and isinstance(second, int) and second > 0 and abs(first) > 1:
        _check_bits(first.bit_length() * second)


def _check_shift(first: Any, second: Any) -> None:
    if isinstance(first, int) and isinstance(second, int) and first:
        _check_bits(first.bit_length() + max(second, 0))


def _check_remainder(first: Any, second: Any) -> None:
    if isinstance(first, str | bytes):
        raise OperationError("a string is not formatted in a run: format the saved value after it")


def _check_bits(bits: int) -> None:
    if bits > MOST_BITS:
        what = f"makes an integer of about {_shortly(bits)} bits"
        raise exceeded(what, bits, MOST_BITS, "make a float or a tensor of it first, or " + _AFTER)


def _check_length(length: int) -> None:
    if length > MOST_NUMBERS:
        what = f"makes a string of {_shortly(length)} characters"
        raise exceeded(what, length, MOST_NUMBERS, _AFTER)


def _shortly(number: int) -> str:
    """A number that may itself be too long to print."""
    return f"{number:,}" if number.bit_length() < 128 else f"2**{number.bit_length()}"


# Each of these runs as often as all others together, on tensors nearly always: they are written
# out, so that a tensor on the left costs them one comparison.


def _add(first: Any, second: Any, /) -> Any:
    if type(first) is not Tensor and type(second) is not Tensor:
        _check_sum(first, second)
    return first + second


def _mul(first: Any, second: Any, /) -> Any:
    if type(first) is not Tensor and type(second) is not Tensor:
        _check_product(first, second)
    return first * second


def _pow(first: Any, second: Any, /) -> Any:
    if type(first) is not Tensor and type(second) is not Tensor:
        _check_power(first, second)
    return first**second


def _mod(first: Any, second: Any, /) -> Any:
    if type(first) is not Tensor and type(second) is not Tensor:
        _check_remainder(first, second)
    return first % second


def _lshift(first: Any, second: Any, /) -> Any:
    if type(first) is not Tensor and type(second) is not Tensor:
        _check_shift(first, second)
    return first << second


OPERATORS: Mapping[str, Callable[..., Any]] = {
    "add": _add,
    "mul": _mul,
    "pow": _pow,
    "mod": _mod,
    "lshift": _lshift,
}
"""Operators by their names that make large values of small ones, each with its bound.

Those that write in place write into tensors only: see `put.py`.
"""


def _parts(name: str, tensor: Tensor, given: Sequence[Any]) -> int:
    """At most how many tensors one is divided into, or how many lists and numbers it becomes."""
    if name == "tolist":
        sizes, found = 1, 0
        for size in tensor.shape:
            sizes *= size
            found += sizes
        return found
    numbers = [one for one in given if isinstance(one, int)]
    if name in ("chunk", "hsplit", "vsplit", "dsplit", "tensor_split"):
        tensors = [one.numel() for one in given if isinstance(one, Tensor)]
        asked = max([*numbers, *tensors], default=0)
        return asked if name == "tensor_split" else min(asked, max(tensor.shape, default=0))
    if name == "unbind":
        dim = numbers[0] if numbers else 0
        return tensor.shape[dim] if -tensor.ndim <= dim < tensor.ndim else 0
    size = numbers[0] if numbers else 1  # `split`
    return max(tensor.shape, default=0) // max(size, 1)


def divided(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that divides a tensor, into so many parts only that they fit.

    Args:
        name: its name: one of `DIVIDING`.
        function: the function.
    """
    most = MOST_NUMBERS if name == "tolist" else MOST_ENTRIES
    kind = "a list" if name == "tolist" else "a tuple"

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        tensor = next((one for one in given if isinstance(one, Tensor)), None)
        if tensor is not None:
            given = [one for one in given if one is not tensor]
            found = _parts(name, tensor, given)
            if found > most:
                what = f"makes {kind} of {_shortly(found)} entries"
                raise exceeded(what, found, most, "save the tensor and divide it after the block")
            counter = counting.get()
            if counter is not None:
                counter.call(found)
        return function(*args, **kwargs)

    return called


def shaped(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that gives a tensor other sizes, of so many axes only as there may be.

    Args:
        function: the function: one of `SHAPING`.
    """

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if len(args) > MOST_AXES:
            check_axes(len(args) - 1)
        for arg in (*args, *kwargs.values()):
            if isinstance(arg, tuple | list) and len(cast("list[Any]", arg)) > MOST_AXES:
                check_axes(len(cast("list[Any]", arg)))
        return function(*args, **kwargs)

    return called


SHAPING = frozenset(
    (
        *("broadcast_to", "expand", "new_full", "new_ones", "new_zeros", "repeat", "reshape"),
        *("tile", "unflatten", "unravel_index", "view"),
    )
)
"""The names of operations that are given the sizes of what they make."""


def check_axes(axes: int) -> None:
    """Raises if a tensor would have more axes than it may have.

    Args:
        axes: how many.

    Raises:
        LimitError: if it would.
    """
    if axes > MOST_AXES:
        what = f"makes a tensor of {axes:,} axes"
        raise exceeded(what, axes, MOST_AXES, "give it fewer axes")


DIVIDING = frozenset(
    ("chunk", "dsplit", "hsplit", "split", "tensor_split", "tolist", "unbind", "vsplit")
)
"""The names of operations that make many Python values of one tensor."""


@contextmanager
def items(xs: Any, function: Any) -> Generator[None]:
    """Bounds the calls of a function for each of some items, in the block that makes them.

    Args:
        xs: the items.
        function: the function that is called. It has `nodes` if it was recorded.

    Raises:
        LimitError: if there are too many, counted together with the loops around this one.
    """
    count = xs.shape[0] if isinstance(xs, Tensor) and xs.ndim else len(xs)
    whole = _around.get() * count
    if whole > MOST_ITEMS:
        what = f"calls its function {_shortly(whole)} times"
        raise exceeded(what, whole, MOST_ITEMS, "compute with whole tensors instead")
    counter, nodes = counting.get(), getattr(function, "nodes", 0)
    if counter is not None:
        counter.repeated(whole * nodes)
    token = _around.set(whole)
    try:
        yield
    finally:
        _around.reset(token)
