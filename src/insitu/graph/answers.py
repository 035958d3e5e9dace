"""What a proxy answers, and what it refuses to answer, while its block is open.

Shapes and dtypes are known from one run on fake tensors. What takes the value itself, such as
`if` or NumPy, is refused with what to write instead. After the run the value answers.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn, cast

import torch

from insitu.graph.cells import Missing
from insitu.graph.dispatch import at_once, open_recordings, within_module
from insitu.graph.errors import NoValueError, OperationError
from insitu.graph.location import here
from insitu.graph.recorded import AnyRecorded, refuse_structure
from insitu.graph.shapes import dtype_of, fake_value, length_of, outlined, shape_of


class Answers(AnyRecorded):
    """The part of a proxy that records nothing."""

    __slots__ = ()

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
        return self._of_tensor(self._outlined()).ndim

    def dim(self) -> int:
        """The number of axes."""
        return self._of_tensor(self._outlined()).dim()

    ndimension = dim

    def is_floating_point(self) -> bool:
        """Whether the numbers have a fraction."""
        return self._of_tensor(self._outlined()).is_floating_point()

    def is_complex(self) -> bool:
        """Whether the numbers are complex."""
        return self._of_tensor(self._outlined()).is_complex()

    def _of_tensor(self, known: Any) -> Any:
        """Returns a known value, if it is no tuple: operations on a tuple are refused."""
        if isinstance(known, tuple | list | Mapping):
            refuse_structure(self, here(3))
        return known

    def _outlined(self) -> Any:
        """As `_known`, but sizes may be those of the first step of a generation."""
        if self._recording.open:
            return outlined(self._recording, self._ref.index)
        return self.result(here(3))

    is_nested = is_quantized = is_sparse = False
    """What modules of `torch.nn` ask: values of a run are plain tensors."""

    def size(self, dim: int | None = None) -> Any:
        """The shape, or the length of one axis."""
        shape = self.shape
        if not isinstance(shape, torch.Size):  # the shapes of what a tuple holds
            refuse_structure(self, here())
        return shape if dim is None else shape[dim]

    def numel(self) -> int:
        """The number of elements."""
        return self._of_tensor(self._known()).numel()

    nelement = numel

    def __len__(self) -> int:
        known = self._known()
        if not self._recording.open and isinstance(known, torch.Tensor):
            # Torch asks for it where this is an index (`table[x]`), and would then take the rows
            # of the value for indices of one axis each. There this error is raised.
            raise NoValueError(
                f"`{self.written()}` is the proxy on which `.save()` was called, and no tensor: "
                "use what `.save()` returned (`x = x.save()`), or `x.value`.",
                here(),
            )
        return length_of(known, self._recording, self._ref)

    def __iter__(self) -> Iterator[Any]:
        known = self._outlined()
        if isinstance(known, torch.Tensor):  # how long it is may differ from step to step
            known = self._known()
        if not self._recording.open or isinstance(known, Mapping):
            return iter(cast("Iterable[Any]", known))
        length = length_of(known, self._recording, self._ref)
        return iter([cast(Any, self)[at] for at in range(length)])

    def _of_mapping(self, name: str) -> list[Any] | None:
        """Answers `keys()`, `values()` or `items()` of a mapping; None for any other value.

        This is what was recorded for the attribute: nothing else has used it, so it is taken back.
        """
        recording, index = self._recording, self._ref.index
        graph = recording.graph
        owner = cast(Any, type(self))(recording, graph.rows[index][1][0])
        known = owner._outlined()
        if not isinstance(known, Mapping) or name in known or index < len(graph.rows) - 1:
            return None
        recording.take_back(index)
        self._ref = owner._ref
        keys = [*cast("Mapping[Any, Any]", known)]
        if name == "keys":
            return keys
        entries = [owner[key] for key in keys]
        return entries if name == "values" else [*zip(keys, entries, strict=True)]

    def _known(self) -> Any:
        """The value after the run, or before it a fake one of the same shape."""
        if self._recording.open:
            return fake_value(self._recording, self._ref.index)
        return self.result(here(3))

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
        if self._recording.open:
            self._refuse_numpy("A NumPy array")
        import numpy as np

        return np.asarray(self.result(here()), dtype=dtype)

    def __array_function__(
        self, func: Callable[..., Any], types: Any, args: Any, kwargs: Mapping[str, Any]
    ) -> Any:
        """Refuses a function of NumPy's that was called with a proxy."""
        if not open_recordings((args, dict(kwargs))):
            return at_once(func, args, kwargs)
        self._refuse_numpy(f"`np.{func.__name__}`")

    def _refuse_numpy(self, what: str) -> NoReturn:
        raise OperationError(
            f"{what} needs the value of `{self.written()}`, which is there once the model runs: "
            "use torch's own function, `insitu.apply(function, value)`, or save it and call NumPy "
            "after the block.",
            here(3),
        )

    def _python_value(self, use: str, instead: str) -> Any:
        if not self._recording.open:
            return self.result(here(3))
        raise OperationError(
            f"`{self.written()}` has no value while the block is open, so {use} cannot be decided "
            f"by it: use {instead}, or save it and decide after the block.{within_module()}",
            here(3),
        )

    def __round__(self, ndigits: int | None = None) -> Any:
        if not self._recording.open:
            return round(self.result(here()), ndigits)
        own = cast(Any, self)
        return own.round() if ndigits is None else own.round(decimals=ndigits)

    # What is shown

    def __repr__(self, *, tensor_contents: object = None) -> str:
        cell = self._cell
        if cell is not None and type(cell._content) is not Missing:
            return repr(cell._content)
        if not self._recording.open:
            return f"<{self.written()}: no value, since it was not saved>"
        fake = self._recording.fakes.get(self._ref.index)
        return self.written() + ("" if fake is None else f": {shape_of(fake)}")

    def __format__(self, spec: str) -> str:
        cell = self._cell
        if cell is not None and type(cell._content) is not Missing:
            return format(cell._content, spec)
        try:
            return format(str(self), spec)
        except ValueError:  # of a number
            raise OperationError(
                f"`{self.written()}` has no value while the block is open, so it cannot be written "
                f"as {spec!r}: save it, and format the saved value after the block.",
                here(),
            ) from None

    # Copies

    def __copy__(self) -> Any:
        return self._copied(copy.copy)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._copied(lambda value: copy.deepcopy(value, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles the value: what reads it needs no Insitu, and gets what the value is."""

        def reduced(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return cast(Any, value).__reduce_ex__(protocol)
            return copy.copy, (value,)

        return self._copied(reduced)

    def _copied(self, function: Callable[[Any], Any]) -> Any:
        if not self._recording.open:
            return function(self.result(here(3)))
        raise OperationError(
            f"`{self.written()}` has no value while the block is open, so it can be neither copied "
            "nor pickled: write `.clone()`, or save it and do that after the block.",
            here(3),
        )
