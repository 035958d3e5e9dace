"""What programs mean: eager PyTorch in plain hooks, with nothing of Insitu's runtime.

The rules, in the words of the design: all reads of an invocation come from one run with all writes
in force; a value arrives at its site carrying every write at sites that executed before; among
operations on values that have arrived, lines mean what they would mean in order on torch tensors.

They are applied in three stages. `observe` runs the model alone and finds when each site comes and
which sites are the same memory. `arrange` finds from that when each line can run, and which writes
come too late. `execute` runs the model again and, in each hook, the lines whose moment has come.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.fidelity.programs import (
    Augment,
    Change,
    Compute,
    Line,
    Place,
    Program,
    Read,
    Replace,
    Save,
    Site,
    Subject,
    View,
    function_of,
)

Moment = tuple[int, int]
"""When: in which pass, and at which of its places."""

Memory = tuple[Any, ...]
"""Which piece of memory: of an invocation a storage and its version, or that of a line."""

Schedule = Sequence[Sequence[int]]
"""Which invocations run in each pass; those of one pass meet at every place."""


class SilentError(Exception):
    """The design does not say what a program means."""


class TooLateError(Exception):
    """A write is to change what the model has gone on from, however its passes are ordered."""


def expected(subject: Subject, program: Program) -> list[torch.Tensor]:
    """Returns what a program saves.

    Raises:
        TooLateError: if it must be refused.
        SilentError: if the design leaves open what it means.
    """
    lines = list(_plain(program.lines))
    seen = _observed(subject, program, lines)
    for schedule in _schedules(subject, program, lines, seen):
        arrangement = arrange(lines, seen, schedule)
        if not arrangement.late:
            return _Execution(subject, program, lines, seen, arrangement).run(schedule)
    raise TooLateError


def touched(subject: Subject, program: Program) -> list[frozenset[Memory]]:
    """Returns the memory that each line of a program reads or writes."""
    lines = list(_plain(program.lines))
    seen = _observed(subject, program, lines)
    arrangement = arrange(lines, seen, [range(len(seen))])
    pieces = iter(arrangement.touched)
    return [frozenset().union(*(next(pieces) for _ in _plain([line]))) for line in program.lines]


def _plain(lines: Sequence[Line]) -> Iterator[Line]:
    """Takes augmented assignments apart: a read, and a write in place into it."""
    for number, line in enumerate(lines):
        if isinstance(line, Augment):
            name = f"augmented_{number}"
            yield Read(line.invocation, name, line.site)
            yield Change(line.invocation, line.operation, (name, *line.operands))
        else:
            yield line


def _observed(subject: Subject, program: Program, lines: Sequence[Line]) -> list[Seen]:
    """What is seen of each invocation, at the places that any of them uses."""
    named = [line for line in lines if isinstance(line, Read | Replace)]
    places = {line.site.place for line in named}
    replaced = {line.site for line in named if isinstance(line, Replace)}
    sites = {line.site for line in named}
    found: list[Seen] = []
    for number, prompt in enumerate(program.prompts):
        there = [Site(number, site.place, site.part) for site in sites]
        own = {site: site in replaced for site in there}
        found.append(observe(subject, prompt, places, own))
    return found


def _schedules(
    subject: Subject, program: Program, lines: Sequence[Line], seen: Sequence[Seen]
) -> Iterator[Schedule]:
    """The ways in which the invocations of a block may run."""
    count = len(program.prompts)
    apart = _lie_apart(subject, program, lines) or _break_aliases(lines, seen)
    for schedule in _divided(tuple(range(count))):
        if all(len(members) == 1 for members in schedule) or (subject.together and not apart):
            yield schedule


def _divided(numbers: tuple[int, ...]) -> Iterator[Schedule]:
    """All ways to divide numbers into passes, one after the other; the largest first."""
    if not numbers:
        yield []
    for size in range(len(numbers), 0, -1):
        for first in itertools.combinations(numbers, size):
            rest = tuple(number for number in numbers if number not in first)
            yield from ([first, *others] for others in _divided(rest))


def _lie_apart(subject: Subject, program: Program, lines: Sequence[Line]) -> bool:
    """Whether parts that are written in place would have the padding of others between them."""
    shapes = [subject.prompts[prompt].shape for prompt in program.prompts]
    ragged = len({length for _, length, *_ in shapes}) > 1 and any(rows > 1 for rows, *_ in shapes)
    return ragged and any(isinstance(line, Change) for line in lines)


def _break_aliases(lines: Sequence[Line], seen: Sequence[Seen]) -> bool:
    """Whether an invocation would go on with a copy of memory that is written to in place.

    What goes on from a site of a batch is one tensor: if one invocation has replaced its part, it
    is a new one for all.
    """
    arrangement = arrange(lines, seen, [range(len(seen))])
    written = {
        arrangement.operands[number][line.operands[0]][:2]
        for number, line in enumerate(lines)
        if isinstance(line, Change)
    }
    for site in {line.site for line in lines if isinstance(line, Replace)}:
        for invocation, other in enumerate(seen):
            same = other.memory.get(Site(invocation, site.place, site.part))
            if invocation != site.invocation and same is not None and same[:2] in written:
                return True
    return False


# --- the model with plain hooks


def forward(
    subject: Subject,
    prompt: int,
    places: set[Place],
    at: Callable[[Place, Any], Any],
    copy: int = 0,
) -> None:
    """Runs a copy of a model on a prompt.

    Args:
        subject: the model.
        prompt: which prompt.
        places: where to look.
        at: sees what passes there, and returns what goes on.
        copy: which of the copies: forwards of one block may be under way at the same time.
    """
    whole = subject.copies[copy]
    calls: Counter[tuple[str, str]] = Counter()

    def passes(path: str, kind: str, value: Any) -> Any:
        place = Place(path, kind, calls[path, kind])
        calls[path, kind] += 1
        return at(place, value) if place in places else value

    def before(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (passes(path, "input", args[0]), *args[1:]), kwargs
            first = next(iter(kwargs))
            return args, {**kwargs, first: passes(path, "input", kwargs[first])}

        return hook

    def after(path: str) -> Any:
        return lambda module, args, output: passes(path, "output", output)

    handles = []
    for path, kind in {(place.path, place.kind) for place in places}:
        module = whole.get_submodule(path)
        if kind == "input":
            handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(after(path)))
    try:
        with torch.no_grad():
            whole(**subject.arguments(subject.prompts[prompt].clone()))
    finally:
        for handle in handles:
            handle.remove()


def part_of(value: Any, part: int | None) -> torch.Tensor:
    """The part of what passes; a transformer block may return its first part bare."""
    return value if part is None or isinstance(value, torch.Tensor) else value[part]


def with_part(value: Any, part: int | None, new: torch.Tensor) -> Any:
    """What passes, with a part replaced."""
    if part is None or isinstance(value, torch.Tensor):
        return new
    return (*value[:part], new, *value[part + 1 :])


# --- first stage: when sites come, and which are the same memory


@dataclass(frozen=True, slots=True)
class Seen:
    """What is seen of an invocation's sites in a run without the program.

    Attributes:
        order: the place of each place among those that come.
        memory: the memory of what arrives: a storage, and how often it has been written to.
    """

    order: Mapping[Place, int]
    memory: Mapping[Site, Memory]


def observe(subject: Subject, prompt: int, places: set[Place], sites: Mapping[Site, bool]) -> Seen:
    """Runs the model on a prompt.

    Args:
        subject: the model.
        prompt: which prompt.
        places: where to look.
        sites: the sites of the invocation, and whether they are assigned to. What is assigned is
            handed over as a copy, so it is made one here.
    """
    order: dict[Place, int] = {}
    memory: dict[Site, Memory] = {}
    alive: list[torch.Tensor] = []  # so that no storage is used again

    def at(place: Place, value: Any) -> Any:
        order[place] = len(order)
        for site in [site for site in sites if site.place == place]:
            tensor = part_of(value, site.part)
            alive.append(tensor)
            storage = tensor.untyped_storage().data_ptr()
            memory[site] = (site.invocation, storage, tensor._version)
            if sites[site]:
                value = with_part(value, site.part, tensor.clone())
        return value

    forward(subject, prompt, places, at)
    return Seen(order, memory)


# --- second stage: when lines run


@dataclass(frozen=True, slots=True)
class Held:
    """What is known of a value before it is there.

    Attributes:
        memory: its memory.
        when: when it is there.
        sites: through which sites it was read, if its memory is the model's.
    """

    memory: Memory
    when: Moment
    sites: frozenset[Site]


@dataclass(slots=True)
class Arrangement:
    """When the lines of a program run.

    Attributes:
        when: of each line.
        late: the lines whose writes come too late.
        touched: the memory that each line reads or writes.
        operands: of each line, the memory of each of its operands.
        standing: which line says what goes on from each site that is assigned to.
    """

    when: list[Moment] = field(default_factory=list)
    late: list[int] = field(default_factory=list)
    touched: list[frozenset[Memory]] = field(default_factory=list)
    operands: list[dict[str, Memory]] = field(default_factory=list)
    standing: dict[Site, int] = field(default_factory=dict)


def arrange(lines: Sequence[Line], seen: Sequence[Seen], schedule: Schedule) -> Arrangement:
    """Finds when each line runs: once what it uses is there, with what was written to it before."""
    passes = {number: at for at, members in enumerate(schedule) for number in members}
    values: dict[str, Held] = {}
    standing: dict[Site, Held] = {}
    written: dict[Memory, Moment] = {}
    changes: list[tuple[int, Held]] = []
    found = Arrangement()

    def comes(site: Site) -> Moment:
        return passes[site.invocation], seen[site.invocation].order[site.place]

    for number, line in enumerate(lines):
        names = () if isinstance(line, Read) else line.operands
        operands = {name: values[name] for name in names}
        pieces = {name: held.memory for name, held in operands.items()}
        _refuse_two_versions(pieces.values(), written)
        ready = [held.when for held in operands.values()]
        when = max(
            [*ready, *(written.get(piece, (0, 0)) for piece in pieces.values())], default=(0, 0)
        )
        match line:
            case Read():
                arriving = Held(
                    seen[line.site.invocation].memory[line.site],
                    comes(line.site),
                    frozenset([line.site]),
                )
                held = values[line.name] = standing.get(line.site, arriving)
                when = held.when
                pieces = {line.name: held.memory}
            case Compute():
                values[line.name] = Held(("line", number), when, frozenset())
            case View():
                (viewed,) = operands.values()
                values[line.name] = Held(viewed.memory, when, viewed.sites)
            case Change():
                target = operands[line.operands[0]]
                written[target.memory] = when
                changes.append((number, target))
            case Replace():
                (given,) = operands.values()
                if given.memory == seen[line.site.invocation].memory[line.site]:
                    raise SilentError("what arrives at a site is assigned to it")
                when = max(when, comes(line.site))
                standing[line.site] = Held(given.memory, when, given.sites)
                found.standing[line.site] = number
            case Save():
                pass
        found.when.append(when)
        found.operands.append(pieces)
        found.touched.append(frozenset(pieces.values()))
    _refuse_two_versions([held.memory for held in standing.values()], written)
    found.late = [
        number for site, number in found.standing.items() if found.when[number] > comes(site)
    ]
    for number, target in changes:
        ends = [comes(site) for site, held in standing.items() if held.memory == target.memory]
        if target.sites:
            ends.append(max(map(comes, target.sites)))
        found.late.extend(number for end in ends if found.when[number] > end)
    return found


def _refuse_two_versions(pieces: Any, written: Mapping[Memory, Moment]) -> None:
    """Raises if memory was written after the model's own write, and is used as it was before that.

    The model's own writes do not show in what was read before; those of the program show in every
    alias. What holds for both together nobody has said.
    """
    for piece in pieces:
        for other in written:
            if piece[0] != "line" and piece[:2] == other[:2] and piece[2] < other[2]:
                raise SilentError("memory is used as it was before the model wrote to it")


# --- third stage: the run


class _Execution:
    """Runs a program in the hooks of a model.

    The program works on copies of what passes: one for each piece of memory, so that aliases stay
    aliases. What it has written is put back before the model goes on.
    """

    def __init__(
        self,
        subject: Subject,
        program: Program,
        lines: Sequence[Line],
        seen: Sequence[Seen],
        arrangement: Arrangement,
    ) -> None:
        self.subject, self.program, self.lines = subject, program, lines
        self.seen, self.arrangement = seen, arrangement
        self.values: dict[str, torch.Tensor] = {}
        self.standing: dict[Site, torch.Tensor] = {}
        self.saved: dict[int, torch.Tensor] = {}
        self.arrived: dict[Site, torch.Tensor] = {}
        self.storages: dict[Memory, torch.UntypedStorage] = {}
        self.snapshots: dict[tuple[int, str], torch.Tensor] = {}
        self.done: set[int] = set()
        self.sites: defaultdict[tuple[int, Place], list[Site]] = defaultdict(list)
        for invocation in seen:
            for site in invocation.memory:
                self.sites[site.invocation, site.place].append(site)

    def run(self, schedule: Schedule) -> list[torch.Tensor]:
        for at, members in enumerate(schedule):
            _meet(members, lambda member, meeting, at=at: self._forward(at, member, meeting))
        return [self.saved[number] for number in sorted(self.saved)]

    def _forward(self, at: int, member: int, meeting: Callable[[Any, Any], None]) -> None:
        order = self.seen[member].order

        def passing(place: Place, value: Any) -> Any:
            sites = self.sites[member, place]
            meeting(
                lambda: [self._arrive(site, part_of(value, site.part)) for site in sites],
                lambda: self._run_lines((at, order[place])),
            )
            for site in sites:
                part = part_of(value, site.part)
                part.copy_(self.arrived[site])
                if site in self.arrangement.standing:
                    value = with_part(value, site.part, self.standing[site].clone())
            return value

        forward(self.subject, self.program.prompts[member], set(order), passing, member)

    def _arrive(self, site: Site, tensor: torch.Tensor) -> None:
        memory = self.seen[site.invocation].memory[site]
        if memory not in self.storages:
            self.storages[memory] = tensor.untyped_storage().clone()
        copy = torch.empty(0, dtype=tensor.dtype)
        place = (tensor.storage_offset(), tensor.shape, tensor.stride())
        self.arrived[site] = copy.set_(self.storages[memory], *place)

    def _run_lines(self, now: Moment) -> None:
        for number, line in enumerate(self.lines):
            if self.arrangement.when[number] == now:
                self._run_line(number, line)
                self.done.add(number)

    def _run_line(self, number: int, line: Line) -> None:
        if isinstance(line, Read):
            self.values[line.name] = self.standing.get(line.site, self.arrived[line.site])
            return
        operands = [self.snapshots.get((number, name), self.values[name]) for name in line.operands]
        match line:
            case Compute() | View():
                self.values[line.name] = function_of(line.operation)(*operands)
            case Change():
                _refuse_overlap(*operands)
                self._take_snapshots(number)
                function_of(line.operation)(*operands)
            case Replace():
                self.standing[line.site] = operands[0]
            case Save():
                self.saved[number] = operands[0].clone()

    def _take_snapshots(self, change: int) -> None:
        """Keeps what lines before a write will ask for later, as it is now.

        An assignment asks for no content: it gives memory to a site, with what is written to it.
        """
        target = self.arrangement.operands[change][self.lines[change].operands[0]]
        for number, line in enumerate(self.lines[:change]):
            if number in self.done or isinstance(line, Read | Replace):
                continue
            for name, memory in self.arrangement.operands[number].items():
                if memory == target and name in self.values:
                    self.snapshots.setdefault((number, name), self.values[name].clone())


def _refuse_overlap(target: torch.Tensor, *others: torch.Tensor) -> None:
    """Raises if torch leaves the result of a write open: it reads what it writes, elsewhere."""

    def geometry(tensor: torch.Tensor) -> Any:
        return tensor.shape, tensor.stride(), tensor.storage_offset()

    own = target.untyped_storage().data_ptr()
    for other in others:
        if other.untyped_storage().data_ptr() == own and geometry(other) != geometry(target):
            raise SilentError("a write reads other parts of the memory that it writes to")


def _meet(members: Sequence[int], work: Callable[[int, Callable[[Any, Any], None]], None]) -> None:
    """Does some work for several members, which wait for each other at their meetings.

    At a meeting each does the first thing, and when all have, one of them does the second.
    """
    if len(members) == 1:

        def alone(each: Any, one: Any) -> None:
            each()
            one()

        work(members[0], alone)
        return
    barrier = threading.Barrier(len(members))
    errors: list[BaseException] = []

    def together(each: Any, one: Any) -> None:
        each()
        if barrier.wait() == 0:
            one()
        barrier.wait()

    def run(member: int) -> None:
        try:
            work(member, together)
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(member,)) for member in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
