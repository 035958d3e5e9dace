"""The arguments of nodes turned into what travels, and back.

Constants, containers, references and tensors travel; what does not is refused, saying why. How
they look in the message is in `wire_message.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, cast

import torch

from insitu.graph.errors import WireError
from insitu.graph.node import Earlier, Function, Ref, WeightRef, ref
from insitu.graph.structure import CONSTANTS
from insitu.graph.wire_message import (
    LARGEST_INTEGER,
    MOST_ENTRIES,
    BytesPart,
    ComplexPart,
    DevicePart,
    DictPart,
    EarlierPart,
    EllipsisPart,
    IntegerPart,
    LeftOutPart,
    ListPart,
    ModelOutputPart,
    NamedPart,
    RefPart,
    ResultPart,
    SizePart,
    SlicePart,
    TensorPart,
    TuplePart,
    Value,
    WeightPart,
)

DEEPEST = 32
"""How many containers may stand in each other."""

_NAMED: Mapping[str, Any] = {
    str(value): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format)
}
_NOT_FINITE = ("nan", "inf", "-inf")
_RESULTS: Mapping[str, Any] = {
    name: kind
    for name, kind in vars(torch.return_types).items()
    if isinstance(kind, type) and issubclass(kind, tuple)
}
_LEAVES: Mapping[Any, Callable[[Any], Value]] = {
    type(None): lambda value: value,
    bool: lambda value: value,
    str: lambda value: text(value),
    bytes: BytesPart,
    type(...): lambda value: EllipsisPart(),
    Ref: lambda value: RefPart(value.index),
    Earlier: lambda value: EarlierPart(value.block, value.node),
    WeightRef: lambda value: WeightPart(text(value.path)),
    torch.Size: lambda value: SizePart(list(value)),
    torch.device: lambda value: DevicePart(str(value)),
    torch.dtype: lambda value: NamedPart(str(value)),
    torch.layout: lambda value: NamedPart(str(value)),
    torch.memory_format: lambda value: NamedPart(str(value)),
}
_KEYS = frozenset(CONSTANTS) - {torch.Size}


class ValueWriter:
    """Turns arguments into parts, and collects the tensors among them.

    Args:
        finite: whether the message can hold finite numbers only, as JSON does.
        identity: gives a key that is equal for tensors if one of them is enough.
        trains: whether tensors that require grad may be among them, as leaves that are trained.

    Attributes:
        tensors: each tensor that was met, once.
    """

    def __init__(
        self,
        finite: bool = False,
        identity: Callable[[torch.Tensor], Hashable] = id,
        trains: bool = False,
    ) -> None:
        self._finite, self._trains = finite, trains
        self._identity = identity
        self.tensors: list[torch.Tensor] = []
        self._numbers: dict[int, int] = {}
        self._met: dict[Hashable, int] = {}
        self._held: list[torch.Tensor] = []  # so that no other gets the number of its `id`

    def part(self, value: Any, depth: int = 0) -> Value:
        """Returns how an argument looks in the message.

        Args:
            value: the argument.
            depth: how many containers it stands in.

        Raises:
            WireError: if it cannot travel, saying why and what to write instead.
        """
        kind = cast(Any, type(value))
        if kind is float:
            return self._float(value)
        if kind is complex:
            return ComplexPart(self._float(value.real), self._float(value.imag))
        if kind in _LEAVES:
            return _LEAVES[kind](value)
        if isinstance(value, torch.Tensor):
            return TensorPart(self._number(value))
        if isinstance(value, int):  # also of an enumeration
            return _integer(int(value))
        if isinstance(value, float):
            return self._float(float(value))
        if depth == DEEPEST:
            raise WireError(f"its arguments are nested more than {DEEPEST} deep")
        return self._container(value, kind, depth + 1)

    def _float(self, value: float) -> float | NamedPart:
        return NamedPart(repr(value)) if self._finite and not math.isfinite(value) else value

    def _container(self, value: Any, kind: Any, depth: int) -> Value:
        if kind is slice:
            bounds = (value.start, value.stop, value.step)
            return SlicePart(*[self.part(bound, depth) for bound in bounds])
        if kind is dict:
            if not all(map(_is_key, value)):
                raise WireError("the keys of a dictionary have to be numbers, strings and the like")
            keys = [self.part(key, depth) for key in value]
            if len(keys) > MOST_ENTRIES:
                raise WireError(f"a dictionary has more than {MOST_ENTRIES} entries")
            return DictPart(keys, [self.part(item, depth) for item in value.values()])
        if kind is tuple or kind is list or _RESULTS.get(kind.__name__) is kind:
            items = [self.part(item, depth) for item in value]
            if kind is tuple:
                return TuplePart(items)
            return ListPart(items) if kind is list else ResultPart(kind.__name__, items)
        raise WireError(_refused(value, kind))

    def _number(self, tensor: torch.Tensor) -> int:
        """The number under which a tensor travels."""
        if id(tensor) not in self._numbers:
            if why := _live(tensor, self._trains):
                raise WireError(why)
            number = self._met.setdefault(self._identity(tensor), len(self.tensors))
            if number == len(self.tensors):
                self.tensors.append(tensor)
            self._numbers[id(tensor)] = number
            self._held.append(tensor)
        return self._numbers[id(tensor)]


class ValueReader:
    """Turns parts back into arguments.

    Attributes:
        references: the nodes that were referred to since this was last emptied, in order.
        weights: how many weights of the model were named since then.
        used: the numbers of the tensors that were referred to.
        earlier: how many values of earlier blocks were referred to since it was last set to 0.
        saved: the nodes of each earlier block of a job whose values it keeps for later ones.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        self.references: list[int] = []
        self.weights = 0
        self.used: set[int] = set()
        self.earlier = 0
        self.saved: list[frozenset[int]] = []

    def value(self, part: Value, before: int, depth: int = 0) -> Any:
        """Returns the argument that a part stands for.

        Args:
            part: how it looks in the message.
            before: the index of the node that it is an argument of: it may refer to earlier ones.
            depth: how many containers it stands in.

        Raises:
            WireError: if there is no such argument.
        """
        if part is None or isinstance(part, bool | int | float | str):
            return part

        def values(parts: Sequence[Value]) -> list[Any]:
            if depth == DEEPEST:
                raise WireError(f"arguments are nested more than {DEEPEST} deep")
            return [self.value(item, before, depth + 1) for item in parts]

        match part:
            case RefPart(index=index):
                if index >= before:
                    raise WireError(f"node {before} refers to node {index}, which is not before it")
                self.references.append(index)
                return ref(index)
            case EarlierPart(block=block, node=node):
                if block >= len(self.saved) or node not in self.saved[block]:
                    raise WireError(f"there is no value {node} of a block {block} before it")
                self.earlier += 1
                return Earlier(block, node)
            case TensorPart(index=index):
                if index >= len(self._tensors):
                    raise WireError(f"there is no tensor {index}")
                self.used.add(index)
                return self._tensors[index]
            case WeightPart(path=path):
                self.weights += 1
                return WeightRef(path)
            case TuplePart(items=items):
                return tuple(values(items))
            case ListPart(items=items):
                return values(items)
            case DictPart(keys=keys, items=items):
                return _dictionary(values(keys), values(items))
            case SlicePart(start=start, stop=stop, step=step):
                return slice(*values([start, stop, step]))
            case ResultPart(name=name, items=items):
                return _result(name, values(items))
            case ModelOutputPart() | LeftOutPart():
                return self.of_results(part, values)
            case _:
                return _leaf(part)

    def of_results(
        self, part: ModelOutputPart | LeftOutPart, values: Callable[[Sequence[Value]], list[Any]]
    ) -> Any:
        """Returns what results alone hold, and no argument is. `values` reads its entries.

        Raises:
            WireError: unless this reads results.
        """
        raise WireError("what a model has returned is given as a plain dictionary")


def text(value: str) -> str:
    """Returns a string, which is checked for what UTF-8 cannot say.

    Raises:
        WireError: if there is a lone surrogate in it.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        raise WireError("a string in it is no valid Unicode") from None
    return value


def _integer(value: int) -> Value:
    if -(2**63) <= value < 2**64:
        return value
    if value.bit_length() // 8 + 1 > LARGEST_INTEGER:
        raise WireError(f"an integer in it has {value.bit_length()} bits")
    return IntegerPart(value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))


def _is_key(key: Any) -> bool:
    kind = cast(Any, type(key))
    return kind in _KEYS or (kind is tuple and all(map(_is_key, key)))


def _refused(value: Any, kind: Any) -> str:
    """Why a value of no known kind cannot travel."""
    if kind is Function:
        value = value.function
        kind = cast(Any, type(value))
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    if callable(value):
        return (
            f"a Python function ({getattr(value, '__qualname__', name)}) stays in the process that "
            "it was written in: record its operations instead"
        )
    if isinstance(value, torch.Generator):
        return (
            "a torch.Generator stays in the process that it is seeded in: leave it out, and the "
            "numbers are drawn from the generator of the process that runs"
        )
    if isinstance(value, tuple):
        return f"{name} is a class that the other process may not have: give it as a plain tuple"
    if isinstance(value, Mapping):
        return f"{name} is a class that the other process may not have: give it as a plain dict"
    return f"a value of type {name} is not plain data"


def _live(tensor: torch.Tensor, trains: bool) -> str:
    """Why a tensor cannot travel, or ""."""
    # Nothing trains a frozen parameter, such as one of an encoder: its values are all of it.
    if type(tensor) in (torch.Tensor, torch.nn.Parameter) and (trains or not tensor.requires_grad):
        tensor = tensor.detach()
    if isinstance(tensor, torch.nn.Parameter):
        return (
            "only a copy of an nn.Parameter could travel, which would not follow it when it is "
            "trained: give `.detach()` of it, if its present values are meant"
        )
    if type(tensor) is not torch.Tensor:
        return (
            f"a {type(tensor).__name__} is more than the numbers in it, and only they could "
            "travel: give a plain torch.Tensor"
        )
    if tensor.requires_grad:
        return (
            "no gradient comes back to a tensor from another process, and this one requires grad: "
            "give `.detach()` of it"
        )
    if tensor.is_quantized:
        return "a quantized tensor cannot travel: give `.dequantize()` of it"
    if not is_whole(tensor.dtype):
        return f"a tensor of {tensor.dtype} cannot be copied: give its bytes as torch.uint8"
    if tensor.layout is not torch.strided:
        return "a sparse tensor cannot travel: give `.to_dense()` of it"
    return "a tensor on the meta device has no values" if tensor.is_meta else ""


def _leaf(part: Value) -> Any:
    """What a part stands for that holds no other."""
    match part:
        case IntegerPart(data=data):
            return int.from_bytes(data, "little", signed=True)
        case ComplexPart(real=real, imag=imag):
            parts = [one if isinstance(one, float) else _leaf(one) for one in (real, imag)]
            if not all(isinstance(one, float) for one in parts):
                raise WireError("a complex number has parts that are no floats")
            return complex(*parts)
        case BytesPart(data=data):
            return data
        case SizePart(sizes=sizes):
            return torch.Size(sizes)
        case DevicePart(name=name):
            return device(name)
        case NamedPart(name=name):
            if name in _NOT_FINITE:
                return float(name)
            if name not in _NAMED:
                raise WireError(f"{name!r} is not in this version of PyTorch")
            return _NAMED[name]
        case _:
            return ...


def device(name: str) -> torch.device:
    """Returns a device by its name.

    Raises:
        WireError: if there is none of that name.
    """
    try:
        return torch.device(name)
    except RuntimeError:
        raise WireError(f"{name!r} is no device") from None


def dtype(name: str) -> torch.dtype:
    """Returns a dtype by its name.

    Raises:
        WireError: if there is none of that name.
    """
    found = _NAMED.get(name)
    if not isinstance(found, torch.dtype):
        raise WireError(f"{name!r} is no dtype in this version of PyTorch")
    return found


def is_whole(kind: torch.dtype) -> bool:
    """Returns whether values of a dtype are numbers that take whole bytes."""
    return kind.is_floating_point or kind.is_complex or kind in _INTEGERS


_INTEGERS = (
    *(torch.bool, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)


def _dictionary(keys: list[Any], items: list[Any]) -> dict[Any, Any]:
    if len(keys) != len(items) or not all(map(_is_key, keys)):
        raise WireError("a dictionary does not have a proper key for each of its entries")
    made = dict(zip(keys, items, strict=True))
    if len(made) != len(keys):
        raise WireError("a dictionary has two entries under one key")
    return made


def _result(name: str, items: list[Any]) -> Any:
    if name not in _RESULTS:
        raise WireError(f"torch.return_types.{name} is not in this version of PyTorch")
    try:
        return _RESULTS[name](items)
    except TypeError as error:
        raise WireError(f"torch.return_types.{name}: {error}") from None
