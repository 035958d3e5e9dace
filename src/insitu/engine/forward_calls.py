"""Events of a forward, of which its dataflow consists: calls of modules and of torch functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Event(NamedTuple):
    """A call of a module, or of a torch function in a module's own forward.

    Attributes:
        path: the module's path; of a function, that of the module whose forward calls it.
        function: the function's name, such as "softmax"; "" for a call of the module.
        call: which call of the module, or of the function by the module, from 0; -1 of a function
            that a cache calls, which is none of the module's own.
        inputs: the values among its arguments, in their order.
        outputs: the values that it returned.
        first: the event with which the call began; events of a module come when it returns.
    """

    path: str
    function: str
    call: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    first: int

    def is_within(self, path: str) -> bool:
        """Returns whether this happens in a module, or is a call of it."""
        return self.path == path or self.path.startswith(f"{path}.") or not path


class Returned(NamedTuple):
    """One way in which a module returned a value.

    Attributes:
        event: the module's call.
        item: where in its output the value is: indices and keys, none if it is the output.
    """

    event: int
    item: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Value:
    """Stands for a tensor among the arguments of an event.

    Attributes:
        number: which value it was.
    """

    number: int


class Applied(NamedTuple):
    """What a function or a module was called with, so that it can be called again.

    Attributes:
        function: the torch function, None for a call of the module.
        args: its arguments, with a `Value` in the place of each tensor.
        kwargs: its keyword arguments, likewise.
    """

    function: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
