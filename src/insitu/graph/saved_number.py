"""What a saved number is after the run: to Python a number, and to torch's C code a tensor of it.

That it is a number is not known where `.save()` is called, so it cannot be an `int` or a `float`
itself. It hands all that it is asked on to its number. It has no `__getitem__` as proxies have:
`torch.tensor([x, y])` would take it for a sequence.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from insitu.graph.dispatch import at_once
from insitu.graph.held_value import HeldValue
from insitu.graph.node import NO_KWARGS

_OWN = frozenset(["result", "written"])


class SavedNumber(HeldValue, torch.Tensor):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A number that was saved. `x.value` is the plain one, and so is all that is computed with it.

    `isinstance(x, int)` holds where it is one.
    """

    def __getattribute__(self, name: str) -> Any:
        if name == "value":
            return object.__getattribute__(self, "_held")
        if name[0] == "_" or name in _OWN:
            return object.__getattribute__(self, name)
        return getattr(object.__getattribute__(self, "_held"), name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return at_once(func, args, kwargs or NO_KWARGS)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return at_once(getattr(ufunc, method), inputs, kwargs)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy as np

        return np.array(self._held, dtype)

    def __array_function__(
        self, func: Callable[..., Any], types: Any, args: Any, kwargs: Mapping[str, Any]
    ) -> Any:
        return at_once(func, args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._held, name, value)  # raises, as of any number

    def __dir__(self) -> list[str]:
        return sorted({*dir(self._held), "value"})

    def __len__(self) -> int:
        return len(self._held)  # raises, and so do the next ones

    def __iter__(self) -> Any:
        return iter(self._held)

    def __contains__(self, item: object) -> bool:
        return item in self._held

    def __reversed__(self) -> Any:
        return reversed(self._held)

    def __copy__(self) -> Any:
        return self._held

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._held

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self._held), (self._held,)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return repr(self._held)

    def __str__(self) -> str:
        return str(self._held)

    def __round__(self, ndigits: int | None = None) -> Any:
        return round(self._held, ndigits)


def _handed_on(function: Any) -> Any:
    def method(self: SavedNumber, *args: Any) -> Any:
        return function(self._held, *args)

    return method


def _reflected(function: Any) -> Any:
    def method(self: SavedNumber, other: Any) -> Any:
        return function(other, self._held)

    return method


_own: Any = SavedNumber
_BUILTIN = (hash, format, bool, int, float, complex, abs)
_BY_NAME = ("index", "neg", "pos", "invert", "eq", "ne", "lt", "le", "gt", "ge")
_REFLECTED = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "xor")
for _function in (*_BUILTIN, math.trunc, math.floor, math.ceil):
    setattr(_own, f"__{_function.__name__}__", _handed_on(_function))
for _name in _BY_NAME:
    setattr(_own, f"__{_name}__", _handed_on(getattr(operator, _name)))
_binary: Any
for _name in (*_REFLECTED, "and_", "or_", "divmod"):
    # `pow` takes a third number, and there is no `divmod` among the operators.
    _binary = {"divmod": divmod, "pow": pow}.get(_name) or getattr(operator, _name)
    _name = _name.rstrip("_")
    setattr(_own, f"__{_name}__", _handed_on(_binary))
    setattr(_own, f"__r{_name}__", _reflected(_binary))
    if hasattr(torch.Tensor, f"__i{_name}__"):  # `x += 1` makes a new number
        setattr(_own, f"__i{_name}__", _handed_on(_binary))
