"""What happens when an operation has proxies among its arguments.

While their block is open it is recorded there; after the run it is computed with their values, at
once. A proxy's methods and operators differ in nothing but the operation, so that they are made
of the registry here. What has a meaning of its own, such as `save` or `shape`, is in `proxy.py`.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from sys import _getframe
from typing import Any, NoReturn, cast

from torch import Tensor, nn

from insitu.graph import location
from insitu.graph.context import default_dtype, is_autocast_enabled, is_grad_enabled
from insitu.graph.encoding import KEYS, PLAIN, add_node, is_constant
from insitu.graph.errors import OperationError, nearest
from insitu.graph.in_place import mutate
from insitu.graph.location import here, mark
from insitu.graph.node import NO_KWARGS, ref
from insitu.graph.operations import BY_NAME, GETITEM, TENSOR_METHODS, Operation, unbounded
from insitu.graph.recorded import AnyRecorded, Recorded, inside_function
from insitu.graph.recording import Recording, branches
from insitu.graph.structure import map_structure
from insitu.graph.structure_hints import part_of

ENDED = Recording()
"""Stands for the recording of a value that needs its own no more."""
ENDED.open = False


def record(
    kind: type[Recorded], operation: Operation, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Records an operation in the open recording of its arguments, or computes it at once.

    Args:
        kind: the class of proxies.
        operation: the operation.
        args: its arguments.
        kwargs: its keyword arguments.
    """
    first = args[0] if args else None
    if (
        isinstance(first, AnyRecorded)
        and first._recording.open
        and first._recording.session is None
    ):
        recording = first._recording
    else:
        where = latest_of if operation.in_place and not branches() else recording_of
        recording = where((args, dict(kwargs)))
        if recording is None:
            if isinstance(first, AnyRecorded) and operation.name.startswith("Tensor."):
                value = first.result(here(3))
                if not isinstance(value, Tensor):  # of an array or a string: what it has itself
                    return at_once(getattr(value, operation.short), args[1:], kwargs)
            return at_once(unbounded(operation), args, kwargs)
    if operation.in_place:
        return kind(recording, mutate(recording, operation, args, kwargs, mark(3)))
    return kind(recording, add_node(recording, operation, args, kwargs, mark(3)))


def recording_of(values: Any) -> Recording | None:
    """Returns where an operation on values is recorded, None if no block of theirs is open.

    That is the function of a `cond` or `fold`, if one is being recorded; in a session, the block
    that the line stands in, or between blocks the latest one that a value is of.

    Args:
        values: any structure.
    """
    if branches():
        return branches()[-1]
    latest = latest_of(values)
    return None if latest is None else latest.where_lines_stand


def latest_of(values: Any) -> Recording | None:
    """Returns the latest of the open recordings of values, None if no block of theirs is open.

    Args:
        values: any structure.
    """
    return max(open_recordings(values), key=lambda recording: recording.order, default=None)


def open_recordings(values: Any) -> list[Recording]:
    """Returns the recordings of values whose blocks have not ended.

    Args:
        values: any structure.
    """
    found: list[Recording] = []

    def leaf(item: Any) -> None:
        if isinstance(item, AnyRecorded) and item._recording.open:
            found.append(item._recording)

    map_structure(leaf, values)
    return found


def at_once(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Computes with the values of saved proxies, after their run."""
    location = here(3)

    def leaf(item: Any) -> Any:
        return item.result(location) if isinstance(item, AnyRecorded) else item

    values, named = map_structure(leaf, (args, dict(kwargs)))
    try:
        return function(*values, **named)
    except (TypeError, AttributeError) as error:
        for arg, value in zip(args, values, strict=False):
            if not isinstance(arg, AnyRecorded) or not isinstance(value, tuple | list | Mapping):
                continue
            # What is no tensor forgets how it was written.
            what = part_of("value" if arg._recording is ENDED else arg.written(), value)
            if what:
                raise OperationError(f"{error}. {what}", location) from error
        raise


def refuse(func: Callable[..., Any]) -> NoReturn:
    """Raises for a function of torch that cannot be recorded."""
    name = getattr(func, "__name__", str(func))
    namespace = getattr(func, "__module__", None) or "torch.Tensor"
    known = {operation.short for operation in BY_NAME.values()}
    if func is Tensor.__setitem__:
        raise OperationError(
            "A value of a run cannot be put into a tensor that is there before it: write "
            "`values.append(x.save())` into a list, and `torch.stack([v.value for v in values])` "
            "after the block.",
            here(3),
        )
    if name == "_is_all_true":
        raise OperationError(
            "A distribution of `torch.distributions` checks the values that it is given, which are "
            "not there while the block is open: give it `validate_args=False`.",
            here(3),
        )
    raise OperationError(
        f"{namespace}.{name} is not an operation that can be recorded{nearest(name, known)}. Save "
        f"what it needs and call it on the saved values after the block.{within_module()}",
        here(3),
    )


def within_module() -> str:
    """Returns what else can be written where the running line stands in a module's forward."""
    frame = _getframe(2)
    found: nn.Module | None = None
    while frame is not None:
        if frame.f_code is _CALL:
            found = frame.f_locals["self"]
        frame = frame.f_back
    if found is None:
        return ""
    return (
        f" Or call the {type(found).__name__} in whose forward this stands as a whole, with "
        "`insitu.apply(module, value)`: gradients flow through it."
    )


_CALL = cast(Any, nn.Module)._call_impl.__code__


def _method(kind: type[Recorded], operation: Operation) -> Callable[..., Any]:
    in_place = operation.in_place

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        recording = self._recording
        if recording.open and recording.session is None and not in_place:  # as in `record`
            return kind(recording, add_node(recording, operation, (self, *args), kwargs, mark()))
        return record(kind, operation, (self, *args), kwargs)

    method.__name__ = operation.short
    method.__doc__ = f"Records `torch.{operation.name}`."
    return method


def _unary(kind: type[Recorded], operation: Operation) -> Callable[[Any], Any]:
    return lambda self: record(kind, operation, (self,), NO_KWARGS)


def _binary(kind: type[Recorded], operation: Operation) -> Callable[[Any, Any], Any]:
    takes_tuples, never_cast = operation is GETITEM, not operation.casts

    def method(self: Any, other: Any) -> Any:
        recording = self._recording
        # The most frequent of all: without a call of what does it for any arguments.
        if recording.open and recording.direct:
            if (
                is_grad_enabled() is recording.grads
                and default_dtype() is recording.dtype
                and (never_cast or not (recording.casts or is_autocast_enabled()))
            ):
                source, given = self._ref, type(other)  # pyright: ignore[reportUnknownVariableType]
                inputs = None
                if given in PLAIN or (given in KEYS and is_constant(other)):
                    if self._operand or takes_tuples:
                        inputs = source.inputs
                elif given is kind and other._recording is recording and self._operand:
                    other = other._ref
                    inputs = source.index, other.index
                elif given is Tensor and self._operand:
                    inputs = source.inputs
                if inputs is not None:
                    rows = recording.graph.rows
                    index = len(rows)
                    frame = _getframe(1)
                    code = frame.f_code
                    line = (code, frame.f_lasti) if code is location.users_code else mark()
                    if given is Tensor:
                        other = recording.hold(other, line)
                    rows.append((operation, (source, other), NO_KWARGS, inputs, False, line))
                    return kind(recording, ref(index))
            return kind(recording, add_node(recording, operation, (self, other), NO_KWARGS, mark()))
        return record(kind, operation, (self, other), NO_KWARGS)

    return method


def _reflected(kind: type[Recorded], operation: Operation) -> Callable[[Any, Any], Any]:
    return lambda self, other: record(kind, operation, (other, self), NO_KWARGS)


def _augmented(kind: type[Recorded], operation: Operation) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if not self._recording.open:
            if self._recording.suspended:
                raise inside_function(here())
            return NotImplemented
        return record(kind, operation, (self, other), NO_KWARGS)

    return method


AUGMENTED = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"),
    *("and", "or", "xor", "lshift", "rshift"),
)
"""Operators that can also write into what stands on their left: all of two sides but `@`."""

OF_NUMPY = {
    **{"subtract": "sub", "multiply": "mul", "divide": "truediv", "floor_divide": "floordiv"},
    **{"remainder": "mod", "power": "pow", "less": "lt", "less_equal": "le", "greater": "gt"},
    **{"greater_equal": "ge", "equal": "eq", "not_equal": "ne", "bitwise_and": "and_"},
    **{"bitwise_or": "or_", "bitwise_xor": "xor", "left_shift": "lshift", "negative": "neg"},
    **{"right_shift": "rshift", "absolute": "abs"},
}
"""NumPy's names for operators, where they are not those of Python's `operator`."""


def add_operators(target: type[AnyRecorded], kind: type[Recorded]) -> None:
    """Gives a class the methods of the registry, but for those that it has.

    Args:
        target: the class.
        kind: the class of proxies that they return.
    """
    for operation in TENSOR_METHODS:
        if not hasattr(target, operation.short):
            setattr(target, operation.short, _method(kind, operation))
    for name in (*AUGMENTED, "matmul"):
        operation = BY_NAME[f"operator.{name}_" if name in ("and", "or") else f"operator.{name}"]
        setattr(target, f"__{name}__", _binary(kind, operation))
        setattr(target, f"__r{name}__", _reflected(kind, operation))
    for name in AUGMENTED:
        setattr(target, f"__i{name}__", _augmented(kind, BY_NAME[f"operator.i{name}"]))
    for name in ("lt", "le", "gt", "ge", "eq", "ne", "getitem"):
        setattr(target, f"__{name}__", _binary(kind, BY_NAME[f"operator.{name}"]))
    for name in ("neg", "pos", "invert", "abs"):
        setattr(target, f"__{name}__", _unary(kind, BY_NAME[f"operator.{name}"]))
