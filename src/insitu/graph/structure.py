"""Values with structure: tensors inside tuples, lists, dictionaries, named tuples and slices.

Modules return such values and users build them. Other objects (a cache, a distribution) count as
leaves here. For what this does, `torch.utils._pytree` takes several times as long.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import MemberDescriptorType
from typing import Any, cast

import torch

from insitu.graph.errors import OperationError


def map_structure(function: Callable[[Any], Any], value: Any) -> Any:
    """Returns a value of the same structure with a function applied to each leaf.

    Args:
        function: what to do with each value that is no container.
        value: a leaf or containers of leaves. Dictionaries of other classes (such as
            `transformers.utils.ModelOutput`) keep their class.
    """
    kind: Any = cast(Any, type)(value)
    if kind is torch.Tensor:
        return function(value)
    if kind is tuple or kind is list:
        items = [map_structure(function, item) for item in cast("list[Any]", value)]
        return items if kind is list else tuple(items)
    if kind is slice:
        return slice(*(map_structure(function, x) for x in (value.start, value.stop, value.step)))
    # `value` is of this class, whatever it says: a saved dictionary says that it is one, and is a
    # leaf here.
    if _is_kind_of(kind, tuple) and hasattr(kind, "_fields"):
        fields = cast("tuple[Any, ...]", value)
        return kind(*(map_structure(function, x) for x in fields))
    if _is_kind_of(kind, tuple) and kind.__module__ == "torch.return_types":
        results = cast("tuple[Any, ...]", value)
        return kind([map_structure(function, x) for x in results])
    if _is_kind_of(kind, dict):
        entries = cast("dict[Any, Any]", value)
        mapped = {key: map_structure(function, item) for key, item in entries.items()}
        if _is_kind_of(kind, defaultdict):
            return kind(cast("defaultdict[Any, Any]", value).default_factory, mapped)
        return mapped if kind is dict else kind(mapped)
    return function(value)


_is_kind_of: Callable[[Any, Any], bool] = issubclass


def is_basic(key: Any) -> bool:
    """Returns whether indexing a tensor with a key gives a view of it and no copy."""
    if isinstance(key, tuple):
        return all(map(is_basic, cast("tuple[Any, ...]", key)))
    return isinstance(key, _BASIC) and not isinstance(key, bool)


_BASIC = (int, str, slice, type(None), type(Ellipsis))


def copied(value: Any, to: str | None = None) -> Any:
    """Returns a copy that shares no memory with a value, without history for autograd.

    Args:
        value: any structure. A tensor that is a part of a larger one is copied as that part.
        to: the device of the copy. Of what comes from a GPU to the CPU nobody waits for here: it
            is there when that GPU has been waited for.
    """
    if to is not None:
        return map_structure(lambda leaf: _moved(leaf, torch.device(to)), value)
    if type(value) is torch.Tensor and not value.requires_grad:  # the common case, first
        return value.clone()
    return map_structure(_copied_leaf, value)


def kept(value: Any, to: str | None = None) -> Any:
    """Returns a copy that shares no memory with a value, with its history for autograd.

    Args:
        value: any structure.
        to: the device of the copy.
    """

    def leaf(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return as_data(item)
        return item.clone() if to is None else item.to(to, copy=True)

    return map_structure(leaf, value)


def item(value: Any, key: Any, /) -> Any:
    """Returns what a key takes out of a value: a key of a tensor has an entry for each axis.

    Args:
        value: a tensor, or a structure.
        key: the key.
    """
    if type(key) is tuple and len(cast("tuple[Any, ...]", key)) > _LONG_KEY:
        from insitu.graph.bounds import check_axes  # nobody has such a key

        check_axes(len(cast("tuple[Any, ...]", key)))
    return value[key]


_LONG_KEY = 16  # longer ones are looked at


def clone(leaf: Any) -> Any:
    """Returns a copy of a tensor with its history for autograd; anything else as it is.

    Args:
        leaf: a value that is no container; `map_structure` brings it to the leaves of one.
    """
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Returns the tensors in a value, in their order.

    Args:
        value: any structure.
    """
    if type(value) is torch.Tensor:
        return [value]
    found: list[torch.Tensor] = []

    def leaf(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            found.append(item)

    map_structure(leaf, value)
    return found


def memory_of(value: Any) -> set[int]:
    """Returns where the tensors in a value have their memory.

    Args:
        value: any structure.
    """
    return {tensor.untyped_storage().data_ptr() for tensor in tensors_of(value)}


def apart_from(other: Any, value: Any) -> Any:
    """Returns a value with copies of those of its tensors that share memory with another value.

    Args:
        other: the other value, any structure.
        value: any structure.
    """
    memory = memory_of(other)

    def leaf(item: Any) -> Any:
        return item if memory.isdisjoint(memory_of(item)) else item.clone()

    return map_structure(leaf, value)


def storage_of(tensor: torch.Tensor) -> int:
    """Returns the identity of a tensor's storage, with data or without."""
    return cast(int, cast(Any, tensor).untyped_storage()._cdata)


def storages_of(value: Any) -> set[int]:
    """Returns the identities of the storages of the tensors in a value, with data or without."""
    return set(map(storage_of, tensors_of(value)))


def _moved(leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, torch.Tensor) or leaf.device == device:
        return _copied_leaf(leaf)
    source = leaf.detach()
    if source.is_cuda and device.type == "cpu":  # memory that a GPU can write to by itself
        target = torch.empty_like(source, device=device, pin_memory=True)
        return target.copy_(source, non_blocking=True)
    return source.to(device, copy=True)


def _copied_leaf(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.detach().clone()
    return leaf if isinstance(leaf, _DATA) else copy.deepcopy(as_data(leaf))


def as_data(leaf: Any) -> Any:
    """Returns a leaf that is saved: plain data, or an object, unless data alone is saved.

    Args:
        leaf: the leaf, which is no tensor. What an object refers to may be anything.

    Raises:
        OperationError: if data alone is saved, and it is none.
    """
    if only_data.get() and not isinstance(leaf, _DATA):
        raise OperationError(
            f"a {type(leaf).__name__} is no data, and a job saves tensors and plain data only: "
            "save the tensors in it"
        )
    return leaf


only_data: ContextVar[bool] = ContextVar("only_data", default=False)
"""Whether tensors and plain data alone may be saved, as in jobs that came from elsewhere."""

CONSTANTS = (
    *(type(None), type(Ellipsis), bool, int, float, complex, str, bytes),
    *(torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format),
)
"""The classes of plain data without parts."""

_DATA = (*CONSTANTS, range)


def fields_of(value: Any) -> tuple[str, ...]:
    """Returns the names of the fields of a dataclass or a named tuple; none of anything else.

    Args:
        value: an instance.
    """
    if isinstance(value, tuple):
        return tuple(getattr(cast(Any, value), "_fields", ()))
    if dataclasses.is_dataclass(value):
        return tuple(field.name for field in dataclasses.fields(value))
    return ()


def attribute(value: Any, name: str) -> Any:
    """Returns an entry of a mapping, a field of a named tuple or a plain attribute.

    This is the recorded form of `value.name`: it reaches data only, no method, no property and
    nothing that starts with an underscore.

    Raises:
        AttributeError: if there is no such data.
    """
    kind = cast(Any, type(value))
    if isinstance(value, torch.Tensor):
        names = TENSOR_PROPERTIES
    elif isinstance(value, Mapping):
        entries = cast("Mapping[str, Any]", value)
        if name in entries:
            return entries[name]
        names = frozenset[str]()
    elif isinstance(value, tuple):
        names = _tuple_fields(kind)
    else:
        names = {*cast("dict[str, Any]", getattr(value, "__dict__", {})), *fields_of(value)}
    if name not in names or name.startswith("_"):
        raise AttributeError(f"{kind.__name__} has no {name!r} that can be read")
    return getattr(cast(Any, value), name)


def _tuple_fields(kind: Any) -> frozenset[str]:
    """Names of the fields of a named tuple, also of those that torch.max and its like return."""
    if kind.__module__ == "torch.return_types":
        own = cast("Mapping[str, Any]", vars(kind))
        return frozenset(name for name in own if isinstance(own[name], MemberDescriptorType))
    return frozenset(getattr(kind, "_fields", ()))


TENSOR_PROPERTIES = frozenset(
    ["H", "T", "device", "dtype", "imag", "mH", "mT", "ndim", "real", "shape"]
)


_SMALL = 2**20
"""How many bytes may be copied at each line: a tenth of a millisecond at most."""

_SAMPLES = 2**10


def is_small(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor of the user's may be copied at each line that uses it.

    Args:
        tensor: the tensor.
    """
    return tensor.layout is torch.strided and not tensor.is_quantized and tensor.nbytes <= _SMALL


def is_counted(tensor: torch.Tensor) -> bool:
    """Returns whether PyTorch counts all writes into a tensor. NumPy's memory may be under it.

    Args:
        tensor: the tensor.
    """
    try:
        return tensor.untyped_storage().resizable()
    except NotImplementedError:  # within `torch.vmap`
        return False


def sample_of(tensor: torch.Tensor) -> bytes | None:
    """Returns some of a tensor's numbers, None where there are none to look at.

    They are from all over it: a loop that fills a tensor anew changes them. All of them would take
    longer than a forward.

    Args:
        tensor: the tensor.
    """
    try:
        numbers = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // _SAMPLES)]
        return numbers.contiguous().view(torch.uint8).cpu().numpy().tobytes()
    except (NotImplementedError, RuntimeError, TypeError):
        # Within `torch.vmap`, of a sparse or quantised one, and of one of a class of its own.
        return None


def independent(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy, which is an ordinary tensor also in `torch.inference_mode()`.

    Args:
        tensor: the tensor.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return tensor.clone()
    return tensor.clone()
