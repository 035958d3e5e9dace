"""Proxies: what stands for a value that does not exist yet, and records what is done to it.

A proxy takes operators, indexing, tensor methods, attributes and `torch` functions. While its
block is open each of them adds a node and returns another proxy. After the run a saved proxy
does the same things to its value, at once. How that is done is in `dispatch.py`.
"""

# pyright: reportPrivateUsage=false, reportUnnecessaryComparison=false

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch

from insitu.graph.dispatch import (
    add_operators,
    at_once,
    open_recordings,
    record,
    refuse,
    within_module,
)
from insitu.graph.errors import (
    NoValueError,
    OperationError,
    OptionError,
    UnknownShapeError,
    nearest,
)
from insitu.graph.intervention import write_part
from insitu.graph.location import Location, here, mark
from insitu.graph.node import NO_KWARGS
from insitu.graph.operations import (
    ATTRIBUTE,
    BY_FUNCTION,
    COPY,
    KEEP,
    SAVE,
    SETITEM,
    TENSOR_METHODS,
    Operation,
)
from insitu.graph.recorded import Cell, Recorded
from insitu.graph.shapes import dtype_of, fake_value, length_of, outlined, shape_of

_operation_of = dict(BY_FUNCTION).get  # of a plain dictionary it takes half the time


class Proxy(Recorded):
    """Stands for a value of a run to come.

    Proxies come from sites (`model.transformer.h[3].output`) and from operations on other
    proxies; nobody makes them by hand.
    """

    __slots__ = ()
    __array_ufunc__ = None  # makes a NumPy number on the left of an operator hand over to us

    def save(
        self,
        optional: bool = False,
        keep_graph: bool = False,
        to: str | torch.device | None = None,
    ) -> Proxy:
        """Keeps a copy of the value, as it is at this line, for after the run.

        Args:
            optional: whether the value may be missing, because its module was not called or its
                step never came. `.value` is None then.
            keep_graph: whether the value keeps its history for autograd, so that a loss can be
                made of it after the block. The run records autograd then.
            to: the device of the copy, such as "cpu"; None for the one that the value is on. The
                model goes on while what is on a GPU is copied to the CPU.

        Returns:
            A proxy for the same value, whose `.value` is the copy once the model has run.

        Raises:
            NoValueError: if the block has ended.
            OptionError: if there is no such device.
        """
        recording, source = self._recording, self._ref
        if not recording.open:
            raise NoValueError(
                f"`{self.written()}` cannot be saved any more: its block has ended.", here()
            )
        rows = recording.graph.rows
        cell = self._cell = recording.saves[len(rows)] = Cell()
        if optional:
            recording.graph.optional |= {len(rows)}
        if keep_graph:
            recording.graph.differentiates = True
        kind = KEEP if keep_graph else SAVE
        args = (source,) if to is None else (source, _device(to))
        rows.append((kind, args, NO_KWARGS, source.inputs, False, mark()))
        return type(self)(recording, source, cell)

    @property
    def value(self) -> Any:
        """The value that was saved.

        Raises:
            NoValueError: before the run, after a failed run, or if it was not saved.
        """
        return self.result(here())

    @property
    def grad(self) -> Any:
        """The gradient of the first `backward` that is written at or after this line.

        After the last one, it is that one's. It can be written, as sites can: `x.grad = y` and
        writes in place change what flows on to what `x` was made of.

        Raises:
            OperationError: when the block ends, if there is no `backward`.
        """
        recording = self._recording
        if not recording.open:
            return self.result(here()).grad
        if not self._operand:
            self._refuse_grad(here())
        return Proxy(recording, recording.gradient(self._ref, mark()))

    @grad.setter
    def grad(self, value: Any) -> None:
        recording = self._recording
        if not recording.open:
            self.result(here()).grad = value
            return
        if not self._operand:
            self._refuse_grad(here())
        recording.write_gradient(self._ref, value, mark())

    def backward(
        self,
        gradient: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """Records a backward pass from this value; it runs when the model has run.

        Gradients go to whatever `.grad` is read or written of in the block, and to the user's
        own tensors and parameters that require them. The model's parameters get none.

        Args:
            gradient: as of `torch.Tensor.backward`: what to start with, where this is no scalar.
            retain_graph: whether there will be another backward pass through the same values.
            create_graph: whether gradients can themselves be differentiated.
            inputs: the tensors that accumulate a gradient, instead of the user's own.
        """
        recording = self._recording
        if not recording.open:
            self.result(here()).backward(gradient, retain_graph, create_graph, inputs)
            return
        options = {
            "gradient": gradient,
            "retain_graph": retain_graph,
            "create_graph": create_graph or None,
            "inputs": inputs,
        }
        given = {key: value for key, value in options.items() if value is not None}
        recording.backward(self, given, mark())

    def _refuse_grad(self, location: Location) -> NoReturn:
        written = self.written()
        raise OperationError(
            f"`{written}` is a tuple and has no gradient: write `{written}[0].grad`.", location
        )

    # What answers while recording

    @property
    def shape(self) -> Any:
        """The `torch.Size` of the tensor, or a tuple or dictionary of sizes for nested values.

        While the block is open, the answer comes from one run of the model on fake tensors, done
        when first asked for.

        Raises:
            ShapeError: if the recorded operations do not fit together, or the shape depends on
                the values.
        """
        return shape_of(self._known())

    @property
    def dtype(self) -> Any:
        """The `torch.dtype` of the tensor, or dtypes nested as `shape` is."""
        return dtype_of(self._outlined())

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self._outlined().ndim

    def dim(self) -> int:
        """The number of axes."""
        return self._outlined().dim()

    def _outlined(self) -> Any:
        """As `_known`, but sizes may be those of the first step of a generation."""
        if self._recording.open:
            return outlined(self._recording, self._ref.index)
        return self.result(here(3))

    is_nested = is_quantized = is_sparse = False
    """What modules of `torch.nn` ask: values of a run are plain tensors."""

    def size(self, dim: int | None = None) -> Any:
        """The shape, or the length of one axis."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """The number of elements."""
        return self._known().numel()

    def __len__(self) -> int:
        return length_of(self._known(), self._recording, self._ref)

    def __iter__(self) -> Iterator[Any]:
        known = self._outlined()
        if isinstance(known, torch.Tensor):  # how long it is may differ from step to step
            known = self._known()
        if not self._recording.open or isinstance(known, Mapping):
            return iter(cast("Iterable[Any]", known))
        return iter([self[i] for i in range(length_of(known, self._recording, self._ref))])

    def _known(self) -> Any:
        """The value after the run, or before it a fake one of the same shape."""
        if self._recording.open:
            return fake_value(self._recording, self._ref.index)
        return self.result(here(3))

    # What is recorded

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # a question of Python's or of a notebook's, not of the user's
            raise AttributeError(name)
        if not self._recording.open:
            return getattr(self.result(here()), name)
        return record(Proxy, ATTRIBUTE, (self, name), NO_KWARGS)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses a method that is not in the registry; after the run, calls the value's own."""
        if not self._recording.open:
            return self.result(here())(*args, **kwargs)
        node = self._recording.graph[self._ref.index]
        name = str(node.args[1]) if node.operation is ATTRIBUTE else self.written()
        methods = [operation.short for operation in TENSOR_METHODS]
        raise OperationError(
            f"`.{name}()` is not an operation that can be recorded{nearest(name, methods)}. Save "
            "what it needs and call it on the saved value after the block.",
            here(),
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Records a `torch` function that was called with a proxy among its arguments."""
        operation = _operation_of(func)
        if operation is None:
            if not open_recordings((args, dict(kwargs or NO_KWARGS))):
                return at_once(func, args, kwargs or NO_KWARGS)
            from insitu.graph.whole_calls import call_operator, is_custom_operator

            if is_custom_operator(func):
                return call_operator(func, args, kwargs or NO_KWARGS)
            refuse(func)
        first = args[0] if args else None
        if kwargs and kwargs.get("inplace") is True and isinstance(first, Proxy):
            return first._written_with(operation, args, kwargs)
        if isinstance(first, Proxy) and not operation.in_place:  # as in `record`, but for a call
            recording = first._recording
            if recording.open and recording.session is None:
                line = mark()
                return Proxy(recording, recording.apply(operation, args, kwargs or NO_KWARGS, line))
        return record(Proxy, operation, args, kwargs or NO_KWARGS)

    def _written_with(
        self, operation: Operation, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Records a function with `inplace=True`: its result is written into this value."""
        kwargs = {**kwargs, "inplace": False}
        if not self._recording.open or kwargs.get("training") is False:  # then dropout does nothing
            return record(Proxy, operation, args, kwargs)
        # Of a copy: autograd may need what the function was given.
        made = record(Proxy, operation, (self.clone(), *args[1:]), kwargs)
        return record(Proxy, COPY, (self, made), NO_KWARGS)

    # What cannot be known while recording

    def __bool__(self) -> bool:
        use = "`if`, `and`, `or`, `not` and `while`"
        return bool(self._python_value(use, "insitu.cond or torch.where"))

    def __float__(self) -> float:
        return float(self._python_value("float()", ".item(), which is recorded"))

    def __int__(self) -> int:
        return int(self._python_value("int()", ".item(), which is recorded"))

    def __index__(self) -> int:
        return operator.index(self._python_value("a Python index", "it as a tensor index"))

    def __complex__(self) -> complex:
        return complex(self._python_value("complex()", ".item(), which is recorded"))

    def __contains__(self, item: object) -> bool:
        return item in self._python_value("`in`", "(value == item).any()")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        value = self._python_value("a NumPy array", "torch's own functions")
        return value.__array__() if dtype is None else value.__array__(dtype)

    def _python_value(self, use: str, instead: str) -> Any:
        if not self._recording.open:
            return self.result(here(3))
        raise OperationError(
            f"`{self.written()}` has no value while the block is open, so {use} cannot be decided "
            f"by it: use {instead}, or save it and decide after the block.{within_module()}",
            here(3),
        )

    def __setitem__(self, key: Any, value: Any) -> None:
        if not self._recording.open:
            self.result(here())[key] = value
            return
        recording, line = self._recording, mark()
        if recording.holds(self._ref, value, key):
            return
        if isinstance(key, str) or (isinstance(key, int) and not self._is_tensor(key)):
            block = type(self) is StructureProxy
            written = write_part(recording, self._ref, key, value, block, line)
            if written is not None:
                self._ref = written
                return
        recording.mutate(SETITEM, (self, key, value), NO_KWARGS, line)

    def __delitem__(self, key: Any) -> None:
        if not self._recording.open:
            del self.result(here())[key]
            return
        raise OperationError("`del value[...]` is not recorded: use indexing.", here())

    def _is_tensor(self, key: int) -> bool:
        """Whether this is a tensor and no tuple or dictionary: for a site, from its shape.

        Raises:
            UnknownShapeError: if that is not known. The message is about a write with a key.
        """
        if not self._operand:
            return False
        recording = self._recording
        node = recording.graph[recording.original(self._ref.index)]
        if node.site is None or recording.shapes is None:
            return True
        first = node.site._replace(step=0)  # in later steps its size may differ, but no more
        try:
            return isinstance(recording.shapes.arriving(first), torch.Tensor)
        except UnknownShapeError as error:
            name = self.written()
            raise UnknownShapeError(
                f"It is not known whether `{name}` is a tensor or a tuple: assign all of a tuple, "
                f"`{name} = (new, *others)`; a part of a tensor is `{name}[{key}, ...] = new`. "
                f"{error}",
                here(3),
            ) from None

    # What is shown

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        cell = self._cell
        if cell is not None and cell.filled:
            return repr(cell.content)
        fake = self._recording.fakes.get(self._ref.index)
        return self.written() + ("" if fake is None else f": {shape_of(fake)}")

    def __format__(self, spec: str) -> str:
        cell = self._cell
        return format(cell.content if cell is not None and cell.filled else str(self), spec)

    def __dir__(self) -> list[str]:
        return sorted(set(super().__dir__()) | {operation.short for operation in TENSOR_METHODS})

    if TYPE_CHECKING:

        def __add__(self, other: Any) -> Proxy: ...
        def __radd__(self, other: Any) -> Proxy: ...
        def __sub__(self, other: Any) -> Proxy: ...
        def __rsub__(self, other: Any) -> Proxy: ...
        def __mul__(self, other: Any) -> Proxy: ...
        def __rmul__(self, other: Any) -> Proxy: ...
        def __truediv__(self, other: Any) -> Proxy: ...
        def __rtruediv__(self, other: Any) -> Proxy: ...
        def __floordiv__(self, other: Any) -> Proxy: ...
        def __rfloordiv__(self, other: Any) -> Proxy: ...
        def __mod__(self, other: Any) -> Proxy: ...
        def __rmod__(self, other: Any) -> Proxy: ...
        def __pow__(self, other: Any) -> Proxy: ...
        def __rpow__(self, other: Any) -> Proxy: ...
        def __matmul__(self, other: Any) -> Proxy: ...
        def __rmatmul__(self, other: Any) -> Proxy: ...
        def __and__(self, other: Any) -> Proxy: ...
        def __rand__(self, other: Any) -> Proxy: ...
        def __or__(self, other: Any) -> Proxy: ...
        def __ror__(self, other: Any) -> Proxy: ...
        def __xor__(self, other: Any) -> Proxy: ...
        def __rxor__(self, other: Any) -> Proxy: ...
        def __lshift__(self, other: Any) -> Proxy: ...
        def __rshift__(self, other: Any) -> Proxy: ...
        def __lt__(self, other: Any) -> Proxy: ...
        def __le__(self, other: Any) -> Proxy: ...
        def __gt__(self, other: Any) -> Proxy: ...
        def __ge__(self, other: Any) -> Proxy: ...
        def __eq__(self, other: object) -> Any: ...
        def __ne__(self, other: object) -> Any: ...
        def __neg__(self) -> Proxy: ...
        def __pos__(self) -> Proxy: ...
        def __invert__(self) -> Proxy: ...
        def __abs__(self) -> Proxy: ...
        def __getitem__(self, key: Any) -> Proxy: ...


add_operators(Proxy)


class StructureProxy(Proxy):
    """Stands for a value that is known to be a tuple: index it before computing with it."""

    __slots__ = ()
    _operand = False


def _device(device: str | torch.device) -> str:
    """The name of a device, checked at the user's line."""
    try:
        return str(torch.device(device))
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"`to` is a device, such as 'cpu': {reason}", here(3)) from error
