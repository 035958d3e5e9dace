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

The site that node 0 reads is given node 3: `Graph.writes` says so. An assignment makes a new base
for its site: only the entries that it leaves alone are views from before. Nothing here knows of a
model. Torch's `functionalize` and JAX's `.at[].set` do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from insitu.graph.errors import OperationError
from insitu.graph.expression import expression
from insitu.graph.handing_over import HandingOver
from insitu.graph.location import Location, Mark, here
from insitu.graph.node import Graph, Ref, ref, rewired
from insitu.graph.operations import ATTRIBUTE, GETITEM, PUT, REPLACE, WRITE, Operation
from insitu.graph.put import WHOLE, Step, is_entry
from insitu.graph.steps_to import held_by, step_of
from insitu.graph.view_operations import is_view

_OWN, _OF_SEVERAL = -1, -2  # in the place of the node that a node is a view of


class Located(NamedTuple):
    """Where a value lies.

    Attributes:
        value: its node.
        base: the value with memory of its own that it is, or is a view of.
        steps: the views that lead from there to it.
        inputs: the nodes that their geometry comes from.
        nested: whether the steps hold anything that is known in the run only.
    """

    value: int
    base: int
    steps: tuple[Step, ...]
    inputs: Sequence[int]
    nested: bool


class Views:
    """The bases and views of one recording, and what each base stands for now.

    A recording makes one at its first write in place. Before that, a value is what it was recorded
    as, and nothing has to be looked up.
    """

    def __init__(self, graph: Graph, shares: Callable[[int], bool | None]) -> None:
        """Begins with what was recorded so far.

        Args:
            graph: the recorded experiment, to which writes and renewed views are added.
            shares: whether the value of a node shares memory with what it was made of, where
                strides or dtypes decide: those of one invocation alone, never of a batch. None if
                that is not known before the run. It is asked of views of what was written only.
        """
        self._graph = graph
        self._rows = graph.rows
        self._shares = shares
        self._first: dict[int, int] = {}  # the base that a `put` has changed
        self._standing: dict[int, int] = {}  # what a base stands for now
        self._parents: dict[int, int] = {}  # of a node that is a view: what of; else -1
        self._unsure: set[int] = set()  # of which strides or dtypes decide, and nobody has asked
        self._renewed: dict[int, int] = {}  # a view from before, as it was last recorded again
        self._followed: dict[int, tuple[int, int | str]] = {}  # by an assignment of one entry
        self._origins: dict[int, int] = {}  # what `_origin` has found
        self._overtaken: dict[int, str] = {}  # of every step, and written in a later line of one
        self._model = HandingOver(graph, self._first)
        if graph.writes:
            self._assign_from_before()

    def _assign_from_before(self) -> None:
        """Notes what was assigned before the first write in place."""
        latest: dict[int, int] = {}
        for index, (operation, args, *_) in enumerate(self._rows):
            if operation is WRITE:
                read = self._graph.original(index)
                self.assign(latest.get(read, read), index, args[1])
                latest[read] = index

    def assign(self, before: int, write: int, value: Any) -> None:
        """Notes that something was assigned to a site.

        Args:
            before: the base that stood there.
            write: the node that makes what stands there now.
            value: what it puts there: a `Ref`, or something else.
        """
        before = self._first.get(before, before)
        if type(value) is Ref and self._rows[value.index][0] is REPLACE:
            _, (_, key, _), _, inputs, _, _ = self._rows[value.index]
            if self._origin(inputs[0]) == self._origin(before):  # the others are what they were
                self._followed[before] = write, key
                if before in self._standing:
                    self._standing[write] = write

    def located(self, target: Ref, mark: Mark) -> Located:
        """Returns where a value lies: in which base, and which views lead to it.

        Args:
            target: the value, which is about to be written into.
            mark: the user's line.

        Raises:
            OperationError: if it is a view of several values at once.
        """
        current = base = self.resolved(target).index
        steps: list[Step] = []
        inputs: list[int] = []
        nested = False
        while (parent := self._sure_parent(base)) >= 0:
            step, others = step_of(self._rows[base])
            nested = nested or self._rows[base][4]
            steps.append(step)
            self._unsure.discard(base)  # if it is none, the run says that the write would be lost
            inputs.extend(others)
            base = parent
        if parent == _OF_SEVERAL:
            raise OperationError(
                f"`{self._rows[base][0].short}` gives views of several values at once, which are "
                "not written in place: write into the values themselves.",
                Location(*mark),
            )
        steps.reverse()  # they were found innermost first
        nested = nested or bool(inputs)
        return Located(current, self._first.get(base, base), tuple(steps), inputs, nested)

    def put(
        self,
        place: Located,
        operation: Operation,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        inputs: Sequence[int],
        nested: bool,
        mark: Mark,
        writer: int | None = None,
    ) -> Ref:
        """Records a write in place.

        Args:
            place: the part that is written into.
            operation: what writes.
            args: its encoded arguments behind the first one.
            kwargs: its encoded keyword arguments.
            inputs: the nodes that these refer to.
            nested: whether anything but an argument is known in the run only.
            mark: the user's line.
            writer: the invocation in which that stands; None for whichever it writes into.

        Returns:
            What it has written into, which `resolved` gives as it is now.
        """
        given = self._model.place(place.base, place.steps, writer, mark)
        base = self._standing.get(place.base, place.base)
        index = len(self._rows)
        encoded = (ref(base), place.steps, operation.name, *args)
        sources = (base, *place.inputs, *inputs)
        self._rows.append((PUT, encoded, kwargs, sources, nested, mark))
        self._first[index] = place.base
        self._standing[place.base] = index
        if given is not None:
            table, read = given
            table[read] = index
        return ref(place.value)  # recorded again only if a line uses it

    def overtake(self, base: int, reason: str) -> None:
        """Notes that a value of every step was written in a single one, so no line may use it.

        Args:
            base: the value, which has memory of its own.
            reason: what a line is told that uses it, or a view of it.
        """
        self._overtaken[base] = reason

    def _check_overtaken(self, index: int) -> None:
        while index >= 0:
            reason = self._overtaken.get(self._first.get(index, index))
            if reason is not None:
                raise OperationError(reason, here())
            index = self._parent(index)

    def first(self, index: int) -> int:
        """Returns the base that a write in place has changed; another node as it is."""
        return self._first.get(index, index)

    def base(self, value: Ref) -> int:
        """Returns the value with memory of its own that a value is, or is a view of."""
        index = self.resolved(value).index
        while (parent := self._sure_parent(index)) >= 0:
            index = parent
        return self._first.get(index, index)

    def chain(self, value: Ref) -> list[int]:
        """Returns the nodes from a value to the base that it is a view of, or may be a view of."""
        index = self.resolved(value).index
        found = [index]
        while (index := self._parent(index)) >= 0:
            found.append(index)
        return found

    def resolved(self, value: Ref) -> Ref:
        """Returns what a value stands for in a line that comes now.

        Args:
            value: the value, as it was when it was recorded or last used.
        """
        if not self._standing:
            return value
        if self._overtaken:
            self._check_overtaken(value.index)
        chain: list[int] = []  # the views on the way to a base, innermost first
        index = value.index
        while True:
            made = self._standing.get(self._first.get(index, index))
            if made is not None:
                break
            if not self._rows[index][3]:
                return value  # what arrives at a site that was not written in place
            parent = self._parent(index)
            if parent == _OF_SEVERAL:
                if self._is_own(index):
                    return value
                made = self._again_of_several(index)
                break
            if parent < 0:
                return value  # nothing that it is a view of was written
            chain.append(index)
            index = parent
        if made == index and (not chain or self._parents[chain[-1]] == index):
            return value
        if any(map(self._is_own, chain)):
            return value
        for view in reversed(chain):
            made = self._again(view, made)
        return ref(made)

    def holds(self, source: Ref, value: Ref, key: Any) -> bool:
        """Returns whether a value is what stands there already, or a part of it.

        Args:
            source: what stands there.
            value: the value.
            key: which part, or `WHOLE`.
        """
        if self.borrows(source):
            return False
        if key is WHOLE:
            return self._is_same(value, source)
        index = value.index
        operation, args, *_ = self._rows[index]
        if operation not in (ATTRIBUTE, GETITEM) or not is_entry(args[1], key):
            return False
        of = args[0].index if type(args[0]) is Ref else -1
        if self._first.get(of, of) == self._first.get(source.index, source.index):
            return True  # nothing has to be recorded again to see it
        try:
            index = self.resolved(value).index
            return self._parent(index) >= 0 and self._is_same(ref(self._parent(index)), source)
        except OperationError:  # not known: it is assigned, and a write in place says why not
            return False

    def borrows(self, source: Ref) -> bool:
        """Returns whether another invocation has written into what a value is, or is a part of."""
        return self._model.borrows and self._model.is_borrowed(self.base(source))

    def check_entry(self, source: Ref, key: Any, mark: Mark) -> None:
        """Raises if an entry of a structure cannot be assigned: see `HandingOver`."""
        self._model.check_entry(self.base(source), key, mark)

    def _origin(self, index: int) -> int:
        """The value from before all writes that a node comes after."""
        path: list[int] = []
        while index not in self._origins and self._rows[index][0] in (PUT, REPLACE, WRITE):
            path.append(index)
            index = self._rows[index][3][0]
        index = self._origins.get(index, index)
        self._origins.update(dict.fromkeys(path, index))  # else each write would walk all of it
        return index

    def _is_same(self, value: Ref, other: Ref) -> bool:
        """Whether two values are the same part of the same base."""
        one, two = self.resolved(value).index, self.resolved(other).index
        while one != two:
            parents = self._parent(one), self._parent(two)
            if min(parents) < 0 or step_of(self._rows[one]) != step_of(self._rows[two]):
                return False
            one, two = parents
        return True

    def _again(self, view: int, parent: int) -> int:
        """Records a view again, of what its parent stands for now, unless that was done."""
        before = self._renewed.get(view)
        if before is not None and self._parents[before] == parent:
            return before
        held = next(iter(held_by(self._rows[view])))
        row = rewired(self._rows[view], {held: parent})
        index = self._renewed[view] = self._graph.add_like(view, row)
        self._parents[index] = parent
        return index

    def _again_of_several(self, view: int) -> int:
        """Records views of several values again, if one of those was written."""
        latest = self._renewed.get(view, view)
        inputs = self._rows[view][3]
        moved = {source: self.resolved(ref(source)).index for source in inputs}
        if self._rows[latest][3] == tuple(map(moved.__getitem__, inputs)):
            return latest
        row = rewired(self._rows[view], moved)
        index = self._renewed[view] = self._graph.add_like(view, row)
        self._parents[index] = _OF_SEVERAL
        return index

    def _sure_parent(self, index: int) -> int:
        """The node that a node is a view of, as far as that is known; negative as of `_parent`."""
        parent = self._parent(index)
        if index in self._unsure and self._shares(index) is False:
            parent = self._parents[index] = _OWN
        return parent

    def _is_own(self, index: int) -> bool:
        """Whether what may be a view has memory of its own, as strides and dtypes decide.

        Raises:
            OperationError: if that is not known.
        """
        if index in self._unsure:
            shares = self._shares(index)
            if shares is None:
                raise OperationError(
                    f"Something is written in place, and whether `{expression(self._graph, index)}`"
                    " sees that is not known before the run: write `.clone()` behind it, or use "
                    "`.view`.",
                    here(),
                )
            self._unsure.remove(index)
            if not shares:
                self._parents[index] = _OWN
        return self._parents[index] == _OWN

    def _parent(self, index: int) -> int:
        """The node that a node is or may be a view of; negative if it is none, or of several."""
        known = self._parents.get(index)
        if known is None:
            known = self._parents[index] = self._found_parent(index)
        while (after := self._followed.get(self._first.get(known, known))) is not None:
            write, key = after
            if self._is_entry_at(index, key):
                break  # what stood there before the assignment
            known = write
        return known

    def _is_entry_at(self, index: int, key: int | str) -> bool:
        """Whether a node takes that entry of a structure which has been assigned."""
        operation, args, *_ = self._rows[index]
        if operation not in (ATTRIBUTE, GETITEM):
            return True
        own: Any = args[1]
        alike = type(own) is type(key) and (isinstance(own, str) or (own >= 0) is (int(key) >= 0))
        if not alike:
            raise OperationError(
                f"It is not known whether the entries {own!r} and {key!r} of a value are the same "
                "one: write both in the same way, counted from the front.",
                here(),
            )
        return own == key

    def _found_parent(self, index: int) -> int:
        operation, args, _, inputs, _, _ = self._rows[index]
        view = is_view(operation, args) if inputs else False
        if view is False:
            return _OWN
        if view is None:
            self._unsure.add(index)
            if operation.short in ("broadcast_tensors", "meshgrid"):
                return _OF_SEVERAL
        first = args[0] if args else None
        return (
            first.index
            if type(first) is Ref
            else next(iter(held_by(self._rows[index])), _OF_SEVERAL)
        )
