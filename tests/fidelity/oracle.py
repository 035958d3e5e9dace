"""What programs mean: eager PyTorch in plain hooks, with nothing of Insitu's runtime.

The rules, in the words of the design: all reads of an invocation come from one run with all writes
in force; a value arrives at its site carrying every write at sites that executed before; a write
changes what passes at its site, and nothing else; lines mean what they would mean in order on torch
tensors, where each site's value is a tensor of its own.

So the lines are run in their order on copies of what arrived, and the model is run again with what
they leave at its sites, until what arrives is what they were run on. `arrange` finds, before that,
which writes come too late.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
"""Which tensor of its own: what arrives at a site, or what a line has made."""

Schedule = Sequence[Sequence[int]]
"""Which invocations run in each pass; those of one pass meet at every place."""

Order = Mapping[Place, int]
"""When places come in a run of an invocation, by a number that grows."""


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
    orders = _orders(subject, program, lines)
    arranged = [arrange(lines, orders, one) for one in _schedules(subject, len(program.prompts))]
    if all(one.late for one in arranged):
        raise TooLateError
    kept = [line for number, line in enumerate(lines) if number not in arranged[0].idle]
    return _run(subject, program, kept)


def touched(subject: Subject, program: Program) -> list[frozenset[Memory]]:
    """Returns the memory that each line of a program reads or writes."""
    lines = list(_plain(program.lines))
    orders = _orders(subject, program, lines)
    arrangement = arrange(lines, orders, [range(len(orders))])
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


def _orders(subject: Subject, program: Program, lines: Sequence[Line]) -> list[Order]:
    """When the places that a program uses come in each invocation."""
    places = {line.site.place for line in lines if isinstance(line, Read | Replace)}
    found: list[Order] = []
    for prompt in program.prompts:
        order: dict[Place, int] = {}

        def at(place: Place, value: Any, order: dict[Place, int] = order) -> Any:
            order[place] = len(order)
            return value

        forward(subject, prompt, places, at)
        found.append(order)
    return found


def _schedules(subject: Subject, count: int) -> Iterator[Schedule]:
    """The ways in which the invocations of a block may run."""
    for schedule in _divided(tuple(range(count))):
        if subject.together or all(len(members) == 1 for members in schedule):
            yield schedule


def _divided(numbers: tuple[int, ...]) -> Iterator[Schedule]:
    """All ways to divide numbers into passes, one after the other; the largest first."""
    if not numbers:
        yield []
    for size in range(len(numbers), 0, -1):
        for first in itertools.combinations(numbers, size):
            rest = tuple(number for number in numbers if number not in first)
            yield from ([first, *others] for others in _divided(rest))


# --- the model with plain hooks


def forward(
    subject: Subject,
    prompt: int,
    places: set[Place],
    at: Callable[[Place, Any], Any],
) -> None:
    """Runs a copy of a model on a prompt.

    Args:
        subject: the model.
        prompt: which prompt.
        places: where to look.
        at: sees what passes there, and returns what goes on.
    """
    whole = subject.copy
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


# --- when lines run


@dataclass(frozen=True, slots=True)
class Held:
    """What is known of a value before it is there.

    Attributes:
        memory: its memory.
        site: the site that it stands at, if it was read there or is a view of what was.
        whole: whether it is no view: assigning it to the site where it stands does nothing.
    """

    memory: Memory
    site: Site | None = None
    whole: bool = True


@dataclass(slots=True)
class Arrangement:
    """When the lines of a program run.

    Attributes:
        late: the sites to which what is written comes too late.
        touched: the memory that each line reads or writes.
        idle: the lines that assign to a site what stands there.
    """

    late: list[Site] = field(default_factory=list)
    idle: set[int] = field(default_factory=set)
    touched: list[frozenset[Memory]] = field(default_factory=list)


def arrange(lines: Sequence[Line], orders: Sequence[Order], schedule: Schedule) -> Arrangement:
    """Finds when each line runs: once what it uses is there, with what was written to it before."""
    passes = {number: at for at, members in enumerate(schedule) for number in members}
    values: dict[str, Held] = {}
    ready: dict[Memory, Moment] = {}  # when what was written so far is there
    standing: dict[Site, Memory] = {}
    given: dict[Site, Moment] = {}  # when what a written site is given is there
    borrowed: set[Memory] = set()  # what another invocation has written into
    found = Arrangement()

    def comes(site: Site) -> Moment:
        return passes[site.invocation], orders[site.invocation][site.place]

    for number, line in enumerate(lines):
        operands = () if isinstance(line, Read) else [values[name] for name in line.operands]
        memory = {held.memory for held in operands}
        when = max([ready[piece] for piece in memory], default=(0, 0))
        match line:
            case Read():
                own = standing.setdefault(line.site, ("site", line.site))
                ready.setdefault(own, comes(line.site))
                values[line.name] = Held(own, line.site)
                memory = {own}
            case Compute():
                values[line.name] = Held(("line", number))
                ready["line", number] = when
            case View():
                values[line.name] = replace(operands[0], whole=False)
            case Change():
                target, site = operands[0].memory, operands[0].site
                ready[target] = when
                if site is not None and standing[site] == target:
                    _refuse_beside(site, standing, borrowed, line.invocation)
                    if site.invocation != line.invocation:
                        borrowed.add(target)
                    elif target in borrowed:
                        raise SilentError("a value was written into by another invocation")
                    else:
                        given[site] = when
            case Replace() if _is_idle(operands[0], line.site, standing, borrowed):
                found.idle.add(number)
            case Replace():
                _refuse_beside(line.site, standing, borrowed, line.invocation)
                own = standing[line.site] = ("line", number)
                ready[own] = given[line.site] = max(when, comes(line.site))
            case Save():
                pass
        found.touched.append(frozenset(memory))
    found.late = [site for site, when in given.items() if when > comes(site)]
    return found


def _refuse_beside(
    site: Site, standing: Mapping[Site, Memory], borrowed: set[Memory], invocation: int
) -> None:
    """Raises if another part of the same value was written into by another invocation."""
    for other, memory in standing.items():
        beside = other != site and other.place == site.place
        if beside and other.invocation == site.invocation == invocation and memory in borrowed:
            raise SilentError("another part was written into by another invocation")


def _is_idle(
    held: Held, site: Site, standing: Mapping[Site, Memory], borrowed: set[Memory]
) -> bool:
    """Whether a value is what stands at a site, as it was written in the site's invocation."""
    stands = held.whole and held.site == site and standing.get(site) == held.memory
    return stands and held.memory not in borrowed


# --- what they give


def _run(subject: Subject, program: Program, lines: Sequence[Line]) -> list[torch.Tensor]:
    """Runs the model and the lines in turns, until both agree."""
    sites = {line.site for line in lines if isinstance(line, Read | Replace)}
    given: Mapping[Site, torch.Tensor] = {}
    before: Mapping[Site, torch.Tensor] = {}
    for _ in range(len(sites) + 2):
        arrived = _arrived(subject, program, sites, given)
        saved, given = _computed(lines, arrived)
        if before and all(torch.equal(arrived[site], before[site]) for site in sites):
            return saved
        before = arrived
    raise AssertionError("what arrives never settles")


def _arrived(
    subject: Subject, program: Program, sites: set[Site], given: Mapping[Site, torch.Tensor]
) -> Mapping[Site, torch.Tensor]:
    """What arrives at some sites, as it lies in memory, if others are given something."""
    arrived: dict[Site, torch.Tensor] = {}
    for number, prompt in enumerate(program.prompts):
        own = [site for site in sites if site.invocation == number]

        def at(place: Place, value: Any, own: Sequence[Site] = own) -> Any:
            for site in own:
                if site.place == place:
                    arrived[site] = _alike(part_of(value, site.part))
                    if site in given:
                        value = with_part(value, site.part, given[site].clone())
            return value

        forward(subject, prompt, {site.place for site in own}, at)
    return arrived


def _alike(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that has the strides of a tensor, and so the same views."""
    storage = tensor.untyped_storage().clone()
    place = (tensor.storage_offset(), tensor.shape, tensor.stride())
    return torch.empty(0, dtype=tensor.dtype).set_(storage, *place)


def _computed(
    lines: Sequence[Line], arrived: Mapping[Site, torch.Tensor]
) -> tuple[list[torch.Tensor], Mapping[Site, torch.Tensor]]:
    """Runs the lines in their order; returns what they save, and what sites are given."""
    values: dict[str, torch.Tensor] = {}
    homes: dict[str, Site] = {}  # of values that stand at a site, or are a view of what does
    standing: dict[Site, torch.Tensor] = {}
    given: dict[Site, torch.Tensor] = {}
    saved: list[torch.Tensor] = []
    for line in lines:
        operands = () if isinstance(line, Read) else [values[name] for name in line.operands]
        match line:
            case Read():
                if line.site not in standing:
                    standing[line.site] = _alike(arrived[line.site])
                values[line.name] = standing[line.site]
                homes[line.name] = line.site
            case Compute() | View():
                values[line.name] = function_of(line.operation)(*operands)
                if isinstance(line, View) and line.operands[0] in homes:
                    homes[line.name] = homes[line.operands[0]]
            case Change():
                _refuse_overlap(*operands)
                function_of(line.operation)(*operands)
                site = homes.get(line.operands[0])
                if site is not None and site.invocation == line.invocation:
                    whole = standing[site]
                    if _storage(whole) == _storage(operands[0]):
                        given[site] = whole.clone()
            case Replace():
                standing[line.site] = _alike(operands[0])
                given[line.site] = operands[0].clone()
            case Save():
                saved.append(operands[0].clone())
    return saved, given


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _refuse_overlap(target: torch.Tensor, *others: torch.Tensor) -> None:
    """Raises if torch leaves the result of a write open: it reads what it writes, elsewhere."""

    def geometry(tensor: torch.Tensor) -> Any:
        return tensor.shape, tensor.stride(), tensor.storage_offset()

    for other in others:
        if _storage(other) == _storage(target) and geometry(other) != geometry(target):
            raise SilentError("a write reads other parts of the memory that it writes to")
