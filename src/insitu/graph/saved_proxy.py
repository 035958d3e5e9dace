"""What `.save()` returns: a proxy while its block is open, and the value itself after the run.

A value that may be a tensor is saved to an object of a class of tensors, which the run makes a
`SavedTensor` (`saved.py`). Where it turns out to be none, the object hands on to the value.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from insitu.graph.cells import WAITING, Missing
from insitu.graph.held_value import HeldValue, SavedNumber, refuse_json
from insitu.graph.location import here
from insitu.graph.node import Ref, ref
from insitu.graph.proxy import SAVED, AnyProxy, Proxy, StructureProxy
from insitu.graph.recorded import unassignable
from insitu.graph.recording import Recording
from insitu.graph.saved import (
    SavedList,
    become,
    empty,
    fill,
    hold,
)


class _Waiting(AnyProxy):
    """What `.save()` has returned, as long as the run has not put a value there: its own cell."""

    __slots__ = ()
    _missing: Any = WAITING
    if TYPE_CHECKING:
        _recording: Recording
        _ref: Ref

    @property
    def _cell(self) -> Any:
        return self

    @_cell.setter
    def _cell(self, cell: Any) -> None:
        """Leaves what an earlier `.save()` has returned to that one."""

    @property
    def _content(self) -> Any:
        return self._missing


class SavedProxy(_Waiting, torch.Tensor):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Stands for a value that was saved and may be a tensor, until the run makes it one."""

    def _put(self, content: Any) -> None:
        """Makes this what the run has saved."""
        if type(content) is _TENSOR:
            fill(self, content)
        elif type(content) is Missing:
            vars(self)["_missing"] = content
        else:
            hold(self, content)
            number = isinstance(content, bool | int | float | complex)
            become(self, SavedNumber if number else SavedObject)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or name == "grad":
            super().__setattr__(name, value)
            return
        if not self._recording.open:
            self._known()  # raises: it has no value
        raise unassignable(name, here())


class SavedObject(HeldValue, AnyProxy, torch.Tensor):  # pyright: ignore[reportIncompatibleVariableOverride]
    """What was saved and turned out to be no tensor, such as a tuple: it hands on to that.

    That is not known where `.save()` is called, and what that returns is of a class of tensors for
    good. To Python this is of the value's class: `isinstance(x, tuple)` holds.
    """

    def __hash__(self) -> int:
        return hash(self._held)

    def __len__(self) -> int:
        return len(self._held)


class SavedSteps(_Waiting, list[Any]):  # pyright: ignore
    """Stands for what every step saves, until the run makes it a list.

    Torch's C code takes a list for one, and any other sequence for indices of one axis each.
    """

    def _put(self, content: Any) -> None:
        """Makes this what the run has saved."""
        if type(content) is list:
            vars(self).clear()
            become(self, SavedList).extend(cast("list[Any]", content))
        else:
            vars(self)["_missing"] = content

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name != "grad":
            raise unassignable(name, here())
        super().__setattr__(name, value)

    def __reversed__(self) -> Any:
        return reversed(list(iter(self)))


def _handing_on(name: str) -> Any:
    """What a tensor has, and a proxy only hands on to its value or records as an attribute."""
    return property(lambda self: AnyProxy.__getattr__(self, name))


for _name in dir(torch.Tensor):
    if (_name[0] != "_" and not hasattr(AnyProxy, _name)) or _name == "__cuda_array_interface__":
        setattr(SavedProxy, _name, _handing_on(_name))
        setattr(SavedObject, _name, _handing_on(_name))

for _name in dir(list):
    if _name[0] != "_" and not hasattr(AnyProxy, _name):
        setattr(SavedSteps, _name, _handing_on(_name))


def _class_of_content(self: Any) -> Any:
    """The class of the value once there is one, so that `isinstance(x, tuple)` holds."""
    refuse_json()
    content = None if self._cell is None else self._cell._content
    return cast(Any, type)(self if content is None or type(content) is Missing else content)


class _SavedStructure(Proxy):
    """What `.save()` of a value gives that is known to be no tensor."""

    __slots__ = ()
    __class__ = cast(Any, property(_class_of_content))  # pyright: ignore


class _SavedTuple(StructureProxy):
    """What `.save()` of a `StructureProxy` gives."""

    __slots__ = ()
    __class__ = cast(Any, property(_class_of_content))  # pyright: ignore


def withdraw(holder: Any, recording: Recording, index: int, missing: Missing) -> None:
    """Takes a value back from where a run has put it.

    Args:
        holder: where it was put.
        recording: what it was saved in.
        index: the node that saves it.
        missing: why there is none.
    """
    if isinstance(holder, torch.Tensor | SavedList):
        source = ref(recording.graph.rows[index][3][0])
        empty(holder, {"_recording": recording, "_ref": source})
        become(holder, SavedSteps if isinstance(holder, list) else SavedProxy)
    cast(Any, holder)._put(missing)


SAVED.update(
    {
        torch.Tensor: SavedProxy,
        list: SavedSteps,
        Proxy: _SavedStructure,
        StructureProxy: _SavedTuple,
    }
)

_TENSOR = torch.Tensor
