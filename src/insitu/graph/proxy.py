"""Proxies: they stand for values that do not exist yet, and record the operations on them.

A proxy takes operators, indexing, tensor methods, attributes and `torch` functions. While its
block is open each of them adds a node and returns another proxy. After the run a saved proxy
does the same things to its value, at once. How that is done is in `dispatch.py`. What
`.save()` returns is in `saved_proxy.py`.
"""

# To type checkers a proxy is a tensor (`tensor_methods.py`); when it runs, only a saved one is.
# pyright: reportPrivateUsage=false, reportUnnecessaryComparison=false
# pyright: reportUnnecessaryIsInstance=false, reportIncompatibleVariableOverride=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from sys import _getframe
from typing import Any, NoReturn, cast

import torch

from insitu.graph import location
from insitu.graph.answers import Answers
from insitu.graph.cells import Cell
from insitu.graph.differentiation import (
    BackwardPass,
    backward_pass,
    read_gradient,
    recorded_grad,
    write_gradient,
)
from insitu.graph.dispatch import (
    OF_NUMPY,
    add_operators,
    at_once,
    open_recordings,
    record,
    refuse,
    within_module,
)
from insitu.graph.encoding import add_node
from insitu.graph.errors import NoValueError, OperationError, UnknownShapeError, nearest
from insitu.graph.in_place import mutate
from insitu.graph.intervention import write_part
from insitu.graph.location import Location, here, mark
from insitu.graph.node import NO_KWARGS, table_of
from insitu.graph.operations import (
    ATTRIBUTE,
    BY_FUNCTION,
    BY_NAME,
    COPY,
    GETITEM,
    KEEP,
    READ,
    SAVE,
    SETITEM,
    TENSOR_METHODS,
    Operation,
)
from insitu.graph.operators import Operators
from insitu.graph.recorded import Recorded, inside_function
from insitu.graph.save_names import add_name
from insitu.graph.saved import SavedTensor, blank, device_name, set_class, spent
from insitu.graph.standing import holds
from insitu.graph.structured import is_structure
from insitu.graph.whole_calls import call_operator, is_custom_operator
from insitu.habits import OF_VALUES, habit

_operation_of = dict(BY_FUNCTION).get  # of a plain dictionary it takes half the time


class AnyProxy(Operators, Answers):
    """Stands for a value of a run to come: `insitu.Proxy`.

    Proxies come from sites (`model.transformer.h[3].output`) and from operations on other
    proxies; nobody makes them by hand.
    """

    __slots__ = ()

    def save(
        self,
        name: str | None = None,
        optional: bool = False,
        keep_graph: bool = False,
        to: str | torch.device | None = None,
    ) -> SavedTensor:
        """Keeps a copy of the value, as it is at this line, for after the run.

        Args:
            name: the name of the value in the `Results` of a job. Without one it has the number of
                its place among all that the job saves: "0" is the first.
            optional: whether the value may be missing, because its module was not called or its
                step never came. `.value` is None then.
            keep_graph: whether the value keeps its history for autograd, so that a loss can be
                made of it after the block. The run records autograd then.
            to: the device of the copy, such as "cpu"; None for the one that the value is on. The
                model goes on while values on a GPU are copied to the CPU.

        Returns:
            A proxy for the same value. Once the model has run, it is that copy: a tensor, with
            the plain `torch.Tensor` as its `.value`. Where the value is no tensor, `.value` is
            what it is.

        Raises:
            NoValueError: if the block has ended.
            OptionError: if there is no such device, or another value of the block has the name.
        """
        recording, source = self._recording, self._ref
        if not recording.open:
            if recording.suspended:
                raise inside_function(here())
            raise NoValueError(
                f"`{self.written()}` cannot be saved any more: its block has ended.", here()
            )
        rows = recording.graph.rows
        if recording.views is not None:
            source = recording.views.resolved(source)
        index = len(rows)
        if optional:
            table_of(recording.graph, "optional", set).add(index)
        if keep_graph:
            recording.graph.differentiates = True
        if name is not None:
            add_name(recording, index, name)
        kind = KEEP if keep_graph else SAVE
        args = (source,) if to is None else (source, device_name(to))
        frame = _getframe(1)
        code = frame.f_code
        line = (code, frame.f_lasti) if code is location.users_code else mark()
        rows.append((kind, args, NO_KWARGS, source.inputs, False, line))
        # Parts, and what passes most sites, may be tensors: that is seen without a call.
        made = rows[source.index]
        plain = made[0] is GETITEM or (made[0] is READ and made[1][2] != "inputs")
        saved: Any
        if recording.repeating:
            saved = SAVED[list]()
        elif not self._operand or (
            (recording.fakes or not plain) and is_structure(recording, source.index)
        ):
            cell = self._cell = recording.saves[index] = Cell()
            kind = Proxy if isinstance(self, torch.Tensor) else type(self)
            return SAVED.get(kind, kind)(recording, source, cell)
        else:
            try:
                saved = spent.pop() if spent else blank()
            except IndexError:  # another thread has taken the last
                saved = blank()
            set_class(saved, SAVED[_TENSOR])
        entries = saved.__dict__
        entries["_recording"], entries["_ref"] = recording, source
        self._cell = recording.saves[index] = saved
        return saved

    @property
    def value(self) -> Any:
        """The value that was saved.

        Raises:
            NoValueError: before the run, after a failed run, or if it was not saved.
        """
        return self.result(here())

    @property
    def grad(self) -> Any:
        """The gradient: the derivative of a loss with respect to what passes here.

        It tells what a write here would change. Of a value of a site it is not that of other sites
        with the same memory, and it is of the value as of this line: after a write, of what was
        written.

        It is that of the last `backward` before this line, else of the first one after it; inside
        `with loss.backward():` it is that one's. It can be written, as sites can: `x.grad = y` and
        writes in place change what flows on to what `x` was made of.

        Raises:
            OperationError: when the block ends, if there is no `backward`.
        """
        recording = self._recording
        if not recording.open:
            return self.result(here()).grad
        if not self._operand:
            self._refuse_grad(here())
        return Proxy(recording, read_gradient(recording, self._ref, mark()))

    @grad.setter
    def grad(self, value: Any) -> None:
        recording = self._recording
        if not recording.open:
            self.result(here()).grad = value
            return
        if not self._operand:
            self._refuse_grad(here())
        write_gradient(recording, self._ref, value, mark())

    def backward(
        self,
        gradient: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> BackwardPass:
        """Records a backward pass from this value; it runs when the model has run.

        Gradients go to the values whose `.grad` is read or written in the block, and to the user's
        own tensors and parameters that require them. The model's parameters get none.

        Args:
            gradient: as of `torch.Tensor.backward`: what to start with, where this is no scalar.
            retain_graph: whether there will be another backward pass through the same values.
            create_graph: whether gradients can themselves be differentiated.
            inputs: whose gradients it returns: values of the block, weights of the model and
                tensors of the user's. Of these the latter accumulate them, and no other tensors do.

        Returns:
            The gradients of the inputs, in their order. In `with loss.backward():` every `.grad` is
            that of this pass.

        Raises:
            OperationError: if `inputs` holds something that has no gradient.
        """
        recording = self._recording
        if not recording.open:
            return self.result(here()).backward(gradient, retain_graph, create_graph, inputs)
        options = {
            "gradient": gradient,
            "retain_graph": retain_graph,
            "create_graph": create_graph or None,
        }
        given = {key: value for key, value in options.items() if value is not None}
        return backward_pass((self,), given, inputs, mark(), Proxy)

    def _refuse_grad(self, location: Location) -> NoReturn:
        written = self.written()
        raise OperationError(
            f"`{written}` is a tuple and has no gradient: write `{written}[0].grad`.", location
        )

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
        if node.operation is ATTRIBUTE and name in ("items", "keys", "values"):
            entries = self._of_mapping(name)
            if entries is not None:
                return entries
        methods = [operation.short for operation in TENSOR_METHODS]
        what = f"`.{name}()` is not an operation that can be recorded"
        whole = within_module()
        if name in OF_VALUES and not whole:
            raise OperationError(f"{what}{habit(name, OF_VALUES)}.", here())
        raise OperationError(
            f"{what}{nearest(name, methods)}. Save what it needs and call it on the saved value "
            f"after the block.{whole}",
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
            if func is torch.autograd.grad:
                return recorded_grad(Proxy, mark(), *args, **kwargs or NO_KWARGS)
            if is_custom_operator(func):
                return call_operator(Proxy, func, args, kwargs or NO_KWARGS)
            refuse(func)
        first = args[0] if args else None
        if kwargs and kwargs.get("inplace") is True and isinstance(first, AnyProxy):
            return first._written_with(operation, args, kwargs)
        if isinstance(first, AnyProxy) and not operation.in_place:  # as in `record`, but for a call
            recording = first._recording
            if recording.open and recording.session is None:
                line = mark()
                return Proxy(
                    recording, add_node(recording, operation, args, kwargs or NO_KWARGS, line)
                )
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

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """Records an operator that has a NumPy number on its left, or the function of its name."""
        name = ufunc.__name__
        operation = BY_NAME.get(f"operator.{OF_NUMPY.get(name, name)}")
        if operation is not None and method == "__call__" and not kwargs:
            return record(Proxy, operation, inputs, NO_KWARGS)
        if open_recordings((inputs, kwargs)):
            self._refuse_numpy(f"`np.{name}`")
        return at_once(getattr(ufunc, method), inputs, kwargs)

    def __setitem__(self, key: Any, value: Any) -> None:
        if not self._recording.open:
            self.result(here())[key] = value
            return
        recording, line = self._recording, mark()
        if holds(recording, self._ref, value, key):
            return
        if isinstance(key, str) or (isinstance(key, int) and not self._is_tensor(key)):
            block = isinstance(self, StructureProxy)
            written = write_part(recording, self._ref, key, value, block, line)
            if written is not None:
                self._ref = written
                return
        mutate(recording, SETITEM, (self, key, value), NO_KWARGS, line)

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
        node = recording.graph[recording.graph.original(self._ref.index)]
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

    def __hash__(self) -> int:
        return id(self)

    def __dir__(self) -> list[str]:
        own = cast("list[str]", super().__dir__())
        return sorted({*own, *(operation.short for operation in TENSOR_METHODS)})


class Proxy(AnyProxy, Recorded):
    """A proxy that is no tensor: any but what `.save()` returned."""

    __slots__ = ()


add_operators(AnyProxy, Proxy)


class StructureProxy(Proxy):
    """Stands for a value that is known to be a tuple: index it before computing with it."""

    __slots__ = ()
    _operand = False


SAVED: dict[type[Any], Any] = {}
"""The classes that `.save()` makes, which `saved_proxy.py` enters: they inherit from those here.

`torch.Tensor` has them for a value that may be a tensor, `list` for what every step saves, and the
class of the proxy for a value that is known to be no tensor.
"""

_TENSOR = torch.Tensor
