"""Handles: the module tree as one writes it, `model.transformer.h[-1].attn`.

A handle stands for one module. It has the module's children as attributes and by index, and the
module's values as sites: `.output`, `.input` and `.inputs`. It holds a path and not the module,
so it can be used before the weights are there.
"""

# What a user gives is checked, whatever its type is said to be. Children are what names may mean.
# pyright: reportPrivateUsage=false, reportUnnecessaryIsInstance=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, cast, overload

from torch import nn

from insitu.batching.procedure import Subject
from insitu.display.tree import render, summarise
from insitu.graph.control import call_module
from insitu.graph.dispatch import recording_of
from insitu.graph.errors import (
    BlockError,
    IndexOutOfRangeError,
    InsituError,
    OperationError,
    PathError,
    ShapeError,
    nearest,
)
from insitu.graph.location import Location, here, mark
from insitu.graph.node import readable
from insitu.tracing.block_types import MLP, Attention, ModuleSites, TransformerBlock
from insitu.tracing.handles import Handles, sliced
from insitu.tracing.indexing import check_indexed, names_of
from insitu.tracing.inside import Operations
from insitu.tracing.invocation import innermost
from insitu.tracing.named import Named
from insitu.tracing.sites import SITES, Call
from insitu.tracing.unknown_names import no_child, not_in_part
from insitu.tracing.vocabulary import Entry, Given, Missing, Role, Roles

_ITS_OWN = frozenset(("module", "modules", "_model"))
_OF_MODULES = frozenset((*SITES, "skip", "stop", "ops", "module", "call"))


class Handle(ModuleSites):
    """Stands for one module of a model; its sites are those of the module's first call.

    A child whose name is taken by the handle itself is reached as `handle["output"]`.
    """

    def __init__(self, model: Subject, path: str) -> None:
        vars(self).update(_model=model, _path=path, _site=(model, path, 0), _items={}, _roles={})

    _call = 0
    _part = ""
    _internal: ClassVar[frozenset[str]] = frozenset()  # other parts of Insitu use it; not in `dir`
    _items: dict[str | int, Submodule]  # children by name, and by index as far as asked for
    _roles: dict[str, tuple[Entry, Submodule | list[Submodule]]]  # what standard names stood for

    @property
    def path(self) -> str:
        """The dotted path of the module in the tree, "" for the whole model."""
        return self._path

    @property
    def module(self) -> nn.Module:
        """The module itself: on the meta device until the weights are loaded.

        Raises:
            PathError: if it has been taken out of the model.
        """
        module: nn.Module | None = self._model.snapshot.root
        if self._path:  # from the root, and not by what was there before
            for name in self._path.split("."):
                module = module._modules.get(name)
                if module is None:
                    raise PathError(
                        f"The model has no module {readable(self._path)!r} now.", here()
                    )
        return module

    @property
    def ops(self) -> Operations:
        """The torch functions that the module's own forward calls, not those of its children.

        `handle.ops.softmax[0].output` is the output of its first softmax, a site like any other.

        Raises:
            BlockError: outside of an invocation.
        """
        invocation, line = innermost(self._model, 2)
        if invocation is None:
            raise BlockError(
                f"`{self._line()}.ops` is found for a prompt, so it belongs inside a block of its "
                f"model. `with model.scan(prompt): print({self._line()}.ops)` runs nothing.",
                Location(*line),
            )
        try:
            called = invocation.called(self._path)
        except ShapeError:
            called = None
        return Operations(self._model, self._path, called)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Applies the module to values of the run, outside of the model's flow.

        Its sites see nothing of it. On tensors that are there already, call `handle.module`.

        Args:
            args: recorded values, constants, or containers of both.
            kwargs: the same, by keyword.

        Returns:
            A proxy for what the module returns.

        Raises:
            OperationError: if none of the arguments is a value of an open block, or if that block
                is of another model.
        """
        recording = recording_of((args, kwargs))
        if recording is not None:
            self._check_own(cast("Subject | None", recording.model))
        elif not self._path:
            raise OperationError(
                "A model runs when a block ends, and a call of it outside of one runs nothing: "
                "write `with model.trace(prompt):`, `with model.generate(prompt, "
                "max_new_tokens=5) as generator:`, or `cache = model.run_with_cache(prompt)`; the "
                "module's own forward is `model.load()(**inputs)`.",
                here(),
            )
        return call_module(self._path, args, kwargs, mark())

    def _check_own(self, model: Subject | None) -> None:
        """Raises if a call would be one of another model's module: the graph has only its path."""
        own = self._model
        if model is None or model is own or model.origin is own.origin:
            return
        if model.snapshot.root is not own.snapshot.root:  # a module may be wrapped twice
            written = self._written()
            raise OperationError(
                f"`{written}` is a module of another model than the block, which can call its own "
                "modules only. Load the other model before the block, and call "
                f"`{written}.module(...)`: it is then a module of yours.",
                here(3),
            )

    def call(self, number: int) -> Call:
        """Returns one call of a module that runs several times in a forward, or in a step.

        Args:
            number: which, from 0. Its sites are `handle.call(1).output` and so on.
        """
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise IndexOutOfRangeError(
                f"Calls of `{self._written()}` count from 0, so there is no call {number!r}.",
                here(),
            )
        return Call(self._model, self._path, number)

    @property
    def role(self) -> Names:
        """The standard names of the module, also those that a child of its own is called by.

        `handle.role["attention"]` is the module that attends, also where a child has that name.
        """
        return Names(self)

    def __getattr__(self, name: str) -> Submodule:
        if name in _ITS_OWN:  # not found by a property, or not there yet in a copy
            return object.__getattribute__(self, name)
        # In a block what is there was looked at once; from the root it takes several times as long.
        module = self._model.modules.get(self._path)
        if module is None:
            module = self.module  # raises
        if module._modules.get(name) is not None:
            child = vars(self)[name] = self._child(name)
            return child
        if name.startswith("__"):
            raise AttributeError(name)
        entry = self._entry(name)
        if entry is not None:
            return self._named(entry, name)
        raise PathError(self._unknown(name), here())

    def _assign(self, name: str, value: Any) -> None:
        taken = not self._part and name in self.module._modules
        entry = None if taken else self._entry(name)
        if entry is not None:
            self._write_named(entry, name, value)
            return
        super()._assign(name, value)

    def _entry(self, name: str) -> Entry | None:
        """What a standard name stands for, None if it is none."""
        vocabulary = self._model.vocabulary
        if name not in vocabulary.names:
            return None
        return vocabulary.entry(self._path, self._part, name)

    def _named(self, entry: Entry, name: str) -> Any:
        """What a standard name stands for."""
        if isinstance(entry, Named):
            invocation, line = self._invocation(name, 4)
            return entry.read(invocation, line)
        if isinstance(entry, Given):
            return entry.value
        if isinstance(entry, Missing):
            raise PathError(f"`{self._written()}` has no `{name}`: {entry.reason}", here(3))
        known, found = self._roles.get(name, (None, self))
        if known is not entry:
            _, found = self._roles[name] = (entry, self._handles_of(entry))
        return Handles(f"model.{name}", found) if isinstance(found, list) else found

    def _handles_of(self, entry: Role | Roles) -> Submodule | list[Submodule]:
        """The handles of the modules, or of the part, that a standard name stands for."""
        if isinstance(entry, Roles):
            return [self._at(path) for path in entry.paths]
        return Part(self._model, entry) if entry.part else self._at(entry.path)

    def _write_named(self, entry: Entry, name: str, value: Any) -> None:
        """Writes what a standard name stands for."""
        if isinstance(entry, Missing):
            self._named(entry, name)
        if not isinstance(entry, Named):
            raise PathError(
                f"`{self._written()}.{name}` is no value of a run and cannot be assigned to: write "
                "the `.output` of a module, or a value by its name.",
                here(4),
            )
        invocation, line = self._invocation(name, 5)
        entry.write(invocation, value, line)

    def _at(self, path: str) -> Submodule:
        """The handle of a module of the model."""
        return cast("Submodule", self._model)._below(path)

    def _below(self, path: str) -> Submodule:
        """The handle of a module below this one."""
        handle = cast("Submodule", self)
        for name in path.split("."):
            handle = handle._child(name)
        return handle

    @overload
    def __getitem__(self, key: int | str, /) -> Submodule: ...
    @overload
    def __getitem__(self, key: slice, /) -> list[Submodule]: ...
    def __getitem__(self, key: int | str | slice, /) -> Submodule | list[Submodule]:
        if type(key) is int:
            known = self._items.get(key)
            if known is not None:
                return known
        module = self.module
        if type(key) is int and isinstance(module, nn.ModuleList):  # nearly always
            name = str(key if key >= 0 else key + len(module._modules))
            if name in module._modules:
                child = self._child(name)
                if key >= 0:  # the last may be another after a change
                    self._items[key] = child
                return child
        found = names_of(self._model, self._path, module, key)
        if isinstance(found, list):
            return Handles(sliced(self._line(), cast("slice", key)), [*map(self._below, found)])
        return self._below(found)

    def __setitem__(self, key: object, value: object) -> NoReturn:
        written = f"{self._line()}[{key!r}]"
        raise PathError(
            f"`{written}` cannot be assigned to: a handle only stands for its module. Write "
            f"`{written}.output = value` in a block for what it returns, or change the module "
            "itself through `.module`.",
            here(),
        )

    def __len__(self) -> int:
        module = self.module
        check_indexed(self._path, module)
        return len(module._modules)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Submodule]:
        items, module = self._items, self.module
        check_indexed(self._path, module)
        names = module._modules
        return iter([items[name] if name in items else self._child(name) for name in names])

    def __dir__(self) -> list[str]:
        names: set[str] = set()
        with contextlib.suppress(InsituError):  # where it takes the weights to know them
            names.update(Names(self))
        own = {*super().__dir__()} - self._internal
        return sorted({*own, *self.module._modules, *names})

    def __repr__(self) -> str:
        return render(summarise(self._path.rpartition(".")[2] or "model", self.module))

    def _child(self, name: str) -> Submodule:
        child = self._items.get(name)
        if child is None:
            child = Submodule(self._model, f"{self._path}.{name}" if self._path else name)
            self._items[name] = child
        return child

    def _line(self) -> str:
        return f"model.{self._written()}" if self._path else "model"

    def _unknown(self, name: str) -> str:
        return no_child(self._model, self._path, self.module, name)


class Submodule(Handle, TransformerBlock, Attention, MLP):
    """Stands for a module in a model. Which of the standard names it has depends on the module.

    To type checkers its other attributes are modules too, by the names of the architecture.
    """

    if TYPE_CHECKING:  # by their names in the architecture, its children are there too
        attention: Submodule
        cross_attention: Submodule
        mlp: Submodule
        experts: Submodule
        norm_1: Submodule
        norm_2: Submodule


class Part(Submodule):
    """Stands for a part of a block by its role: its standard names come before its children's.

    Where a model has no module for it, it has names only.
    """

    def __init__(self, model: Subject, role: Role) -> None:
        super().__init__(model, role.path)
        vars(self).update(_part=role.part, _is_module=role.is_module)

    _is_module: bool

    def __getattribute__(self, name: str) -> Any:
        # Children and methods of a handle are found before `__getattr__` is asked.
        if name.startswith("_"):
            return super().__getattribute__(name)
        entry = self._entry(name)
        if entry is not None:
            return self._named(entry, name)
        if not self._is_module and name in _OF_MODULES:
            raise PathError(self._unknown(name), here())
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Submodule:
        # Also asked after `__getattribute__` has raised: for the error, once more.
        entry = self._entry(name)
        if entry is not None:
            return self._named(entry, name)
        if self._is_module:
            return super().__getattr__(name)
        raise PathError(self._unknown(name), here())

    def __dir__(self) -> list[str]:
        return sorted(self.role) if not self._is_module else super().__dir__()

    def __repr__(self) -> str:
        return super().__repr__() if self._is_module else f"<{self._part} of {self._written()}>"

    def _unknown(self, name: str) -> str:
        if self._is_module:
            return super()._unknown(name)
        return not_in_part(self._model, self._path, self._part, name, self.role)


class Names:
    """The standard names of a module, as a mapping: `handle.role["attention"]`."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def __getitem__(self, name: str) -> Any:
        handle = self._handle
        entry = handle._entry(name)
        if entry is None:
            known = list(self)
            raise PathError(
                f"`{handle._written()}` has no role {name!r}{nearest(name, known)}.", here()
            )
        return handle._named(entry, name)

    def __iter__(self) -> Iterator[str]:
        handle = self._handle
        listed = handle._model.vocabulary.listed(handle._path, handle._part)
        return iter([name for name, entry in listed.items() if not isinstance(entry, Missing)])

    def __repr__(self) -> str:
        return f"<standard names of {self._handle._written()}: {', '.join(self)}>"
