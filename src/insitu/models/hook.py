"""A TransformerLens hook point: a value by the name that TransformerLens has for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from insitu.graph.errors import BlockError, PathError
from insitu.graph.location import Location, Mark, here
from insitu.graph.proxy import Proxy
from insitu.models.transformer_lens import TransformerLens
from insitu.tracing.invocation import Invocation, innermost
from insitu.tracing.named import Named
from insitu.tracing.vocabulary import Missing

if TYPE_CHECKING:
    from insitu.batching.procedure import Subject


class Hook:
    """What `model.hook("blocks.3.attn.hook_z")` gives.

    Args:
        model: the model.
        hooks: its hook names.
        name: the name.

    Raises:
        PathError: if there is no such hook, or the model has nothing that it could stand for.
    """

    def __init__(self, model: Subject, hooks: TransformerLens, name: str) -> None:
        entry = hooks.entry(name) if isinstance(name, str) else None
        if isinstance(entry, Missing):
            raise PathError(f"The model has no `{name}`: {entry.reason}", here())
        if not isinstance(entry, Named):
            raise PathError(
                f"TransformerLens has no hook {name!r} in this model{hooks.near(str(name))}.",
                here(),
            )
        self._model = model
        self._name = name
        self._named = entry

    @property
    def name(self) -> str:
        """The name."""
        return self._name

    @property
    def output(self) -> Proxy:
        """The value, in TransformerLens's order of axes: `(batch, position, head, d_head)`.

        It is read and written like any other; writing it, or in it, changes the model's run.

        Raises:
            BlockError: outside of an invocation.
        """
        invocation, line = innermost(self._model, 2)
        return self._named.read(self._inside(invocation, line), line)

    @output.setter
    def output(self, value: Any) -> None:
        invocation, line = innermost(self._model, 2)
        self._named.write(self._inside(invocation, line), value, line)

    def __repr__(self) -> str:
        return f"<hook {self._name}>"

    def _inside(self, invocation: Invocation | None, line: Mark) -> Invocation:
        if invocation is not None:
            return invocation
        raise BlockError(
            f"`{self._name}` is a value of a run, so it belongs inside a block of its model: "
            "`with model.trace(prompt):`, or `with tracer.invoke(prompt):` inside "
            "`with model.trace() as tracer:`.",
            Location(*line),
        )
