"""Which positions of a value an experiment looks at, and from which on it changes them.

Found from the recorded lines alone, and only where they say it plainly: by indices that are
numbers and slices. An index that is not understood counts as every position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from insitu.graph.node import Graph, Ref
from insitu.graph.operations import ATTRIBUTE, GETITEM, PUT, REPLACE, SETITEM, WRITE

_CLONES = frozenset(["Tensor.clone", "torch.clone"])


class Extents:
    """Looks up positions in the values of a graph.

    Values are `(rows, position, features)` here, or tuples that begin with such a value.

    Args:
        graph: the recorded experiment.
    """

    def __init__(self, graph: Graph) -> None:
        self._rows = graph.rows
        self._graph = graph
        users: dict[int, list[int]] = {}
        for index, row in enumerate(graph.rows):
            for source in row[3]:
                users.setdefault(source, []).append(index)
        self._users: Mapping[int, Sequence[int]] = users

    def read(
        self, index: int, length: int, part: object = None, axis: int = 1, axes: int = 3
    ) -> frozenset[int] | None:
        """Returns the positions of a value that are looked at, or None if that may be all.

        Args:
            index: the node of the value.
            length: how many positions there are.
            part: the entry of the value that is meant, if it is a structure: its other entries
                are not looked into.
            axis: the axis that counts positions.
            axes: how many axes there are.
        """
        found: set[int] = set()
        for user in self._users.get(index, ()):
            operation, args, _, inputs, _, _ = self._rows[user]
            # Any other operation may look at all of it.
            if operation not in (GETITEM, ATTRIBUTE) or len(inputs) != 1:
                return None
            key = args[1]
            if part is not None:
                if type(key) is not type(part) or (type(key) is int and key < 0):
                    return None  # counted from the end, it may be the same entry
                inner = self.read(user, length) if key == part else frozenset[int]()
            else:
                inner = positions(key, length, axis, axes)
                before = None if inner is not None else _taken_before(key, axis)
                if before is not None:  # such as a row: positions are looked for in what is left
                    inner = self.read(user, length, None, axis - before, axes - before)
            if inner is None:
                return None
            found.update(inner)
        return frozenset(found)

    def changed_from(self, read: int, length: int, part: object = None) -> int:
        """Returns the first position at which what stands at a site may differ from what arrived.

        Args:
            read: the node that reads the site.
            length: how many positions there are.
            part: the entry of what arrives that is meant, if it is a structure.
        """
        if read not in self._graph.writes:
            return length
        made = self._graph.writes[read]
        look = self._differs_from if part is None else self._of_structure
        return look(made, read, length, part)

    def _written_from(self, put: int, length: int, part: object) -> int:
        """The first position of its base that a write in place may write to."""
        _, (_, steps, name, *others), *_ = self._rows[put]
        keys: list[Any] = []
        for step, place, arguments, _ in steps:
            # Behind any other view it is not followed which positions are meant.
            if step != GETITEM.name or place != 0:
                break
            keys.append(arguments[0])
        if len(keys) == len(steps) and name == SETITEM.name:
            keys.append(others[0])
        if part is not None:
            if not keys or type(keys[0]) is not type(part):
                return 0
            if keys[0] != part:
                return 0 if isinstance(keys[0], int) and keys[0] < 0 else length
            keys.pop(0)
        found = positions(keys[0], length) if keys else None
        return 0 if found is None else min(found, default=length)

    def _differs_from(self, index: int, read: int, length: int, part: object) -> int:
        """The first position at which a value may differ from what arrived at a site."""
        operation, args, _, inputs, _, _ = self._rows[index]
        if operation is WRITE:
            value = args[1]
            if isinstance(value, tuple) and len(cast("tuple[Any, ...]", value)) == 1:
                (value,) = cast("tuple[Any]", value)
            return self._of(cast(object, value), read, length, part)
        if operation is REPLACE and part is not None:
            base, key, value = args
            same = type(base) is Ref and base.index == read and key == part
            return self._of(value, read, length, part) if same else 0
        if index == read:
            return length if part is None else 0
        if operation is GETITEM and part is not None and len(inputs) == 1:
            same = type(args[1]) is type(part) and args[1] == part
            whole = same and self._graph.original(inputs[0]) == read
            return self._of_structure(inputs[0], read, length, part) if whole else 0
        if operation is PUT:
            if part is not None and self._graph.original(index) == read:
                return 0  # all of a structure, where an entry is meant
            before = self._differs_from(inputs[0], read, length, part)
            return min(before, self._written_from(index, length, None))
        if operation.name in _CLONES and len(inputs) == 1:
            return self._differs_from(inputs[0], read, length, part)
        return 0

    def _of_structure(self, index: int, read: int, length: int, part: object) -> int:
        """The first position at which an entry of what stands at a site may differ."""
        operation, _, _, inputs, _, _ = self._rows[index]
        if index == read:
            return length
        if operation is WRITE:
            return self._differs_from(index, read, length, part)
        before = self._of_structure(inputs[0], read, length, part)
        return min(before, self._written_from(index, length, part))

    def _of(self, value: object, read: int, length: int, part: object) -> int:
        if type(value) is not Ref:
            return 0
        return self._differs_from(value.index, read, length, part)


def positions(key: Any, length: int, axis: int = 1, axes: int = 3) -> Sequence[int] | None:
    """Returns the positions that an index takes, or None if that cannot be told from it alone.

    Args:
        key: what stands between the brackets.
        length: how many positions there are.
        axis: the axis that counts them.
        axes: how many axes there are.
    """
    entries = cast("tuple[Any, ...]", key if isinstance(key, tuple) else (key,))
    # New axes and masks stand for another number of axes than one each.
    if any(entry is Ellipsis for entry in entries) and not _count_axes(entries):
        return None
    at = 0
    for entry in entries:
        if entry is Ellipsis:
            at += axes - (len(entries) - 1)
            if at > axis:
                return None
        elif isinstance(entry, bool) or not isinstance(entry, int | slice):
            return None
        elif at < axis:
            at += 1
        elif isinstance(entry, int):
            # Out of range: the run raises at the user's line.
            return [entry % length] if -length <= entry < length else None
        else:
            taken = cast("slice[Any, Any, Any]", entry)
            bounds = (taken.start, taken.stop, taken.step)
            # Bounds that the run computes are not known yet.
            if any(bound is not None and type(bound) is not int for bound in bounds):
                return None
            return range(length)[taken]
    return None


def _taken_before(key: Any, axis: int) -> int | None:
    """How many axes an index takes away before those that count positions, and reaches no further.

    None if that cannot be told from it alone.
    """
    entries = cast("tuple[Any, ...]", key if isinstance(key, tuple) else (key,))
    if len(entries) > axis or not all(type(entry) in (int, slice) for entry in entries):
        return None
    return sum(type(entry) is int for entry in entries)


def _count_axes(entries: Sequence[Any]) -> bool:
    """Whether each entry of an index stands for one axis, but for one that stands for the rest."""
    others = [entry for entry in entries if entry is not Ellipsis]
    plain = all(type(entry) in (int, slice) for entry in others)
    return plain and len(others) == len(entries) - 1
