"""Outputs of Transformers' models in results: dictionaries whose entries are attributes too.

Their classes are found among those that Transformers has: nothing is imported by a name that comes
with results. Where a class is not known, an output is a plain `ModelOutput` of the same fields.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple, cast

from insitu.graph.errors import NoValueError, WireError
from insitu.graph.location import here
from insitu.graph.wire_message import printable

_PACKAGE = "transformers"
_BASE = "ModelOutput"
# Most outputs of forwards are of the first module, and those of generations of the second.
_IMPORTED = ("transformers.modeling_outputs", "transformers.generation.utils")


class LeftOut:
    """Stands in what a generation returned for a part that is no data, and says so if it is used.

    A cache of keys and values stays in the process that ran.

    Args:
        kind: the name of the part's class.
    """

    __slots__ = ("_kind",)

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # Python asks for names such as `__deepcopy__`
            raise AttributeError(name)
        raise self._error()

    def __getitem__(self, key: object) -> Any:
        raise self._error()

    def __len__(self) -> int:
        raise self._error()

    def __iter__(self) -> Any:
        raise self._error()

    def __repr__(self) -> str:
        return f"<A {printable(self._kind):.80} that stayed in the process that ran>"

    def _error(self) -> NoValueError:
        return NoValueError(
            f"This part of the output is a {printable(self._kind):.80}, which is no data: it "
            "stayed in the process that ran. Save the tensors of it that you need in the block.",
            here(),
        )


def kind_of(value: Any) -> str:
    """Returns the name of a value's class; of what stands for another value, of that one's."""
    return value._kind if type(value) is LeftOut else type(value).__name__


class Output(NamedTuple):
    """An output as data.

    Attributes:
        kind: the name of its class, with the module.
        entries: its entries, by name.
        empty: the names of its fields that have no entry.
    """

    kind: str
    entries: dict[str, Any]
    empty: list[str]


def is_output(value: Any) -> bool:
    """Returns whether a value is an output of Transformers, also of a class of the user's."""
    kind = cast("type[Any]", type(value))
    if kind.__module__ == "builtins":  # nearly always
        return False
    bases = any(
        base.__name__ == _BASE and base.__module__.partition(".")[0] == _PACKAGE
        for base in kind.__mro__
    )
    return bases and all(isinstance(name, str) and _is_name(name) for name in value)


def as_data(value: Any) -> Output:
    """Returns an output as data.

    Args:
        value: the output.
    """
    kind = cast("type[Any]", type(value))
    entries = dict(value)
    fields = [one.name for one in dataclasses.fields(kind)] if _has_fields(kind) else []
    empty = [name for name in fields if name not in entries]
    return Output(f"{kind.__module__}.{kind.__qualname__}", entries, empty)


def made(kind: str, names: Sequence[str], items: Sequence[Any], empty: Sequence[str]) -> Any:
    """Returns an output.

    Args:
        kind: the name of its class, with the module. It may be anything.
        names: the names of its entries.
        items: its entries.
        empty: the names of its fields that have no entry.

    Raises:
        WireError: if a name is none, or there are other names than entries.
    """
    every = [*names, *empty]
    if len(names) != len(items) or len({*every}) < len(every) or not all(map(_is_name, every)):
        raise WireError("an output of a model does not have a proper name for each of its entries")
    base = _base()
    known: Any = _class_of(kind)
    fields = [one.name for one in dataclasses.fields(known)] if _has_fields(known) else []
    # Another version of Transformers may have other fields in a class of the same name.
    fits = bool(fields) and {*every} <= {*fields}
    # Without `__init__`, which takes pairs in a first entry for the other entries.
    output: Any = OrderedDict.__new__(known) if fits else base()
    for name in fields if fits else empty:
        object.__setattr__(output, name, None)
    for name, item in zip(names, items, strict=True):
        base.__setitem__(output, name, item)
    return output


def _base() -> Any:
    from transformers.utils.generic import ModelOutput  # of no use to results without an output

    return ModelOutput


def _class_of(kind: str) -> type[Any] | None:
    """The class of outputs that has a name, among those that Transformers has defined."""
    module = kind.rpartition(".")[0]
    if module in _IMPORTED:
        import_module(module)
    pending: list[type[Any]] = [_base()]
    while pending:
        found = pending.pop()
        own = found.__module__.partition(".")[0] == _PACKAGE
        if own and f"{found.__module__}.{found.__qualname__}" == kind:
            return found
        pending += found.__subclasses__()
    return None


def _has_fields(kind: Any) -> bool:
    return kind is not None and dataclasses.is_dataclass(kind)


def _is_name(name: str) -> bool:
    """Whether an entry may be an attribute: one of another name would hide a method."""
    hides = name == "to_tuple" or hasattr(OrderedDict, name)
    return name.isidentifier() and not name.startswith("_") and not hides
