"""The modules through which calls lead to the sites of a block, and whether they still do so.

A plan is kept for later blocks. Before it is used again, and after each run, what it was made for
is compared with what is there: the tables of children on the way, and what calls of them enter.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import Any

from insitu.engine.eager import is_compiled
from insitu.engine.interpose import CALL
from insitu.engine.tree import Watched


class CallPath:
    """The modules on the way to some sites, as they were when it was made.

    `Module.compile` and `module.forward = ...` give a module an attribute that it did not have, so
    numbers of attributes are compared: 15 ns a module. A module may also keep something else in an
    attribute of its own; only then are all looked at one by one.

    Args:
        watched: their tables of children, and the modules. The first is the root, which is
            compared closely.

    Attributes:
        now: the tables.
        then: copies of them.
    """

    __slots__ = (
        *("_compiled", "_entry", "_forward", "_modules", "_own", "_root", "_sizes", "_states"),
        *("now", "then"),
    )

    def __init__(self, watched: Watched) -> None:
        self.now, self.then, self._modules = watched.now, watched.then, watched.called
        self._states = [vars(module) for module in self._modules]
        self._root = self._modules[0]
        self._forward = type(self._root).forward
        self._entry = self._entered()
        self._compiled = is_compiled(self._modules)
        self._remember()

    def still_holds(self) -> bool:
        """Returns whether calls lead on through the same modules, and enter what they entered."""
        if self.now != self.then:
            return False
        if (
            [*map(len, self._states)] == self._sizes
            and type(self._root).forward is self._forward
            and (not self._own or self._own == self._forwards())
        ):
            return True
        if self._entry != self._entered() or self._compiled != is_compiled(self._modules):
            return False
        self._remember()
        return True

    def _remember(self) -> None:
        self._sizes = [*map(len, self._states)]
        self._own = self._forwards()

    def _forwards(self) -> list[Any]:
        return [state["forward"] for state in self._states if "forward" in state]

    def _entered(self) -> tuple[object, ...]:
        """What a call of the root enters."""
        state = self._states[0]
        return (
            state.get(CALL),
            state.get("forward"),
            type(self._root).forward,
        )
