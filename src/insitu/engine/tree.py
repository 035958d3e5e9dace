"""The tree of a module as it was when it was last looked at, and whether it has changed since.

Users add adapters to a module that is wrapped, and replace, append, move and remove its parts.
The facts about a module hold for one tree, so each block begins by comparing. A plan holds for the
part of it through which calls lead to the sites of a block: its `CallPath` is compared before the
plan is used again, and after each run. The module itself is untouched: it has no hook that tells of
changes.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import repeat
from operator import attrgetter, contains, is_, itemgetter
from typing import Any

import torch
from torch import nn

from insitu.engine.eager import is_compiled
from insitu.engine.interpose import CALL
from insitu.graph.changes import Changes, restore

Tables = list[dict[str, nn.Module | None]]

_TRAINING, _FORWARD = itemgetter("training"), attrgetter("forward")
_GET = dict[str, Any].get


@dataclass(slots=True, eq=False)
class Watched:
    """Tables of children, compared with what they held: `watched.now != watched.then`.

    Python compares both lists in C, each child by its identity: 15 ns a child.

    Attributes:
        now: the modules' own tables.
        then: copies of them.
        called: the modules whose calls lead on, those at the end of a way included.
    """

    now: Tables
    then: Tables
    called: list[nn.Module]


class Looks:
    """What a block that is open has looked at: once in a block will do.

    Attributes:
        tree: whether it has looked at the tree: None if not yet, False if no block is open.
        weights: whether it has looked at dtypes and shapes of weights.
    """

    __slots__ = ("tree", "weights")

    def __init__(self) -> None:
        self.tree: bool | None = False
        self.weights = False


class Tree:
    """The tree of a module when it was last looked at.

    Args:
        root: the module.

    Attributes:
        root: the module.
        modules: all modules of the tree by path, shared ones under each of their paths.
        parts: all modules, each once.
        spine: the children of the root, and those on the way to its lists of modules: it differs if
            a head or a list is replaced, or an item of a list.
        exchanges: whether a forward is known to exchange some of the modules.
    """

    exchanges = False

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        modules: dict[str, nn.Module] = dict(root.named_modules(remove_duplicate=False))  # pyright: ignore[reportUnknownArgumentType]
        self.modules = modules
        self.parts = list(dict.fromkeys(self.modules.values()))
        self._all = _watched(self.parts)
        # Most have no children: whether any has got some is asked in a third of the time.
        self._filled = _watched([part for part in self.parts if part._modules])
        self._bare = [part._modules for part in self.parts if not part._modules]
        self._states = [vars(part) for part in self.parts]
        self._tables = self._own_tables()
        self._classes = [*map(type, self.parts)]
        self._kinds = [*dict.fromkeys(self._classes[1:])]
        self._forwards = self._all_forwards()
        self._switches = _switches(self._states)
        self._set = [*map(_GET, *self._switches)]
        self._sizes = [*map(len, self._states)]
        self.spine = self._spine()

    def has_changed(self) -> bool:
        """Returns whether any module has other children than it had."""
        return self._filled.now != self._filled.then or any(self._bare)

    def differs(self) -> bool:
        """Returns the same, and whether any has become another in itself: as of `runs_otherwise`.

        Also whether a table of children was exchanged as a whole. It takes ten times as long.
        """
        return self.has_changed() or self._tables != self._own_tables() or self.runs_otherwise()

    def runs_otherwise(self) -> bool:
        """Returns whether any module has another class, `forward` or switch than it had.

        A `forward` may be the class's or the instance's, but for that of the root's class: a
        `CallPath` compares it. A switch is a bool such as `is_causal`, or one of a config, such as
        `output_hidden_states`.
        """
        # All in C: each block of several prompts asks.
        if self._classes != [*map(type, self.parts)] or self._forwards != self._all_forwards():
            return True
        if not all(map(is_, self._set, map(_GET, *self._switches))):
            return True
        sizes = [*map(len, self._states)]
        if sizes == self._sizes:
            return False
        if len(self._set) != len(_switches(self._states)[0]):
            return True
        self._sizes = sizes  # what was added is no switch
        return False

    def in_training(self) -> list[nn.Module]:
        """Returns the modules in training mode."""
        try:
            if not any(map(_TRAINING, self._states)):  # in C: each block of several prompts asks
                return []
        except KeyError:  # a scripted module keeps it elsewhere
            pass
        return [part for part in self.parts if part.training]

    def _own_tables(self) -> list[int]:
        return [id(state["_modules"]) for state in self._states]

    def _all_forwards(self) -> list[Any]:
        found = [*map(_FORWARD, self._kinds)]
        if any(map(contains, self._states, repeat("forward"))):
            found += [state["forward"] for state in self._states if "forward" in state]
        return found

    def on_the_way(self, paths: Iterable[str]) -> Watched:
        """Returns the tables of children through which some paths lead, to be compared later.

        Args:
            paths: paths of modules in the tree.
        """
        found, ends = {"": self.root}, list[nn.Module]()
        for path in paths:
            if path in self.modules:
                ends.append(self.modules[path])
            while path:
                path = path.rpartition(".")[0]
                if path in found:
                    break
                found[path] = self.modules[path]
        return _watched(found.values(), ends)

    def weights(self) -> tuple[list[torch.dtype], list[torch.Size]]:
        """Returns the dtypes and shapes of all parameters and buffers, in the order of the tree."""
        both = [(state["_parameters"], state["_buffers"]) for state in self._states]
        tables = [table for pair in both for table in pair if table]  # most are empty
        tensors = [tensor for table in tables for tensor in table.values() if tensor is not None]
        return [tensor.dtype for tensor in tensors], [tensor.shape for tensor in tensors]

    @cached_property
    def weight_bytes(self) -> int:
        """The memory of the weights and buffers, in the dtypes that they have, or will have."""
        # By identity: tied weights are there once.
        tensors = {id(one): one for one in self.root.parameters()}
        tensors |= {id(one): one for one in self.root.buffers()}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    @cached_property
    def blocks(self) -> list[str]:
        """The paths of the model's blocks: as of `blocks_in`."""
        return blocks_in(self.modules)

    def keep(self, changes: Changes) -> None:
        """Lets what a forward changes of the tree be undone.

        Some modules exchange their own children in a forward, and from then on compute something
        else. Attributes by which they remember that are set back too.

        Args:
            changes: notes it.
        """
        # Some models exchange modules in their first long forward. A run of the library's own must
        # not cause that.
        changes.afterwards(partial(self._put_back, [dict(state) for state in self._states]))

    def note_exchange(self) -> None:
        """Notes it if a forward has exchanged modules since. It may be undone after."""
        self.exchanges = self.exchanges or self.has_changed()

    def _put_back(self, states: list[dict[str, Any]]) -> None:
        if self.has_changed():
            self.exchanges = True
            for state, before in zip(self._states, states, strict=True):
                restore(state, before)
            # Last: by these it is known whether anything is left to be done.
            for now, then in zip(self._all.now, self._all.then, strict=True):
                restore(now, then)

    def _spine(self) -> Watched:
        return self.on_the_way([f"{path}." for path in outermost_lists(self.modules)])


def outermost_lists(modules: Mapping[str, nn.Module]) -> list[str]:
    """Returns the paths of a model's lists of modules that are in no other list.

    Args:
        modules: the model's tree, by path.
    """
    lists = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    paths: list[str] = []
    for path, part in modules.items():
        inside = any(not outer or path.startswith(f"{outer}.") for outer in paths)
        if isinstance(part, lists) and not inside:
            paths.append(path)
    return paths


def blocks_in(modules: Mapping[str, nn.Module]) -> list[str]:
    """Returns the paths of a model's blocks: of the modules in its lists, or of all if it has none.

    Args:
        modules: the model's tree, by path.
    """
    lists = outermost_lists(modules)
    found = [path for path in modules if path.rpartition(".")[0] in lists and path]
    return found or [path for path in modules if path]


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
        *("_compiled", "_entry", "_forward", "_modules", "_own", "_root", "_sizes"),
        *("_states", "now", "then"),
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
        # Tables are compared in C, and dictionaries that are the same object at once.
        if self.now != self.then:
            return False
        # Compiling a module, or giving it a forward of its own, adds an attribute. Comparing all
        # entries took 0.1 us a module.
        same = [*map(len, self._states)] == self._sizes
        same = same and type(self._root).forward is self._forward
        for state, forward in self._own:
            same = same and state.get("forward") is forward
        if same:
            return True
        if self._entry != self._entered() or self._compiled != is_compiled(self._modules):
            return False
        self._remember()
        return True

    def _remember(self) -> None:
        self._sizes = [*map(len, self._states)]
        self._own = [(state, state["forward"]) for state in self._states if "forward" in state]

    def _entered(self) -> tuple[object, ...]:
        """What a call of the root enters."""
        state = self._states[0]
        return (
            state.get(CALL),
            state.get("forward"),
            type(self._root).forward,
        )


def _watched(parts: Iterable[nn.Module], ends: Iterable[nn.Module] = ()) -> Watched:
    now = [part._modules for part in parts]
    called = list(dict.fromkeys([*parts, *ends]))
    return Watched(now, [dict(table) for table in now], called)


def _switches(states: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The tables and names of bools of modules and their configs: some say what a token sees.

    Others say what a forward returns. Training mode is asked for by itself. Numbers are left out,
    because some modules count calls.
    """
    held: list[Any] = [state["config"] for state in states if "config" in state]
    configs: dict[int, dict[str, Any]] = {
        id(one): vars(one) for one in held if hasattr(one, "__dict__")
    }
    own = [(state, name) for state in states for name in state if not name.startswith("_")]
    own += [(config, name) for config in configs.values() for name in config]
    found = [
        (state, name) for state, name in own if type(state[name]) is bool and name != "training"
    ]
    return [state for state, _ in found], [name for _, name in found]
