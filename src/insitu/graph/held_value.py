"""A saved value that turned out to be no tensor: what `.save()` returned holds it.

That is not known where `.save()` is called, and what that returns is of a class of tensors for
good. To Python it is of the value's class: `isinstance(x, tuple)` holds. A number is to torch's C
code a tensor of it.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Mapping
from sys import _getframe
from types import CodeType, FrameType
from typing import Any, cast

import torch

from insitu.graph.dispatch import ENDED, at_once
from insitu.graph.errors import OperationError
from insitu.graph.location import here
from insitu.graph.node import NO_KWARGS, ref
from insitu.graph.recorded import AnyRecorded

# What the encoder asks for what it cannot write.
_NO_JSON: CodeType = json.JSONEncoder.default.__code__


def refuse_json() -> None:
    """Raises where JSON's encoder asks for the class of a saved value, to say what it cannot write.

    Its C code takes nothing for a number by its `__class__`, and its message would be that an
    `int` is not serialisable.

    Raises:
        OperationError: with the line to write.
    """
    frame: FrameType | None = _getframe(2)
    if frame.f_code.co_name == "__getattribute__":  # of the saved value's own
        frame = frame.f_back
    if frame is not None and frame.f_code is _NO_JSON:
        raise OperationError(
            "A saved value is written as JSON by its plain value: `json.dumps(x.value)`.", here()
        )


class HeldValue(AnyRecorded):
    """A value that was saved and is no tensor."""

    __slots__ = ()
    _recording = ENDED
    _ref = ref(0)
    _held: Any

    @property
    def _cell(self) -> HeldValue:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self

    @property
    def _content(self) -> Any:
        return self._held

    def _put(self, content: object) -> None:
        """Does nothing: see `SavedTensor`."""

    @property
    def __class__(self) -> Any:  # pyright: ignore
        refuse_json()
        return cast(Any, type(self._held))


_OWN = frozenset(["result", "written"])


class SavedNumber(HeldValue, torch.Tensor):
    """A number that was saved. `x.value` is the plain one, and so is all that is computed with it.

    It hands all that it is asked on to its number. It has no `__getitem__` as proxies have:
    `torch.tensor([x, y])` would take it for a sequence.
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
