"""How lines of Python become nodes: one recording for each block.

A recording owns the graph that a block writes, the cells that its saved values will be put into,
and what is known of shapes. It is open until the block ends.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from numbers import Number
from typing import Any, ClassVar, NoReturn, Protocol, cast

import torch

from insitu.graph.errors import NoValueError, OperationError
from insitu.graph.location import Location, Mark, here
from insitu.graph.node import (
    EVERY,
    Address,
    Carried,
    Function,
    Graph,
    ModuleRef,
    Ref,
    Site,
    Subgraph,
    ref,
)
from insitu.graph.operations import (
    APPLY,
    BACKWARD,
    COND,
    FOLD,
    GETITEM,
    GRAD,
    INPUT,
    READ,
    REPLACE,
    SAVE,
    SKIP,
    WRITE,
    Operation,
)
from insitu.graph.structure import is_basic, map_structure

NO_KWARGS: Mapping[str, Any] = {}

# Constants that a node may hold as they are; bools too, but those are noted down (`Graph.flags`).
_PLAIN = frozenset(
    (
        *(bytes, complex, float, int, str, type(None), type(Ellipsis)),
        *(torch.Size, torch.Tensor, torch.device, torch.dtype, torch.layout, torch.memory_format),
    )
)
# What tensors are indexed with: nearly always constants, so they get a short way of their own.
_KEYS = frozenset([slice, tuple])


def _constant(key: Any) -> bool:
    """Whether a slice or a tuple holds nothing but plain constants and slices of them."""
    if type(key) is slice:
        bounds: tuple[Any, ...] = (key.start, key.stop, key.step)
        return _PLAIN.issuperset(map(type, bounds))
    for item in key:
        if type(item) not in _PLAIN and not (type(item) is slice and _constant(item)):
            return False
    return True


_WHOLE = object()
_VIEWS = frozenset(
    (
        *("flatten", "getitem", "permute", "reshape", "select", "squeeze", "transpose"),
        *("unflatten", "view"),
    )
)
_NAMED = (Function, ModuleRef, Subgraph)
_STRUCTURES = (APPLY, COND, FOLD, INPUT, READ, REPLACE, SKIP, WRITE)  # give tuples, or may do so


class _Branches(threading.local):
    def __init__(self) -> None:
        self.stack: list[Recording] = []


_branches = _Branches()


def branches() -> list[Recording]:
    """Returns what this thread is recording for `cond` and `fold`, outermost first."""
    return _branches.stack


class Missing:
    """Stands in a cell that has no value, and says why."""

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason


_WAITING = Missing("its run failed.")


class Cell:
    """Where a saved value is put.

    Attributes:
        content: the value once the run has put it here; until then, and after a failure,
            a `Missing`.
    """

    content: Any = _WAITING  # of the class: a cell without an `__init__` is made much faster

    @property
    def filled(self) -> bool:
        """Whether there is a value."""
        return type(self.content) is not Missing


class ShapeSource(Protocol):
    """Knows, without running the model, the shapes of what will arrive at its sites."""

    def arriving(self, site: Site) -> Any:
        """Returns what arrives at a site, with fake tensors in place of tensors."""
        ...

    def fake_module(self, path: str) -> Callable[..., Any]:
        """Returns a module as a function on fake tensors."""
        ...


class Recording:
    """What one block records.

    Attributes:
        graph: the nodes so far.
        saves: the cells that the run has to fill, by the index of the node that makes the value.
        sites: what lines that come now read at a site: what arrives, or what was last written.
        gradients: what lines that come now mean by the gradient of a node's value.
        shown: what lines that come now read by standard names.
        computed: the nodes that stand for values by name that are no part of the model, with what
            to write instead of writing into them.
        session: what holds it together with other recordings, whose values it may use.
        order: its place among them.
        parent: of the function of a `cond` or `fold`: what it is used in.
        captured: the parent's values that such a function uses.
        open: whether lines still add to it.
        shapes: gives the shapes at sites; None where no model is behind the recording.
        fakes: fake values of nodes, as far as anybody has asked, by node index.
    """

    # What most recordings never use is of the class: nothing is made for it until it is needed.
    gradients: dict[int, Ref] | None = None
    shown: dict[Any, Any] | None = None
    computed: Mapping[int, str] = NO_KWARGS  # pyright: ignore[reportAssignmentType]
    parent: Recording | None = None
    session: object = None
    order: int = 0
    open: bool = True
    _carried: int = 0

    def __init__(self, shapes: ShapeSource | None = None, parent: Recording | None = None) -> None:
        self.graph = Graph([])
        self.saves: dict[int, Cell] = {}
        self.sites: dict[Address, Ref] = {}
        self.shapes = shapes
        self.fakes: dict[int, Any] = {}
        if parent is not None:
            self.parent = parent
            self.captured: list[Recorded] = []
            self._inside: dict[int, Ref] = {}
            self._inputs = 0

    def apply(
        self, operation: Operation, args: tuple[Any, ...], kwargs: Mapping[str, Any], mark: Mark
    ) -> Ref:
        """Records an operation on values and constants.

        Args:
            operation: an entry of the registry.
            args: its arguments: recorded values, constants, or containers of both.
            kwargs: its keyword arguments, likewise.
            mark: the user's line.

        Raises:
            OperationError: if an argument is of a kind that cannot be recorded, or asks for a
                write in place.
            NoValueError: if an argument belongs to another block and has no value.
        """
        rows = self.graph.rows
        if len(args) == 2 and not kwargs:  # most are: a value, an operator and a constant
            value, other = args
            kind = type(other)  # pyright: ignore[reportUnknownVariableType]
            if (
                (kind in _PLAIN or (kind in _KEYS and _constant(other)))
                and isinstance(value, Recorded)
                and value._recording is self
                and (value._operand or operation is GETITEM)
            ):
                source = value._ref
                index = len(rows)
                rows.append((operation, (source, other), kwargs, source.inputs, False, mark))
                return ref(index)
        inputs: list[int] = []
        encoded: list[Any] = []
        nested = False
        for arg in args:
            kind = type(arg)  # pyright: ignore[reportUnknownVariableType]
            if kind in _PLAIN or (kind in _KEYS and _constant(arg)):
                encoded.append(arg)
            elif kind in _NAMED:
                encoded.append(arg)
                nested = True
            elif issubclass(kind, Recorded) and arg._recording is self:
                if not arg._operand and operation is not GETITEM:
                    _refuse_structure(arg, Location(*mark))
                source = arg._ref
                inputs.append(source.index)
                encoded.append(source)
            else:
                before, carried = len(inputs), self._carried
                encoded.append(self._encode(arg, inputs, mark))
                nested = nested or (len(inputs) > before and type(encoded[-1]) is not Ref)
                nested = nested or self._carried > carried
        if kwargs:
            if kwargs.get("out") is not None or kwargs.get("inplace"):
                raise OperationError(
                    f"{operation.name} cannot write into one of its arguments here: leave out "
                    "`out=` and `inplace=` and use what it returns.",
                    Location(*mark),
                )
            before, carried = len(inputs), self._carried
            kwargs = {
                key: arg
                if type(arg) in _PLAIN or type(arg) is bool
                else self._encode(arg, inputs, mark)
                for key, arg in kwargs.items()
            }
            nested = nested or len(inputs) > before or self._carried > carried
        rows.append((operation, tuple(encoded), kwargs, tuple(inputs), nested, mark))
        return ref(len(rows) - 1)

    def read(self, address: Address, mark: Mark) -> Ref:
        """Returns what stands at a site for lines that come now.

        Args:
            address: the site.
            mark: the user's line.
        """
        return self.sites.get(address) or self.first_read(address, mark)

    def first_read(self, address: Address, mark: Mark) -> Ref:
        """Returns what stands at a site for lines that come now, if none has used it so far.

        Args:
            address: the site.
            mark: the user's line.
        """
        rows = self.graph.rows
        if self.graph.writes:
            every = self.sites.get((*address[:4], EVERY))
            if every is not None and rows[every.index][0] is WRITE:
                after = {len(rows): self.original(every.index)}
                self.graph.after = {**self.graph.after, **after}
            elif address[4] == EVERY:
                self._refuse_unseen(address, mark)
        index = len(rows)
        source = self.sites[address] = ref(index)
        rows.append((READ, address, NO_KWARGS, (), False, mark))
        return source

    def write(self, address: Address, value: Any, block: bool, mark: Mark) -> Ref:
        """Records that a value takes the place of what arrives at a site.

        Args:
            address: the site.
            value: recorded values, constants, or containers of both.
            block: whether it is the output of a transformer block.
            mark: the user's line.

        Raises:
            OperationError: if the first argument of a module is written and all of them are used.
        """
        if not self.open:
            raise OperationError(
                "Inside `cond` and `fold` nothing is written to the model: return the value, and "
                "write it outside.",
                Location(*mark),
            )
        if address[2] != "output":
            self._refuse_both_inputs(address, mark)
        if address[4] == EVERY:
            self._refuse_mixed(address, mark)
        rows = self.graph.rows
        standing = self.sites.get(address)
        if standing is None:
            standing = self.read(address, mark)
        elif self.graph.mutations and self.holds(standing, value):
            return standing
        operation = rows[standing.index][0]
        if operation is SKIP:
            raise OperationError(
                f"`{Site(*address)}` is what `skip` was given, at\n"
                f"{self.graph[standing.index].location}\nGive it this value instead.",
                Location(*mark),
            )
        read = standing
        if operation is WRITE:
            read = ref(self.original(standing.index))
            if self._is_whole(value) or not (block and self._may_be_structure(standing)):
                standing = read  # of what was written before, nothing stays
        if isinstance(value, Recorded) and value._recording is self:  # a whole tuple may be written
            source = value._ref
            pair = (standing.index, source.index)
            rows.append((WRITE, (standing, source, block), NO_KWARGS, pair, False, mark))
            written = ref(len(rows) - 1)
        else:
            written = self.apply(WRITE, (Recorded(self, standing), value, block), NO_KWARGS, mark)
        self.graph.writes[read.index] = written.index
        self.sites[address] = written
        return written

    def write_part(self, source: Ref, key: Any, value: Any, block: bool, mark: Mark) -> Ref | None:
        """Records that a value takes the place of an entry of what stands at a site.

        Args:
            source: what stands at the site.
            key: which entry.
            value: as of `write`.
            block: as of `write`.
            mark: the user's line.

        Returns:
            What stands there then; None if the source is no site's value.
        """
        node = self.graph[self.original(source.index)]
        if node.operation is not READ or self.graph.rows[source.index][0] is SKIP:
            return None
        source = self._without_part(source, key)
        part = self.apply(REPLACE, (Recorded(self, source), key, value), NO_KWARGS, mark)
        return self.write(cast("Address", node.args), Recorded(self, part), block, mark)

    def _is_whole(self, value: Any) -> bool:
        """Whether a value has all parts of what is to stand at a site: see `write_part`."""
        return isinstance(value, Recorded) and self.graph.rows[value._ref.index][0] is REPLACE

    def _may_be_structure(self, written: Ref) -> bool:
        """Whether what was written to a site may be more than its first part alone."""
        value = self.graph.rows[written.index][1][1]
        if type(value) is Ref:
            return self.graph.rows[value.index][0] in _STRUCTURES
        return not isinstance(value, torch.Tensor)

    def _without_part(self, source: Ref, key: Any) -> Ref:
        """Returns what stands at a site without what was written to one of its parts.

        That part is about to be replaced, so nothing is to wait for what it was.
        """
        rows = self.graph.rows
        base, replacements = source, list[int]()
        while True:
            operation, args, *_ = rows[base.index]
            if operation is REPLACE:
                replacements.append(base.index)
                base = cast("Ref", args[0])
            elif operation is WRITE and type(args[1]) is Ref and rows[args[1].index][0] is REPLACE:
                base = args[1]
            else:
                break
        others = [index for index in reversed(replacements) if rows[index][1][1] != key]
        if len(others) == len(replacements):
            return source
        for index in others:
            operation, args, kwargs, inputs, nested, mark = rows[index]
            of_base = (base.index, *inputs[1:])
            rows.append((operation, (base, *args[1:]), kwargs, of_base, nested, mark))
            base = ref(len(rows) - 1)
        return base

    def original(self, index: int) -> int:
        """Returns the node that reads a site, from one that gives what stands there now."""
        while self.graph.rows[index][0] in (WRITE, SKIP):
            index = self.graph.rows[index][3][0]
        return index

    def mutate(
        self, operation: Operation, args: tuple[Any, ...], kwargs: Mapping[str, Any], mark: Mark
    ) -> Ref:
        """Records an operation that writes into its first argument. Args and errors as `apply`.

        Raises:
            OperationError: if what it would write into is no value of the run.
        """
        target = args[0] if args else None
        if not isinstance(target, Recorded) or target._recording is not self:
            raise OperationError(
                f"`{operation.short}` would write into {_described(target)} that is not a value of "
                "this run: use the operation without the underscore, or write into `.clone()` of "
                "a value of the run.",
                Location(*mark),
            )
        if self.computed:
            self._refuse_computed(target, Location(*mark))
        written = self.apply(operation, args, kwargs, mark)
        self.graph.mutations = (*self.graph.mutations, written.index)
        return written

    def _refuse_computed(self, target: Recorded, location: Location) -> None:
        """Raises if a write in place would be to a part of something that was only computed."""
        index = target._ref.index
        while index not in self.computed:
            operation, _, _, inputs, _, _ = self.graph.rows[index]
            if not inputs or operation.short not in _VIEWS:
                return
            index = inputs[0]
        raise OperationError(
            f"`{target.written()}` is computed and no part of the model, which would not see what "
            f"is written into it: {self.computed[index]}",
            location,
        )

    def gradient(self, source: Ref, mark: Mark) -> Ref:
        """Returns what stands for the gradient of a value for lines that come now.

        Args:
            source: the value.
            mark: the user's line.
        """
        if self.gradients is None:
            self.gradients = {}
        standing = self.gradients.get(source.index)
        if standing is None:
            rows = self.graph.rows
            standing = self.gradients[source.index] = ref(len(rows))
            rows.append((GRAD, (source,), NO_KWARGS, source.inputs, False, mark))
            self.graph.differentiates = True
        return standing

    def write_gradient(self, source: Ref, value: Any, mark: Mark) -> None:
        """Records that a value takes the place of a gradient on its way. Args as `write`."""
        standing = self.gradient(source, mark)
        if self.holds(standing, value):
            return
        original = self.original(standing.index)
        args = (Recorded(self, ref(original)), value, False)
        written = self.apply(WRITE, args, NO_KWARGS, mark)
        self.graph.writes[original] = written.index
        cast("dict[int, Ref]", self.gradients)[source.index] = written

    def backward(self, loss: Recorded, options: Mapping[str, Any], mark: Mark) -> None:
        """Records a backward pass.

        Args:
            loss: where it starts.
            options: keyword arguments of `torch.Tensor.backward`.
            mark: the user's line.
        """
        self.apply(BACKWARD, (loss,), options, mark)
        self.gradients = None  # lines that come now mean the next one
        self.graph.differentiates = True

    def holds(self, source: Ref, value: Any, key: Any = _WHOLE) -> bool:
        """Returns whether a value is what stands there already, written in place.

        `x[0] += 1` is a write in place to `x[0]`, and then an assignment of `x[0]` to itself.

        Args:
            source: what stands there, or what it is a part of.
            value: what is assigned.
            key: which part.
        """
        if not isinstance(value, Recorded) or value._recording is not self:
            return False
        rows = self.graph.rows
        index = value._ref.index
        if not rows[index][0].in_place:
            return False
        while rows[index][0].in_place:
            index = rows[index][3][0]
        if key is _WHOLE:
            return index == source.index
        operation, args, _, inputs, _, _ = rows[index]
        same = operation is GETITEM and inputs == source.inputs and args[1] is key
        return same and is_basic(key)

    def skip(self, address: Address, value: Any, mark: Mark) -> None:
        """Records that a module does not run, and what stands for its output.

        Args:
            address: its output.
            value: recorded values, constants, or containers of both.
            mark: the user's line.

        Raises:
            OperationError: if its own output was used before.
        """
        if address in self.sites:
            used = self.graph[self.sites[address].index].location
            raise OperationError(
                f"`{Site(*address)}` is used before, at\n{used}\nA module that is skipped has no "
                "output of its own: what stands for it can be read after this line.",
                Location(*mark),
            )
        invocation, path, _, call, step = address
        inputs = self.read((invocation, path, "inputs", call, step), mark)
        if isinstance(value, Recorded) and value._recording is self:
            value = Recorded(self, value._ref)  # a whole tuple may stand there
        inputs = ref(self.original(inputs.index))
        skip = self.apply(SKIP, (Recorded(self, inputs), value), NO_KWARGS, mark)
        self.graph.skips = {**self.graph.skips, inputs.index: skip.index}
        self.sites[address] = skip

    def _refuse_both_inputs(self, address: Address, mark: Mark) -> None:
        """Raises if the first argument of a module is written and all of them are used."""
        invocation, path, kind, call, step = address
        other = {"input": "inputs", "inputs": "input"}.get(kind)
        if other is not None and (invocation, path, other, call, step) in self.sites:
            raise OperationError(
                f"`{Site(*address)}` cannot be written where `.{other}` of the same module is "
                "used: do both through `.inputs`, which is `(args, kwargs)`.",
                Location(*mark),
            )

    def stop(self, output: Ref, mark: Mark) -> None:
        """Records that the run ends where a module has returned.

        Args:
            output: what it returns.
            mark: the user's line.
        """
        self.graph.stops = {**self.graph.stops, self.original(output.index): mark}

    def _refuse_unseen(self, address: Address, mark: Mark) -> None:
        """Raises if a site that is read in every step was written in a single one."""
        written = {self.graph[read].args for read in self.graph.writes}
        if any(other[:4] == address[:4] for other in written):
            self._refuse_mixed(address, mark)

    def _refuse_mixed(self, address: Address, mark: Mark) -> None:
        """Raises if a site is used in every step after a single one, of which one is a write."""
        for other in self.sites:
            if other[:4] == address[:4] and other[4] != EVERY:
                raise OperationError(
                    f"`{Site(*address)}` cannot be used where `{Site(*other)}` was, and one of "
                    "them is written: what holds in every step comes before what holds in one.",
                    Location(*mark),
                )

    def fail(self, reason: str) -> None:
        """Says of every saved value why it will have none, and forgets the rest."""
        missing = Missing(reason)
        for cell in self.saves.values():
            cell.content = missing
        self.forget()

    def forget(self) -> None:
        """Drops what only an open recording needs, so that one kept proxy keeps one value.

        Without the shape source a recording is in no reference cycle, so what nobody keeps is
        gone at once and not at some later garbage collection.
        """
        self.saves = {}
        self.sites = {}
        self.fakes = {}
        self.shapes = None

    def input(self, mark: Mark) -> Ref:
        """Adds an input, to the function of a `cond` or `fold`."""
        self._inputs += 1
        return self.apply(INPUT, (self._inputs - 1,), NO_KWARGS, mark)

    def capture(self, value: Recorded, mark: Mark) -> Ref:
        """Returns the input through which such a function gets a value from around it.

        Args:
            value: a value of the parent, or of what is around that.
            mark: the user's line.
        """
        parent = cast("Recording", self.parent)
        if value._recording is not parent:
            value = Recorded(parent, parent.capture(value, mark))
        index = value._ref.index
        if index not in self._inside:
            self._inside[index] = self.input(mark)
            self.captured.append(Recorded(parent, value._ref))
        return self._inside[index]

    def encode(self, value: Any, mark: Mark) -> Any:
        """Returns a value with references in the place of recorded values."""
        return self._encode(value, [], mark)

    def carry(self, value: Recorded, mark: Mark) -> Carried:
        """Returns what stands for a value of this block in a later one of its session.

        Args:
            value: the value, as it is at this line.
            mark: the user's line.
        """
        source, rows = value._ref, self.graph.rows
        cell = self.saves[len(rows)] = Cell()
        rows.append((SAVE, (source,), NO_KWARGS, source.inputs, False, mark))

        def fake() -> Any:
            from insitu.graph.shapes import fake_value

            return fake_value(self, source.index)

        return Carried(cell, fake)

    def _comes_after(self, other: Recording) -> bool:
        """Whether this is a later block of the same session."""
        return (
            self.session is not None and self.session is other.session and self.order > other.order
        )

    def replay(self, graph: Graph, number: int, step: int) -> None:
        """Adds what an edit has recorded, as if its lines stood here.

        Args:
            graph: what the edit has recorded.
            number: the invocation that it is to hold in.
            step: the step, or `EVERY`.
        """
        rows = self.graph.rows
        self.graph.flags = self.graph.flags or graph.flags
        start = len(rows)
        moved: list[Ref] = []

        def leaf(item: Any) -> Any:
            return moved[item.index] if type(item) is Ref else item

        for operation, args, kwargs, inputs, nested, mark in graph.rows:
            if operation is READ:
                _, path, kind, call, _ = args
                moved.append(self.read((number, path, kind, call, step), mark))
                continue
            row_args, row_kwargs = map_structure(leaf, (args, dict(kwargs)))
            sources = tuple(moved[source].index for source in inputs)
            moved.append(ref(len(rows)))
            rows.append((operation, row_args, row_kwargs, sources, nested, mark))
        for read, write in graph.writes.items():
            original = self.original(moved[read].index)
            self.graph.writes[original] = moved[write].index
            self.sites[cast("Address", rows[original][1])] = moved[write]
        for read, skip in graph.skips.items():
            number, path, _, call, step = cast("Address", rows[moved[read].index][1])
            self.graph.skips = {**self.graph.skips, moved[read].index: moved[skip].index}
            self.sites[number, path, "output", call, step] = moved[skip]
        for read, mark in graph.stops.items():
            self.stop(moved[read], mark)
        self.graph.unfused |= {self.original(moved[index].index) for index in graph.unfused}
        mutations = [moved[index].index for index in graph.mutations]
        self.graph.mutations = (*self.graph.mutations, *mutations)
        if step == EVERY:
            self.graph.repeats = (*self.graph.repeats, (start, len(rows)))

    def _is_around(self, other: Recording) -> bool:
        """Whether this records a function that is used in another recording."""
        parent = self.parent
        while parent is not None and parent is not other:
            parent = parent.parent
        return parent is other

    def _encode(self, value: Any, inputs: list[int], mark: Mark) -> Any:
        """Puts references in the place of recorded values, also inside containers."""
        if isinstance(value, torch.Tensor):
            return value

        def leaf(item: Any) -> Any:
            if isinstance(item, Recorded):
                if item._recording is self:
                    if not item._operand:
                        _refuse_structure(item, Location(*mark))
                    inputs.append(item._ref.index)
                    return item._ref
                if self.parent is not None and self._is_around(item._recording):
                    captured = self.capture(item, mark)
                    inputs.append(captured.index)
                    return captured
                if item._recording.open and self._comes_after(item._recording):
                    self._carried += 1
                    return item._recording.carry(item, mark)
                return item.result(Location(*mark))
            if type(item) in _PLAIN or isinstance(item, torch.Tensor):
                return item
            if type(item) is bool:
                self.graph.flags = True
                return item
            if isinstance(item, Number) and hasattr(item, "item"):  # a NumPy scalar
                return cast(Any, item).item()
            if isinstance(item, int | float):
                return item
            raise OperationError(
                f"{_described(item)} cannot be part of a recorded operation: it may use values of "
                "this block, tensors, numbers, strings, dtypes and devices, and tuples, lists, "
                "dictionaries and slices of those.",
                Location(*mark),
            )

        return map_structure(leaf, value)


class Recorded:
    """A value that a recording knows: the part of a proxy that recordings need.

    Attributes:
        _recording: where it was recorded.
        _ref: the node that makes it.
        _cell: the cell that it was last saved to, if it was saved.
        _operand: whether operations other than indexing make sense on it.
    """

    _operand: ClassVar[bool] = True
    __slots__ = ("_cell", "_recording", "_ref")

    def __init__(self, recording: Recording, ref: Ref, cell: Cell | None = None) -> None:
        self._recording = recording
        self._ref = ref
        self._cell = cell

    def result(self, location: Location | None = None) -> Any:
        """Returns what the run saved for this value.

        Raises:
            NoValueError: before the run, after a failed one, or if the value was not saved.
        """
        cell = self._cell
        if cell is not None and cell.filled:
            return cell.content
        location = location or here(3)
        what = f"`{self.written()}`"
        if self._recording.open:
            raise NoValueError(
                f"{what} has no value yet: the model runs when the outermost `with` block ends. "
                "Read it after the block, or keep computing with it here.",
                location,
            )
        if cell is None:
            raise NoValueError(
                f"{what} was not saved, so its value is gone: write `.save()` after it inside the "
                f"block, at\n{self._recording.graph[self._ref.index].location}",
                location,
            )
        raise NoValueError(f"{what} has no value: {cell.content.reason}", location)

    def written(self) -> str:
        """Returns the expression that this value stands for."""
        from insitu.graph.expression import expression

        return expression(self._recording.graph, self._ref.index)


def _described(item: object) -> str:
    kind = f"{type(item).__module__}.{type(item).__qualname__}".removeprefix("builtins.")
    return f"a value of type {kind}" if not callable(item) else f"a function ({kind})"


def _refuse_structure(recorded: Recorded, location: Location) -> NoReturn:
    written = recorded.written()
    raise OperationError(
        f"`{written}` is a tuple, not a tensor: write `{written}[0]` for its first element (of a "
        "transformer block, the hidden states).",
        location,
    )
