"""Sites as one writes them: what a call of a module, or of a function in it, takes and returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from insitu.batching.procedure import Subject
from insitu.graph.errors import BlockError, PathError
from insitu.graph.location import Location, Mark, here
from insitu.graph.node import Kind, Site, readable
from insitu.graph.proxy import Proxy
from insitu.tracing.invocation import Invocation, innermost

SITES: tuple[Kind, ...] = ("output", "input", "inputs")


class Sites:
    """What one call of a module, or of a torch function in its forward, takes and returns.

    Assigning is done by `__setattr__`; the setters say to type checkers what can be assigned to.
    """

    def __init__(self, model: Subject, path: str, call: int) -> None:
        vars(self).update(_model=model, _path=path, _call=call, _site=(model, path, call))

    _model: Subject
    _path: str
    _call: int
    _site: tuple[Subject, str, int]  # all three: one of them takes as long to find

    @property
    def output(self) -> Proxy:
        """What the module returns. A transformer block's is a tuple, hidden states first.

        Raises:
            BlockError: outside of an invocation.
        """
        # `_read` in place: this is what blocks do most.
        model, path, call = self._site
        invocation, mark = innermost(model, 2)
        if invocation is None:
            raise self._outside("output", mark)
        return invocation.read(path, "output", mark, call)

    @output.setter
    def output(self, value: Any) -> None: ...

    @property
    def input(self) -> Proxy:
        """The first argument that the module is called with, given by position or by keyword.

        Raises:
            BlockError: outside of an invocation.
        """
        return self._read("input")

    @input.setter
    def input(self, value: Any) -> None: ...

    @property
    def inputs(self) -> Proxy:
        """All arguments that the module is called with, as `(args, kwargs)`.

        Raises:
            BlockError: outside of an invocation.
        """
        return self._read("inputs")

    @inputs.setter
    def inputs(self, value: Any) -> None: ...

    if not TYPE_CHECKING:  # to checkers, what can be assigned is declared

        def __setattr__(self, name: str, value: Any) -> None:
            # Anything else is a slip, or a standard name: an attribute of the handle would be
            # lost in silence.
            if name not in SITES:
                self._assign(name, value)
                return
            model, path, call = self._site
            invocation, mark = innermost(model, 2)
            if invocation is None:
                raise self._outside(name, mark)
            invocation.write(path, name, value, mark, call)

    def _assign(self, name: str, value: Any) -> None:
        """Assigns to a name that is no site."""
        raise PathError(
            f"`{self._written()}.{name}` cannot be assigned to: a handle only stands for its "
            "module. Change the module itself through `.module`.",
            here(3),
        )

    def __repr__(self) -> str:
        return f"<{Site(0, self._path, 'output', self._call).owner}>"

    def _read(self, kind: Kind) -> Proxy:
        invocation, mark = self._invocation(kind, 4)
        return invocation.read(self._path, kind, mark, self._call)

    def _invocation(self, use: str, depth: int = 3) -> tuple[Invocation, Mark]:
        """The invocation in which the user's line stands, and that line.

        Args:
            use: what the line asks for there.
            depth: how many frames between are ours at least.
        """
        invocation, mark = innermost(self._model, depth)
        if invocation is None:
            raise self._outside(use, mark)
        return invocation, mark

    def _outside(self, use: str, mark: Mark) -> BlockError:
        if self._model.looks.tree is not False:  # a block is open
            return BlockError(
                f"`{self._written()}.{use}` is about one prompt, and no prompt is around this "
                "line: write it inside `with tracer.invoke(prompt):`, or give the block a prompt, "
                "as `model.trace(prompt)` or `model.trace(input_ids=...)`.",
                Location(*mark),
            )
        return BlockError(
            f"`{self._written()}.{use}` is about a run, so it belongs inside a block of its model: "
            "`with model.trace(prompt):`, or `with tracer.invoke(prompt):` inside "
            "`with model.trace() as tracer:`.",
            Location(*mark),
        )

    def _written(self) -> str:
        return readable(self._path) if self._path else "model"


class Call(Sites):
    """Stands for one call of a module: what it is called with, and what it returns."""

    def skip(self, value: Any) -> None:
        """Lets a value stand for the output, without the module's running.

        Args:
            value: of the structure, the shapes and the dtypes that the module returns. For a
                transformer block, the hidden states alone will do.

        Raises:
            BlockError: outside of an invocation.
            OperationError: if the module's own output is used before.
        """
        invocation, mark = self._invocation("skip")
        invocation.skip(self._path, value, mark, self._call)

    def stop(self) -> None:
        """Lets the run end as soon as the module has returned.

        Raises:
            BlockError: outside of an invocation.
        """
        invocation, mark = self._invocation("stop")
        invocation.stop(self._path, mark, self._call)
