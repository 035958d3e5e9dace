"""One call of the wrapped module, as a pass makes it: the facts that are known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Protocol

from insitu.engine.interpose import Own
from insitu.graph.node import Address, Kind, Place, Site


class Deliver(Protocol):
    """Hands what passes a place that is no module's to the experiment."""

    def __call__(self, kind: Kind, value: Any, *, vocabulary: int | None = None) -> Any:
        """Returns the value that is to stand there: the same one, unless it is written.

        Args:
            kind: which value of the whole model it is.
            value: what passes.
            vocabulary: of the choice of tokens, how many there are.
        """
        ...


class Cut(Protocol):
    """An invocation's own part of what passes the sites of a whole batch."""

    def take(self, site: Site, value: Any) -> Any:
        """Returns the invocation's part of a value, as it would lie in memory alone.

        Args:
            site: where the value arrived.
            value: what arrived there, for the batch.
        """
        ...

    def put(self, site: Site, value: Any, own: Any) -> None:
        """Fills the invocation's part of a value with another.

        Args:
            site: where the value arrived.
            value: a copy of what arrived there, for the batch, widened. It is written to.
            own: what the invocation puts there.
        """
        ...

    def widen(self, site: Site, value: Any) -> Any:
        """Returns a value in which each row has a part that can be written to.

        Args:
            site: where the value arrived.
            value: what arrived there, for the batch; it is returned itself if that is so already.
        """
        ...


class Steps(NamedTuple):
    """The steps of a generation.

    Attributes:
        path: the module whose calls are each a step of their own. That is the wrapped one, or what
            it wraps, which then stands for it.
        ended: the invocations that have ended before others of their pass, with how many steps
            each had. What runs the pass adds them while it runs.
    """

    path: str
    ended: dict[int, int]


class Pass(NamedTuple):
    """One call of the wrapped module, or of its `generate`.

    Attributes:
        call: makes the call and returns what it returns. What it hangs on modules for the time of
            the call asks whether they are called by it.
        cuts: how each invocation finds its own part of a value, by number; None for an invocation
            that has the pass for itself.
        may_stop: whether the pass may end as soon as nothing is wanted from it any more.
        steps: its steps, None if it is a forward.
        reads: the sites whose values it gives, if not all of its invocations' are of this pass.
        through: where it may not have ended before, though nobody waits for anything there.
        differentiates: whether autograd records it, where gradients are asked for at all.
    """

    call: Callable[[Deliver, Own], Any]
    cuts: Mapping[int, Cut | None]
    may_stop: bool
    steps: Steps | None = None
    reads: Collection[Address] | None = None
    through: Place | None = None
    differentiates: bool = True
