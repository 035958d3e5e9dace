"""What a saved tensor is after the run: a tensor.

Torch's C code, NumPy and tokenizers ask for a tensor itself, and not for something that behaves
as one: `table[x]` of anything else with a length is an index for each axis. So what `.save()`
returns is a tensor from the start. While its block is open there is nothing in it, and it records
as any other proxy does (`SavedProxy`); the run then gives it the memory of the value.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import copy
import operator
from collections import deque
from collections.abc import Callable
from sys import getrefcount
from typing import Any, Self, cast

import torch
from torch import nn

from insitu.graph.errors import OptionError
from insitu.graph.location import here


class SavedTensor(torch.Tensor):
    """A tensor that was saved. Values computed with it are plain `torch.Tensor`s.

    It keeps nothing of the run but its memory. It is pickled as a plain tensor, so that what reads
    the file needs no Insitu.
    """

    # Operations do not come by Python, and what they return is no `SavedTensor`.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @property
    def value(self) -> torch.Tensor:
        """The value as a plain `torch.Tensor`, in the same memory.

        It is the same object each time, unless the tensor is sparse or quantised. Torch does not
        tell whether the memory of those was exchanged.
        """
        kept: Any = vars(self).get("_kept")
        if self.requires_grad:
            # Gradients have to arrive here: where the value came with its history, they do.
            if kept is None or not kept.requires_grad:
                return self.as_subclass(torch.Tensor)
        elif kept is None or not _same_memory(self, kept):
            # No view: that would refer to this from within torch, where no garbage is collected.
            kept = vars(self)["_kept"] = torch.Tensor.detach(self)
        return cast(torch.Tensor, kept)

    def constant(self) -> torch.Tensor:
        """Returns what a later block records: a leaf that gradients go to has to stay itself."""
        return self if self.requires_grad else self.value

    @property
    def _content(self) -> torch.Tensor:
        return self.value

    def _put(self, content: object) -> None:
        """Does nothing: what a run has saved stays, also if it fails after that."""

    def detach(self) -> Self:
        """Returns the value without its history, in the same memory."""
        # `nn.Parameter(x)` and `nn.Buffer(x)` require that it is of the same class.
        return become(torch.Tensor.detach(self), type(self))

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        # How `nn.Parameter(x)` marks tensors of other classes. Such a parameter would be left
        # alone by code that asks for its type, and it is nothing but a parameter.
        vars(self).clear()
        become(self, nn.Parameter)

    @property
    def _is_buffer(self) -> bool:
        return False

    @_is_buffer.setter
    def _is_buffer(self, value: bool) -> None:
        vars(self).pop("_kept", None)
        become(self, torch.Tensor)._is_buffer = value

    def __copy__(self) -> SavedTensor:
        return become(copy.copy(self._plain()), SavedTensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> SavedTensor:
        if id(self) not in memo:
            memo[id(self)] = become(copy.deepcopy(self._plain(), memo), SavedTensor)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return cast(Any, self._plain()).__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return repr(self.value)

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)

    def __dir__(self) -> list[str]:
        return sorted({*dir(torch.Tensor), "value"})

    def _plain(self) -> torch.Tensor:
        """The tensor as a plain one: a leaf where this is one."""
        if not self.requires_grad or not self.is_leaf:
            return self.value
        return torch.Tensor.detach(self).requires_grad_()


class SavedList(list[Any]):
    """What was saved in every step: the list of its values, and pickled as a plain one."""

    @property
    def value(self) -> list[Any]:
        """The values as a plain list: the same object each time, unless the list has changed."""
        kept = vars(self).get("_kept")
        if kept is None or len(kept) != len(self) or not all(map(operator.is_, kept, self)):
            kept = vars(self)["_kept"] = list(self)
        return kept

    @property
    def _content(self) -> list[Any]:
        return self.value

    def _put(self, content: object) -> None:
        """Does nothing: see `SavedTensor`."""

    def __copy__(self) -> list[Any]:
        return list(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> list[Any]:
        return copy.deepcopy(list(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return list, (list(self),)


def become(thing: Any, kind: type[Any]) -> Any:
    """Gives an object another class, also where setting attributes means something else there."""
    set_class(thing, kind)
    return thing


def blank() -> Any:
    """Returns a tensor without any content."""
    try:
        return _EMPTY.data  # a third of the time that the other way takes
    except Exception:  # under a mode of torch's that wants no ordinary tensors
        return cast(Any, torch.Tensor)._make_subclass(torch.Tensor, _EMPTY)


def fill(holder: Any, value: torch.Tensor) -> None:
    """Makes what `blank` gave a `SavedTensor`.

    Args:
        holder: what `blank` gave.
        value: an ordinary tensor, that nobody else has.
    """
    entries = holder.__dict__
    entries.clear()
    if value.requires_grad:
        # Whoever differentiates a loss by `x.value` has to get the tensor that the loss is of.
        entries["_kept"] = value
        value = value.as_subclass(torch.Tensor)
    # Not `holder.data = value`, which keeps device and layout, and knows no history.
    swap(holder, value)
    set_class(holder, SavedTensor)


def hold(holder: Any, value: object) -> None:
    """Notes in what `blank` gave a value that is no ordinary tensor."""
    entries: dict[str, Any] = holder.__dict__
    entries.clear()
    entries["_held"] = value
    if isinstance(value, bool | int | float | complex):
        # Torch's C code looks into the memory: `torch.tensor(x)` is then of that number.
        # An integer may have more than 64 bits.
        with contextlib.suppress(RuntimeError, OverflowError, ValueError):
            swap(holder, torch.tensor(value, device="cpu"))


def empty(holder: Any, entries: dict[str, Any]) -> None:
    """Takes the content of a tensor or a list, and gives it other attributes."""
    own: dict[str, Any] = holder.__dict__
    own.clear()
    own.update(entries)
    if isinstance(holder, torch.Tensor):
        swap(holder, _EMPTY.data)
    else:
        holder.clear()


def device_name(device: str | torch.device) -> str:
    """Returns the name of the device that a copy is saved to.

    Args:
        device: the device.

    Raises:
        OptionError: if there is no such device.
    """
    try:
        return str(torch.device(device))
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"`to` is a device, such as 'cpu': {reason}", here(3)) from error


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a tensor has not been given other memory since; where nobody can tell, False."""
    try:
        return one.is_set_to(other) and one.dtype == other.dtype
    except (RuntimeError, NotImplementedError):  # torch cannot ask sparse and quantised ones
        return False


set_class: Callable[[Any, type[Any]], None] = vars(object)["__class__"].__set__
swap: Callable[[torch.Tensor, torch.Tensor], None] = torch._C._swap_tensor_impl  # pyright: ignore
# Of a dtype that nothing is computed in: where torch looks at it all the same, it raises.
_EMPTY = torch.empty(0, dtype=torch.bits8)

spent: deque[torch.Tensor] = deque(maxlen=64)
"""Tensors that runs have left without content, which are as good as what `blank` makes."""


def _references(values: list[Any]) -> int:
    value = values[0]
    return getrefcount(value)


ALONE = _references([object()])
"""How many references a function counts to a value of a list that is one of its variables too."""
