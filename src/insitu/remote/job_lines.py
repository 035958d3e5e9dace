"""The user's lines of a job: where an error of the server's is raised here.

A line travels without the folders of its file. It is found again by the file's name, its number
and its text; by less than that only where it can be no other.
"""

from __future__ import annotations

from collections.abc import Iterator

from insitu.engine.job import Job
from insitu.engine.limits import rows_of
from insitu.graph.location import Location, Mark
from insitu.graph.wire_message import MOST_TEXT, file_name, printable
from insitu.remote.problems import Line


class JobLines:
    """Finds where lines of a job were written.

    Args:
        job: the job; None for one that is not known here.
    """

    def __init__(self, job: Job | None) -> None:
        marks = {} if job is None else {(id(mark[0]), mark[1]): mark for mark in _marks(job)}
        self._marks = [*marks.values()]
        self._known: dict[tuple[str, int], list[Location]] | None = None

    def __call__(self, line: Line) -> Location | None:
        """Returns where a line was written, None if it is none of the job's.

        Args:
            line: the line as a server has it; its text is "" if that does not keep texts.
        """
        found = self._by_number().get((line.file, line.line), [])
        text = line.text[:MOST_TEXT]
        same = [one for one in found if printable(one.text)[:MOST_TEXT] == text]
        places = same or (found if not text else [])
        one_file = len({place.file for place in places}) == 1
        return places[0] if one_file else None

    def _by_number(self) -> dict[tuple[str, int], list[Location]]:
        """All lines, by the name of their file and their number."""
        if self._known is None:
            self._known = {}
            for mark in self._marks:
                location = Location(*mark)
                key = file_name(location.file), location.line
                self._known.setdefault(key, []).append(location)
        return self._known


def _marks(job: Job) -> Iterator[Mark]:
    for block in job.blocks:
        for row in rows_of(block.graph):
            yield row[5]
        yield from block.graph.stops.values()
        yield from (prompt.mark for prompt in block.prompts if prompt.mark is not None)
        if block.demanded is not None:
            yield block.demanded.mark
