"""Which positions of a value an experiment looks at, and from which on it changes them.

Found from the recorded lines alone, and only where they say it plainly: by indices that are
numbers and slices. Whatever is not understood counts as every position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from insitu.graph.node import Graph, Ref
from insitu.graph.operations import ATTRIBUTE, GETITEM, REPLACE, SETITEM, WRITE

_CLONES = frozenset(["Tensor.clone", "torch.clone"])


class Extents:
    """Looks up positions in the values of a graph.

    Values are `(rows, position, features)` here, or tuples that begin with such a value.

    Args:
        graph: what is to be done.
    """

    def __init__(self, graph: Graph) -> None:
        self._rows = graph.rows
        self._graph = graph
        users: dict[int, list[int]] = {}
        for index, row in enumerate(graph.rows):
            for source in row[3]:
                users.setdefault(source, []).append(index)
        self._users: Mapping[int, Sequence[int]] = users
        self._mutations: dict[int, list[int]] | None = None

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
        if self._mutations is None:
            self._mutations = self._find_mutations()
        first = self._mutated_from(read, length, part)
        if read in self._graph.writes:
            first = min(first, self._differs_from(self._graph.writes[read], read, length, part))
        return first

    def _find_mutations(self) -> dict[int, list[int]]:
        """The writes in place to the memory of each value, as far as it can be followed."""
        found: dict[int, list[int]] = {}
        for mutation in self._graph.mutations:
            pending = [self._rows[mutation][3][0]]
            seen: set[int] = set()
            while pending:
                index = pending.pop()
                if index in seen:
                    continue
                seen.add(index)
                found.setdefault(index, []).append(mutation)
                operation, _, _, inputs, _, _ = self._rows[index]
                if operation.name not in _CLONES:
                    pending.extend(inputs[:1] if operation.in_place else inputs)
        return found

    def _mutated_from(self, index: int, length: int, part: object) -> int:
        """The first position at which the memory of a value may be written to."""
        first = length
        assert self._mutations is not None
        for mutation in self._mutations.get(index, ()):
            first = min(first, self._written_from(mutation, index, length, part))
        return first

    def _written_from(self, mutation: int, root: int, length: int, part: object) -> int:
        """The first position of a value that a write in place may write to."""
        operation, args, _, inputs, _, _ = self._rows[mutation]
        keys: list[Any] = []
        if operation is SETITEM:
            keys.append(args[1])
        index = inputs[0]
        while index != root:
            operation, args, _, inputs, _, _ = self._rows[index]
            if operation.in_place:
                index = inputs[0]
            elif operation is GETITEM and len(inputs) == 1:
                keys.append(args[1])
                index = inputs[0]
            else:
                return 0
        if part is not None:
            if not keys or type(keys[-1]) is not type(part) or keys[-1] != part:
                return 0
            keys.pop()
        if not keys:
            return 0
        found = positions(keys[-1], length)
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
        if operation is GETITEM and part is not None and inputs == (read,):
            return length if type(args[1]) is type(part) and args[1] == part else 0
        if operation.in_place:
            return self._differs_from(inputs[0], read, length, part)
        if operation.name in _CLONES and len(inputs) == 1:
            source = self._differs_from(inputs[0], read, length, part)
            return min(source, self._mutated_from(index, length, None))
        return 0

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
            return [entry % length] if -length <= entry < length else None
        else:
            taken = cast("slice[Any, Any, Any]", entry)
            bounds = (taken.start, taken.stop, taken.step)
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
