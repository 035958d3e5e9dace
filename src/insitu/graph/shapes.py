"""Shapes while recording: recorded operations carried out on fake tensors.

A fake tensor has a shape, a dtype and a device but no data (`torch._subclasses.FakeTensorMode`).
What arrives at a site is asked of the recording's shape source; operations are then run on it
here, only those that a question needs, and each once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from insitu.graph.context import as_begun, entered
from insitu.graph.errors import (
    InsituError,
    LimitError,
    OperationError,
    ShapeError,
    UnknownShapeError,
    at_line,
)
from insitu.graph.evaluation import held_by, meaning
from insitu.graph.expression import expression, located
from insitu.graph.fake_tensors import Fakes, on_fake_tensors
from insitu.graph.lines import Lines
from insitu.graph.location import here
from insitu.graph.node import (
    Carried,
    Function,
    Graph,
    ModuleRef,
    Node,
    Ref,
    Subgraph,
    WeightRef,
)
from insitu.graph.objects import map_objects, tensors_within
from insitu.graph.operations import APPLY, COND, FOLD, GETITEM, INPUT, KEEP, READ, SAVE
from insitu.graph.structure import as_data, map_structure, storages_of
from insitu.graph.structure_hints import hint


def fake_value(recording: Lines, index: int) -> Any:
    """Returns the value of a node with fake tensors in place of tensors.

    Args:
        recording: the recording that the node is in.
        index: the node.

    Raises:
        ShapeError: pointing at the line of the operation that fails, or whose result has a shape
            that depends on values.
    """
    # The question may stand in another context than the block.
    with as_begun(recording.casts, recording.dtype):
        return _fake_value(recording, index)


def outlined(recording: Lines, index: int) -> Any:
    """Returns a fake value with the number of axes and the structure of a node's value.

    In later steps of a generation sizes may differ from those of the first, but no more.

    Args:
        recording: the recording that the node is in.
        index: the node.

    Raises:
        ShapeError: as `fake_value`.
    """
    try:
        return fake_value(recording, index)
    except UnknownShapeError:
        with _as_in_first_step(recording):
            return fake_value(recording, index)


def shares_memory(recording: Lines, index: int) -> bool | None:
    """Returns whether a node's value shares memory with what it is made of, None if nobody knows.

    It is asked where dtypes or strides decide that. In later steps of a generation dtypes are
    those of the first. Where strides forbid a view in the first, they may allow one later.

    Args:
        recording: the recording that the node is in.
        index: the node.

    Raises:
        OperationError: if it is so of a part of the value.
    """
    operation, args, _, inputs, _, _ = recording.graph.rows[index]
    try:
        if operation is GETITEM:  # numbers take an entry, which is a view
            keys = [outlined(recording, source) for source in inputs if source != args[0].index]
            return all(key.ndim == 0 and _is_whole_number(key) for key in keys)
        later = _is_of_later_steps(recording, index)
        with _as_in_first_step(recording) if later else nullcontext():
            shares, whole = _shares(recording, index)
    except UnknownShapeError:
        return None
    if later and not shares and operation.short in _BY_STRIDES:
        return None
    if shares and not whole and operation in (APPLY, COND, FOLD):
        raise OperationError(
            f"Something is written in place that `{expression(recording.graph, index)}` returns "
            "parts of: write into a `.clone()`.",
            here(),
        )
    return shares


_BY_STRIDES = ("contiguous", "flatten", "ravel", "reshape", "reshape_as")


def _shares(recording: Lines, index: int) -> tuple[bool, bool]:
    """Whether a value shares memory with what it is made of, and whether it is a tensor."""
    value = fake_value(recording, index)
    sources = [fake_value(recording, source) for source in recording.graph.rows[index][3]]
    shares = not storages_of(value).isdisjoint(storages_of(sources))
    return shares, isinstance(value, torch.Tensor)


def _is_whole_number(key: Any) -> bool:
    return not (key.is_floating_point() or key.is_complex() or key.dtype is torch.bool)


def _is_of_later_steps(recording: Lines, index: int) -> bool:
    """Whether a value is, or may be, of a step other than the first."""
    rows = recording.graph.rows
    nodes = [rows[at] for at in recording.graph.needed_by(index)]
    return any(operation is READ and args[4] != 0 for operation, args, *_ in nodes)


@contextmanager
def _as_in_first_step(recording: Lines) -> Generator[None]:
    """Lets sites of later steps count as those of the first."""
    kept, recording.fakes = recording.fakes, {}
    recording.as_first_step = True
    try:
        yield
    finally:
        recording.fakes, recording.as_first_step = kept, False


def _fake_value(recording: Lines, index: int) -> Any:
    fakes = recording.fakes
    for ancestor in sorted(recording.graph.needed_by(index, fakes)):
        node = recording.graph[ancestor]
        site = node.site
        if site is not None and recording.as_first_step:
            site = site._replace(step=0)
        if site is None:
            fakes[ancestor] = _compute(recording, ancestor)
        elif recording.shapes is None:
            raise UnknownShapeError(
                f"The shape of `{site}` is not known before the run.", node.location
            )
        else:
            try:
                fakes[ancestor] = recording.shapes.arriving(site)
            except InsituError as error:
                if error.location is not None:
                    raise
                raise at_line(error, node.location) from error
    return fakes[index]


def shape_of(value: Any) -> Any:
    """Returns the size of a tensor, or sizes in the structure of a nested value."""
    if isinstance(value, torch.Tensor):
        return value.shape
    return _plain(value, lambda leaf: leaf.shape if isinstance(leaf, torch.Tensor) else None)


def dtype_of(value: Any) -> Any:
    """Returns the dtype of a tensor, or dtypes in the structure of a nested value."""
    return _plain(value, lambda leaf: leaf.dtype if isinstance(leaf, torch.Tensor) else None)


def length_of(value: Any, recording: Lines, ref: Ref) -> int:
    """Returns `len(value)`.

    Raises:
        ShapeError: if the value has no length.
    """
    if isinstance(value, Sized) and getattr(value, "ndim", 1):
        return len(value)
    node = recording.graph[ref.index]
    raise ShapeError(
        f"`{expression(recording.graph, ref.index)}` is one number and no sequence, and it has "
        "no value while the block is open: save it, and use its value after the block. "
        "`torch.stack([x, y])` makes one tensor of several values.",
        node.location,
    )


def _plain(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """The structure of a value with dictionaries of every class as plain ones."""
    if isinstance(value, Mapping):
        entries = cast("Mapping[Any, Any]", value)
        return {key: _plain(item, leaf) for key, item in entries.items()}
    if isinstance(value, tuple | list):
        items = [_plain(item, leaf) for item in cast("tuple[Any, ...]", value)]
        return tuple(items) if isinstance(value, tuple) else items
    return leaf(value)


def works_in_one_dtype(recording: Lines, index: int) -> bool:
    """Returns whether an operation works on fake tensors whose floating ones are all float32.

    Where it fails otherwise, the dtypes are to blame and not the shapes.

    Args:
        recording: the recording that the operation is in. Its inputs have fake values.
        index: its node.
    """
    try:
        _compute(recording, index, one_dtype=True)
    except ShapeError:
        return False
    return True


def _compute(recording: Lines, index: int, one_dtype: bool = False) -> Any:
    node = recording.graph[index]
    if node.operation is INPUT or (
        node.operation is APPLY and type(node.args[0]) is Function and not node.args[0].on_fakes
    ):
        raise UnknownShapeError(
            "The shapes of what a Python function returns, and inside `cond` and `fold`, are not "
            "known before the run.",
            node.location,
        )
    if node.operation in (COND, FOLD) and calls_function(node.args):
        raise UnknownShapeError(
            "The shapes of what `cond` and `fold` return are not known before the run where a "
            "Python function is called in them.",
            node.location,
        )
    mode = _mode(recording, node)

    def module(path: str) -> Any:
        assert recording.shapes is not None
        return recording.shapes.model.fake_module(path)

    def other(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        with mode:  # what is fake elsewhere is not fake here
            return torch.empty(item.shape, dtype=item.dtype)

    def leaf(item: Any) -> Any:
        if type(item) is Function:
            return item.on_fakes or item.function
        if type(item) in (Ref, ModuleRef, Subgraph):
            return meaning(item, recording.fakes, module)
        if type(item) is Carried:
            return map_structure(other, item.fake())
        if type(item) is WeightRef:
            assert recording.shapes is not None
            return other(recording.shapes.model.modules[""].get_parameter(item.path))
        if isinstance(item, torch.Tensor) and not isinstance(item, FakeTensor):
            # What was computed of others is asked for a gradient that it cannot have.
            return mode.from_tensor(item if item.is_leaf else item.detach())
        return item

    given = {key: arg for key, arg in node.kwargs.items() if not isinstance(arg, torch.Generator)}
    try:
        args, kwargs = cast("tuple[Any, Any]", held_by((node.args, given), leaf))
    except LimitError as error:
        raise located(recording.graph, index, error) from None
    try:
        context = recording.graph.contexts.get(index)
        with on_fake_tensors(mode, entered(context), recording.counting):
            if one_dtype:
                args, kwargs = map_structure(_float, (args, kwargs))
            if node.operation is COND:
                return _either(*args)
            if node.operation in (SAVE, KEEP):
                return _kept(*args)
            return node.operation.function(*args, **kwargs)
    except InsituError as error:
        raise located(recording.graph, index, error) from None
    except Exception as error:
        unknown = "DataDependent" in type(error).__name__ or "DynamicOutput" in type(error).__name__
        if unknown or ".tolist() is not supported" in str(error):
            written = expression(recording.graph, index)
            raise UnknownShapeError(
                f"The shape of `{written}` depends on values, so it is not known before the run.",
                node.location,
            ) from error
        inputs = [recording.fakes[source] for source in node.inputs]
        if node.operation is APPLY and type(node.args[0]) is Function:  # it may want data
            raise UnknownShapeError(
                f"The shape of `{expression(recording.graph, index)}` is not known before the run: "
                f"on tensors without data it raises {type(error).__name__}: {error}",
                node.location,
            ) from error
        raise misfit(recording.graph, index, inputs, error) from error


def calls_function(args: tuple[Any, ...]) -> bool:
    """Returns whether a node calls a Python function of the user's, by itself or in what it runs.

    Args:
        args: the arguments of the node.
    """
    for arg in args:
        if isinstance(arg, Function):
            return True
        if isinstance(arg, Subgraph) and any(calls_function(row[1]) for row in arg.graph.rows):
            return True
    return False


def misfit(graph: Graph, index: int, inputs: Sequence[Any], error: Exception) -> ShapeError:
    """Returns the error for an operation on values that do not fit together.

    Args:
        graph: the graph.
        index: the node of the operation.
        inputs: the values of its inputs, fake or not.
        error: what the operation raised.
    """
    shapes = map(shape_of, inputs[:_MOST_SHAPES])
    listed = ", ".join(
        str(tuple(s)) if isinstance(s, torch.Size) else f"{s!s:.200}" for s in shapes
    )
    listed += ", ..." * (len(inputs) > _MOST_SHAPES)
    why = f"{error!s:.2000}{hint(graph, index, inputs, error)}"
    message = f"`{expression(graph, index)}` does not work on values of shape {listed}: {why}"
    return ShapeError(message, graph[index].location)


_MOST_SHAPES = 20


def _float(item: Any) -> Any:
    floats = isinstance(item, torch.Tensor) and item.is_floating_point()
    return item.float() if floats else item


def _kept(value: Any, to: str | None = None) -> Any:
    """A value as it is saved. Python's own copy of an object would read memory that is not there.

    PyTorch copies the storage of a fake tensor with it, and ends the process.
    """
    map_structure(lambda leaf: leaf if isinstance(leaf, torch.Tensor) else as_data(leaf), value)
    return map_objects(lambda leaf: leaf.clone() if to is None else leaf.to(to, copy=True), value)


def _either(pred: Any, then: Any, otherwise: Any, *operands: Any) -> Any:
    """What both functions of a `cond` return, if it has the same shapes."""
    first, second = then(*operands), otherwise(*operands)
    if shape_of(first) != shape_of(second):
        raise UnknownShapeError(
            f"`cond` gives {shape_of(first)} or {shape_of(second)}, which depends on values."
        )
    return first


def _mode(recording: Lines, node: Node) -> FakeTensorMode:
    """The fake mode that the inputs of a node live in."""
    # Those within objects too, such as a cache.
    given = tensors_within([recording.fakes[number] for number in node.inputs])
    modes = (item.fake_mode for item in given if isinstance(item, FakeTensor))
    return next(modes, None) or Fakes()
