"""Which call of a place, and which step, it is that passes now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from insitu.engine.places import Moment
from insitu.engine.plan import Readers
from insitu.graph.node import EVERY, Place


class Clock:
    """Tells calls and steps apart, where an experiment does.

    Args:
        readers: who waits for what, by moment. What has come is taken out.
        ended: the invocations that have no further steps, with how many they had. They are added
            as the pass runs.

    Attributes:
        step: the step that runs. What runs before the first forward, as an encoder does, is of
            the first step too.
        calls: how often each place was passed in it.
        most: how often each module was called in one step, at most.
    """

    def __init__(self, readers: Readers, ended: Mapping[int, int]) -> None:
        self.readers = readers
        self._ended = ended
        self.step = 0
        self._begun = False
        self.calls: Counter[Moment] = Counter()
        self.most: Counter[str] = Counter()
        self._came: set[Moment] = set()

    def next_step(self) -> bool:
        """Goes on to the next step, and returns whether there was one before."""
        if not self._begun:
            self._begun = True
            return False
        self.step += 1
        self.calls.clear()
        return True

    def take(self, first: Moment) -> list[tuple[int, int]]:
        """Returns who waits for what passes now at a place, given by its first moment."""
        path, kind, _, _ = first
        call = self.calls[first]
        self.calls[first] += 1
        self.most[path] = max(self.most[path], call + 1)
        every = (path, kind, call, EVERY)
        if every in self.readers:
            self._came.add(every)
        now = self.readers.pop((path, kind, call, self.step), ())
        if not self._ended:
            return [*self.readers.get(every, ()), *now]
        beyond = [(index, number) for index, number in now if number in self._ended]
        if beyond:  # it never comes
            self.readers[path, kind, call, self.step] = beyond
        found = (*self.readers.get(every, ()), *now)
        return [(index, number) for index, number in found if number not in self._ended]

    def steps(self, invocation: int) -> int:
        """Returns how many steps an invocation has had so far."""
        return self._ended.get(invocation, self.step + 1)

    def place(self, first: Moment) -> Place:
        """Returns the place that was passed last, given by its first moment."""
        return (first[0], first[1], self.calls[first] - 1)

    def is_done(self, first: Moment) -> bool:
        """Returns whether nobody waits for anything more at a place."""
        return not any(moment[:2] == first[:2] for moment in self.readers)

    def missing(self) -> list[int]:
        """Returns the nodes that read what never came."""
        return [
            index
            for moment, found in self.readers.items()
            if moment not in self._came
            for index, _ in found
        ]
