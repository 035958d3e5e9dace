"""Writes in place while recording: each becomes a pure operation that makes its value anew.

A *base* is a value with memory of its own: what arrives at a site, or what an operation computed.
Its *views* are what was recorded from it by operations that return views. A write through a view
records one `put` of the base (`insitu.graph.put`), and the result is what the base stands for in
the lines that follow. A view from before is recorded again when a line uses it, from what the base
stands for then. Nodes from before keep what they had.

One write, step by step:

    x = h[3].ln_1.input    # node 0: read
    last = x[:, -1]        # node 1: getitem of 0; a view, so its base is 0
    before = last.save()   # node 2: save of 1
    last.mul_(2)           # node 3: put(0, steps=[getitem (:, -1)], "Tensor.mul_", 2)
    after = last.save()    # node 4: getitem of 3; node 5: save of 4

`written()` says at the end that the site that node 0 reads is given node 3. Nothing here knows of a
model. Torch's `functionalize` and JAX's `.at[].set` do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from insitu.graph.errors import OperationError
from insitu.graph.location import Location, Mark
from insitu.graph.node import NO_KWARGS, Ref, Row, ref
from insitu.graph.operations import (
    ATTRIBUTE,
    GETITEM,
    PUT,
    READ,
    REPLACE,
    SKIP,
    WRITE,
    Operation,
)
from insitu.graph.put import Step
from insitu.graph.structure import is_basic, map_structure

_VIEWS = frozenset(
    (
        *("adjoint", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_to", "chunk", "detach"),
        *("diagonal", "dsplit", "expand", "expand_as", "hsplit", "imag", "moveaxis", "movedim"),
        *("narrow", "permute", "pos", "positive", "real", "select", "split", "split_with_sizes"),
        *("squeeze", "swapaxes", "swapdims", "t", "tensor_split", "transpose", "unbind"),
        *("unflatten", "unfold", "unsqueeze", "view", "view_as", "view_as_complex"),
        *("view_as_real", "vsplit"),
    )
)
# Strides or the dtype decide whether these return a view or a copy.
_SOMETIMES_VIEWS = frozenset(
    (
        *("apply", "bfloat16", "bool", "byte", "char", "cond", "contiguous", "cpu", "cuda", "fold"),
        *("alpha_dropout", "dropout", "dropout1d", "dropout2d", "dropout3d"),  # in eval mode
        *("feature_alpha_dropout", "feature_dropout", "broadcast_tensors", "meshgrid"),
        *("conj", "conj_physical", "double", "einsum", "flatten", "float", "half", "int", "long"),
        *("ravel", "reshape", "reshape_as", "short", "sum_to_size", "to", "type_as"),
    )
)
_VIEW_ATTRIBUTES = frozenset(["H", "T", "imag", "mH", "mT", "real"])
# `Tensor.unfold` returns a view, `torch.nn.functional.unfold` and `fold` do not.
_NEVER_VIEWS = frozenset(["functional.unfold"])

_OWN, _OF_SEVERAL = -1, -2  # in the place of the node that a node is a view of

_HANDING_ON = (ATTRIBUTE, GETITEM, REPLACE, SKIP, WRITE)


class Views:
    """The bases and views of one recording, and what each base stands for now.

    A recording makes one at its first write in place. Before that, a value is what it was recorded
    as, and nothing has to be looked up.
    """

    def __init__(self, rows: list[Row], shares: Callable[[int], bool]) -> None:
        """Begins with what was recorded so far.

        Args:
            rows: the nodes of the recording, to which writes and renewed views are added.
            shares: whether the value of a node shares memory with what it was made of, where
                strides or dtypes decide: those of one invocation alone, never of a batch.
        """
        self._rows = rows
        self._shares = shares
        self._first: dict[int, int] = {}  # the base that a `put` has changed
        self._standing: dict[int, int] = {}  # what a base stands for now
        self._parents: dict[int, int] = {}  # of a node that is a view: what of; else -1
        self._renewed: dict[int, int] = {}  # a view from before, as it was last recorded again

    def written(self) -> Mapping[int, int]:
        """Returns the node that each site is given in the end, by the node that reads the site."""
        return {base: now for base, now in self._standing.items() if self._rows[base][0] is READ}

    def put(
        self,
        target: Ref,
        operation: Operation,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        mark: Mark,
    ) -> Ref:
        """Records a write in place.

        Args:
            target: what is written into.
            operation: what writes.
            args: its encoded arguments behind the first one.
            kwargs: its encoded keyword arguments.
            mark: the user's line.

        Returns:
            The target, which `resolved` gives as it is now.

        Raises:
            OperationError: if the target is a view of several values at once.
        """
        current = self.resolved(target).index
        steps: list[Step] = []
        inputs: list[int] = []
        base = current
        while (parent := self._parent(base)) >= 0:
            step, others = self._step(base, parent)
            steps.append(step)
            inputs.extend(others)
            base = parent
        if parent == _OF_SEVERAL:
            raise OperationError(
                f"`{self._rows[base][0].short}` gives views of several values at once, which are "
                "not written in place: write into the values themselves.",
                Location(*mark),
            )
        steps.reverse()
        map_structure(lambda leaf: inputs.append(leaf.index) if type(leaf) is Ref else None, args)
        map_structure(
            lambda leaf: inputs.append(leaf.index) if type(leaf) is Ref else None, dict(kwargs)
        )
        index = len(self._rows)
        encoded = (ref(base), tuple(steps), operation.name, *args)
        self._rows.append((PUT, encoded, kwargs, (base, *inputs), True, mark))
        first = self._first.get(base, base)
        self._first[index] = first
        self._standing[first] = index
        return ref(current)  # recorded again only if a line uses it

    def resolved(self, value: Ref) -> Ref:
        """Returns what a value stands for in a line that comes now.

        Args:
            value: the value, as it was when it was recorded or last used.
        """
        chain: list[int] = []  # the views on the way to a base, innermost first
        index = value.index
        while True:
            made = self._standing.get(self._first.get(index, index))
            if made is not None:
                break
            parent = self._parent(index)
            if parent == _OF_SEVERAL:
                made = self._again_of_several(index)
                break
            if parent < 0:
                return value  # nothing that it is a view of was written
            chain.append(index)
            index = parent
        if made == index:
            return value
        for view in reversed(chain):
            made = self._again(view, made)
        return ref(made)

    def is_same(self, value: Ref, other: Ref) -> bool:
        """Returns whether two values are the same part of the same base, so that assigning is idle.

        `x[0] += 1` writes `x[0]` in place and then assigns `x[0]` to itself.
        """
        one, two = self.resolved(value).index, self.resolved(other).index
        while one != two:
            parents = self._parent(one), self._parent(two)
            if min(parents) < 0 or self._step(one, parents[0]) != self._step(two, parents[1]):
                return False
            one, two = parents
        return True

    def _again(self, view: int, parent: int) -> int:
        """Records a view again, of what its parent stands for now, unless that was done."""
        before = self._renewed.get(view)
        if before is not None and self._parents[before] == parent:
            return before
        index = self._renewed[view] = self._moved(view, {self._parents[view]: parent})
        self._parents[index] = parent
        return index

    def _again_of_several(self, view: int) -> int:
        """Records views of several values again, if one of those was written."""
        latest = self._renewed.get(view, view)
        inputs = self._rows[view][3]
        moved = {source: self.resolved(ref(source)).index for source in inputs}
        if self._rows[latest][3] == tuple(map(moved.__getitem__, inputs)):
            return latest
        index = self._renewed[view] = self._moved(view, moved)
        self._parents[index] = _OF_SEVERAL
        return index

    def _moved(self, view: int, moved: Mapping[int, int]) -> int:
        """Records a node again with other inputs."""
        operation, args, kwargs, inputs, nested, mark = self._rows[view]

        def leaf(item: Any) -> Any:
            return ref(moved.get(item.index, item.index)) if type(item) is Ref else item

        args, kwargs = cast("tuple[Any, Any]", map_structure(leaf, (args, dict(kwargs))))
        inputs = tuple(moved.get(source, source) for source in inputs)
        self._rows.append((operation, args, kwargs or NO_KWARGS, inputs, nested, mark))
        return len(self._rows) - 1

    def _parent(self, index: int) -> int:
        """The node that a node is a view of; negative if it has memory of its own or of several."""
        known = self._parents.get(index)
        if known is None:
            known = self._parents[index] = self._found_parent(index)
        return known

    def _found_parent(self, index: int) -> int:
        operation, args, kwargs, inputs, _, _ = self._rows[index]
        if not inputs or operation.in_place or not self._is_view(index, operation, args):
            return _OWN
        if operation.short in ("broadcast_tensors", "meshgrid"):
            return _OF_SEVERAL
        held = (*args, *kwargs.values())
        return next((item.index for item in held if type(item) is Ref), _OF_SEVERAL)

    def _is_view(self, index: int, operation: Operation, args: tuple[Any, ...]) -> bool:
        if operation is ATTRIBUTE:
            return args[1] in _VIEW_ATTRIBUTES or self._shares(index)
        if operation is GETITEM:
            # A whole number that the run computes takes an entry, which is a view.
            return is_basic(args[1]) or (_is_computed(args[1]) and self._shares(index))
        name = operation.short
        if operation.name in _NEVER_VIEWS:
            return False
        return name in _VIEWS or (name in _SOMETIMES_VIEWS and self._shares(index))

    def _step(self, index: int, parent: int) -> tuple[Step, list[int]]:
        """A view as a step from its parent, and the other nodes that its geometry comes from."""
        operation, args, kwargs, inputs, _, _ = self._rows[index]
        others = [*inputs]
        others.remove(parent)
        for at, arg in enumerate(args):
            if type(arg) is Ref and arg.index == parent:
                return (operation.name, at, (*args[:at], *args[at + 1 :]), kwargs), others
        name = next(key for key, arg in kwargs.items() if type(arg) is Ref and arg.index == parent)
        kwargs = {key: arg for key, arg in kwargs.items() if key != name}
        return (operation.name, name, args, kwargs), others


def _is_computed(key: Any) -> bool:
    """Whether a key has values of the run in it, and nothing else that makes a copy."""
    parts = cast("tuple[Any, ...]", key) if isinstance(key, tuple) else (key,)
    return all(type(part) is Ref or is_basic(part) for part in parts)


def reusable(rows: Sequence[Row], needs: Sequence[int]) -> frozenset[int]:
    """Returns the `put` nodes that may write into the copy that an earlier `put` has made.

    That is so where nothing that runs later uses the earlier value or a view of it. Without it,
    1,024 writes at one site would copy 1,024 times. Where autograd records, a run copies anyway.

    Args:
        rows: the nodes.
        needs: the sites that each node waits for, as bits.
    """
    last = [-1] * len(rows)  # the last node that uses a value or what may be a view of it
    late = [0] * len(rows)  # all sites that the users wait for
    for index in range(len(rows) - 1, -1, -1):
        operation, _, _, inputs, _, _ = rows[index]
        for place, source in enumerate(inputs):
            if operation is PUT and not place:
                continue  # the write itself, which may be the one that goes on with the copy
            last[source] = max(last[source], index)
            late[source] |= needs[index]
            if operation is not PUT and _may_be_view(operation):
                last[source] = max(last[source], last[index])
                late[source] |= late[index]
    return frozenset(
        index
        for index, (operation, _, _, inputs, _, _) in enumerate(rows)
        if operation is PUT
        and rows[inputs[0]][0] is PUT
        and last[inputs[0]] < index
        and not late[inputs[0]] & ~needs[index]
    )


def _may_be_view(operation: Operation) -> bool:
    """Whether an operation may hand on the memory of its inputs, whatever the strides."""
    return operation in _HANDING_ON or operation.short in _VIEWS | _SOMETIMES_VIEWS
