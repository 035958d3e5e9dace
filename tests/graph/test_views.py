"""Writes in place as pure operations, against torch's own writes into copies."""

# pyright: reportPrivateUsage=false

import contextlib
import itertools
import random
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from insitu.engine.copies import reusable
from insitu.graph import wire
from insitu.graph.encoding import add_node, encode
from insitu.graph.errors import OperationError
from insitu.graph.evaluation import meaning
from insitu.graph.location import mark
from insitu.graph.node import NO_KWARGS, Address, Graph, Ref
from insitu.graph.operations import BY_NAME, GETITEM, READ, SETITEM, Operation, put_into
from insitu.graph.put import put
from insitu.graph.recorded import Recorded
from insitu.graph.recording import Recording
from insitu.graph.structure import map_structure, tensors_of
from insitu.graph.view_operations import SOMETIMES_VIEWS, VIEWS
from insitu.graph.views import Views

MARK = mark()
_MULTIPLY, _ADD = BY_NAME["Tensor.mul_"], BY_NAME["operator.add"]


class Lines:
    """Records lines as a block does, and computes their graph on what arrives at its sites."""

    def __init__(self, **arriving: Any) -> None:
        self.recording = Recording()
        self.arriving = arriving
        self.views = Views(self.recording.graph, self._shares)

    def site(self, path: str) -> Ref:
        return self.recording.read(_address(path), MARK)

    def do(self, name: str | Operation, value: Ref, *args: Any, **kwargs: Any) -> Ref:
        operation = BY_NAME[name] if isinstance(name, str) else name
        given = [map_structure(self._now, arg) for arg in args]
        if operation.in_place:
            inputs: list[int] = []
            encoded = tuple(encode(self.recording, arg, inputs, MARK) for arg in given)
            place = self.views.located(value, MARK)
            return self.views.put(place, operation, encoded, kwargs, inputs, True, MARK)
        return add_node(self.recording, operation, (self._now(value), *given), kwargs, MARK)

    def run(self) -> list[Any]:
        values: list[Any] = []

        def leaf(item: Any) -> Any:
            return meaning(item, values, _no_module)

        for operation, args, kwargs, *_ in self.recording.graph.rows:
            if operation is READ:
                values.append(self.arriving[args[1]])
                continue
            args, kwargs = map_structure(leaf, (args, dict(kwargs)))
            values.append(operation.function(*args, **kwargs))
        return values

    def _now(self, value: Any) -> Any:
        return Recorded(self.recording, self.views.resolved(value)) if _is_ref(value) else value

    def _shares(self, index: int) -> bool:
        values = self.run()
        inputs = self.recording.graph.rows[index][3]
        held = {t.untyped_storage()._cdata for source in inputs for t in tensors_of(values[source])}
        return any(t.untyped_storage()._cdata in held for t in tensors_of(values[index]))


def _address(path: str) -> Address:
    return (0, path, "output", 0, 0)


def _is_ref(value: Any) -> bool:
    return isinstance(value, Ref)


def _no_module(path: str) -> Callable[..., Any]:
    raise AssertionError(path)


def test_lines_after_a_write_see_it_and_lines_before_do_not() -> None:
    x = torch.arange(12.0).view(1, 3, 4)
    lines = Lines(x=x)
    site = lines.site("x")
    last = lines.do(GETITEM, site, (slice(None), -1))
    before = lines.do(_ADD, last, 0)
    other = lines.do("Tensor.transpose", site, 1, 2)
    returned = lines.do(_MULTIPLY, last, 2)
    after = [lines.do(_ADD, value, 0) for value in (last, returned, other, site)]
    values = lines.run()
    right = x.clone()
    right[:, -1] *= 2
    assert torch.equal(values[before.index], x[:, -1])
    expected = (right[:, -1], right[:, -1], right.transpose(1, 2), right)
    for node, value in zip(after, expected, strict=True):
        assert torch.equal(values[node.index], value)
    (read, given), *others = lines.recording.graph.writes.items()
    assert read == site.index and not others
    assert torch.equal(values[given], right)
    assert torch.equal(x, torch.arange(12.0).view(1, 3, 4))  # what arrived is never written


def test_two_sites_in_one_memory_are_two_values() -> None:
    x = torch.ones(2, 3)
    lines = Lines(x=x, y=x)
    lines.do(SETITEM, lines.site("x"), 0, 5.0)
    other = lines.do(_ADD, lines.site("y"), 0)
    assert torch.equal(lines.run()[other.index], torch.ones(2, 3))
    assert set(lines.recording.graph.writes) == {lines.site("x").index}


@pytest.mark.parametrize("contiguous", [True, False])
def test_reshape_is_a_view_where_the_strides_of_the_value_allow_it(contiguous: bool) -> None:
    x = torch.arange(24.0).view(2, 3, 4)
    x = x if contiguous else x.transpose(1, 2)
    lines = Lines(x=x)
    flat = lines.do("Tensor.reshape", lines.site("x"), -1)
    lines.do(SETITEM, flat, slice(0, 5), 0.0)
    site, seen = lines.do(_ADD, lines.site("x"), 0), lines.do(_ADD, flat, 0)
    copy = torch.empty_strided(x.shape, x.stride()).copy_(x)
    part = copy.reshape(-1)
    part[:5] = 0
    values = lines.run()
    assert torch.equal(values[site.index], copy)
    assert torch.equal(values[seen.index], part)


def test_a_view_whose_strides_are_others_at_the_run_is_refused_and_not_lost() -> None:
    x = torch.arange(24.0).view(2, 3, 4).transpose(1, 2)
    steps = [("Tensor.reshape", 0, (-1,), NO_KWARGS)]
    with pytest.raises(OperationError, match="this part has memory of its own in the run"):
        put(x, steps, torch.Tensor.mul_, (0,), NO_KWARGS, lambda name: BY_NAME[name].function)


def test_an_entry_of_a_tuple_is_written_in_a_new_tuple() -> None:
    x, cache = torch.ones(1, 3), torch.zeros(2)
    lines = Lines(x=(x, {"cache": cache}))
    site = lines.site("x")
    hidden = lines.do(GETITEM, site, 0)
    lines.do(SETITEM, hidden, (slice(None), 1), 7.0)
    entry = lines.do(GETITEM, lines.do(GETITEM, site, 1), "cache")
    lines.do("Tensor.add_", entry, 3.0)
    given = lines.run()[lines.recording.graph.writes[site.index]]
    assert torch.equal(given[0], torch.tensor([[1.0, 7.0, 1.0]]))
    assert torch.equal(given[1]["cache"], torch.full((2,), 3.0))
    assert torch.equal(x, torch.ones(1, 3)) and torch.equal(cache, torch.zeros(2))


def test_a_write_to_a_computed_value_reaches_no_site() -> None:
    lines = Lines(x=torch.ones(2, 2))
    made = lines.do(_ADD, lines.site("x"), 1.0)
    lines.do(SETITEM, made, 0, 0.0)
    seen = lines.do(_ADD, made, 0)
    assert torch.equal(lines.run()[seen.index], torch.tensor([[0.0, 0.0], [2.0, 2.0]]))
    assert not lines.recording.graph.writes


def test_an_index_counts_as_it_was_where_the_view_was_recorded() -> None:
    index = torch.tensor([0, 1])
    lines = Lines(x=torch.zeros(3), i=index)
    where = lines.site("i")
    taken = lines.do(GETITEM, lines.site("x"), where)  # a copy, as in torch
    lines.do("Tensor.fill_", taken, 5.0)
    seen = lines.do(_ADD, lines.site("x"), 0)
    lines.do(SETITEM, lines.site("x"), where, 4.0)
    lines.do("Tensor.fill_", where, 2)
    lines.do(SETITEM, lines.site("x"), where, 9.0)
    values = lines.run()
    assert torch.equal(values[seen.index], torch.zeros(3))
    written = values[lines.recording.graph.writes[lines.site("x").index]]
    assert torch.equal(written, torch.tensor([4.0, 4.0, 9.0]))


def test_a_computed_number_as_an_index_gives_a_view() -> None:
    lines = Lines(x=torch.ones(3, 2), i=torch.tensor(1))
    part = lines.do(GETITEM, lines.site("x"), (lines.site("i"), slice(None)))
    number = lines.do(GETITEM, lines.site("x"), lines.site("i"))
    assert not lines.recording.graph.writes
    key = lines.recording.graph.rows[number.index][1][1]
    assert key == lines.site("i")
    lines.do(_MULTIPLY, number, 4.0)
    seen = lines.do(_ADD, lines.site("x"), 0)
    again = lines.do(_ADD, part, 0)
    values = lines.run()
    assert values[seen.index].tolist() == [[1, 1], [4, 4], [1, 1]]
    assert values[again.index].tolist() == [4, 4]


def test_an_augmented_assignment_to_a_part_is_one_write() -> None:
    lines = Lines(x=torch.ones(2, 2))
    site = lines.site("x")
    part = lines.do("operator.iadd", lines.do(GETITEM, site, 0), 1.0)
    assert lines.views.holds(site, part, 0)
    assert not lines.views.holds(site, part, 1)


@pytest.mark.parametrize("name", ["unbind", "split", "chunk", "tensor_split", "vsplit"])
def test_one_of_several_views_is_written_while_autograd_records(name: str) -> None:
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    factor = torch.tensor(3.0, requires_grad=True)
    lines = Lines(x=x, f=factor)
    args = () if name == "unbind" else (1,) if name == "split" else (2,)
    parts = lines.do(f"Tensor.{name}", lines.site("x"), *args)
    lines.do(_MULTIPLY, lines.do(GETITEM, parts, 1), lines.site("f"))
    written = lines.run()[lines.recording.graph.writes[lines.site("x").index]]
    gradients = torch.autograd.grad(written.sum(), (x, factor))
    assert torch.equal(gradients[0], torch.tensor([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]]))
    assert gradients[1].item() == 3 + 4 + 5


def test_views_of_several_values_are_seen_and_not_written() -> None:
    lines = Lines(x=torch.ones(3), y=torch.ones(1))
    both = Recorded(lines.recording, lines.site("x")), Recorded(lines.recording, lines.site("y"))
    views = add_node(lines.recording, BY_NAME["torch.broadcast_tensors"], both, NO_KWARGS, MARK)
    with pytest.raises(OperationError, match="views of several values at once"):
        lines.do(_MULTIPLY, lines.do(GETITEM, views, 1), 2.0)
    part = lines.do(GETITEM, views, 1)
    lines.do("Tensor.fill_", lines.site("y"), 7.0)
    seen, again = lines.do(_ADD, part, 0), lines.do(_ADD, part, 1)
    values = lines.run()
    assert values[part.index].tolist() == [1, 1, 1]
    assert values[seen.index].tolist() == [7, 7, 7]
    assert values[again.index].tolist() == [8, 8, 8]


def test_a_write_names_only_operations_of_the_registry() -> None:
    for steps, name in (
        ((), "Tensor.mul"),
        ((), "eval"),
        ([("Tensor.mul_", 0, (2,), {})], "Tensor.mul_"),
    ):
        with pytest.raises(ValueError, match="is no operation of a write"):
            BY_NAME["put"].function(torch.ones(2), steps, name, 2)


def test_a_write_travels_as_bytes() -> None:
    lines = Lines(x=torch.ones(2, 3))
    part = lines.do(GETITEM, lines.site("x"), (slice(None), -1))
    lines.do(_MULTIPLY, part, 2.0)
    graph = lines.recording.graph
    received = wire.from_bytes(wire.to_bytes(graph))
    assert [row[:4] for row in received.rows] == [row[:4] for row in graph.rows]


# Arguments that some operations take behind a tensor.
ARGUMENTS: tuple[tuple[Any, ...], ...] = (
    (), (0,), (1,), (0, 1), ((2, 3),), ((0, 1),), (0, 0, 1), ((2, 3), (3, 1)), ("cpu",),
    (torch.float32,), (torch.zeros(2, 3),), (0, 0, 2), (0, (2,)), (0, (1, 2)),
)  # fmt: skip


def shares(operation: Operation) -> bool:
    """Whether an operation returns memory of its first argument, for some of those arguments."""
    kinds = (torch.randn(2, 3), torch.randn(2, 3, dtype=torch.complex64), torch.ones(2, 3).long())
    for base, args in itertools.product(kinds, ARGUMENTS):
        value = base.clone()
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            made = operation.function(value, *args)
            if value._version:  # `inplace=True`
                continue
            for one in made if isinstance(made, tuple | list) else [made]:
                storage = one.untyped_storage()._cdata
                if storage == value.untyped_storage()._cdata:
                    return True
    return False


def test_every_operation_that_may_return_a_view_is_taken_for_one() -> None:
    """A write through any other would be lost. What is tried are all operations that there are."""
    known = VIEWS | SOMETIMES_VIEWS
    known |= {"getitem", "attribute", "read", "put", "write", "save"}
    tried = [one for one in BY_NAME.values() if not one.in_place and one.short not in known]
    assert len(tried) > 300
    assert [one.name for one in tried if shares(one)] == []
    assert shares(BY_NAME["Tensor.transpose"]) and shares(BY_NAME["Tensor.conj"])


def test_a_thousand_writes_copy_once() -> None:
    lines = Lines(x=torch.zeros(1024))
    site = lines.site("x")
    for place in range(1024):
        lines.do(SETITEM, site, place, 1.0)
    rows = lines.recording.graph.rows
    puts = [index for index, row in enumerate(rows) if row[0].name == "put"]
    assert len(puts) == 1024 and len(rows) < 3 * 1024
    assert reusable(Graph(rows), [1] * len(rows)) == dict.fromkeys(puts[1:], put_into(0))


@pytest.mark.parametrize("view", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_a_copy_stays_where_an_older_value_is_still_needed(view: bool, late: bool) -> None:
    lines = Lines(x=torch.zeros(4), y=torch.ones(4))
    site = lines.site("x")
    lines.do(SETITEM, site, 0, 1.0)
    older = lines.do("Tensor.view", site, 2, 2) if view else lines.views.resolved(site)
    other = lines.site("y")
    used = add_node(lines.recording, _ADD, (Recorded(lines.recording, older), 1.0), NO_KWARGS, MARK)
    lines.do(SETITEM, site, 1, 1.0)
    second = lines.recording.graph.writes[site.index]
    rows = lines.recording.graph.rows
    needs = [1] * len(rows)
    needs[other.index] = 2
    assert reusable(Graph(rows), needs).keys() == {second}
    if late:  # a later site lets the line before the write run after it
        needs[used.index] = 3
    else:  # a value that the write itself reads is a view of what it would write into
        operation, args, kwargs, inputs, nested, mark = rows[second]
        rows[second] = (
            operation,
            (*args[:-1], older),
            kwargs,
            (*inputs, older.index),
            nested,
            mark,
        )
    if not late and not view:
        assert inputs[0] == older.index
    assert not reusable(Graph(rows), needs)


_VIEWS: Mapping[str, tuple[Any, ...]] = {
    "Tensor.transpose": (0, -1),
    "Tensor.unsqueeze": (0,),
    "Tensor.flatten": (),
    "Tensor.reshape": (-1, 2),
    "Tensor.contiguous": (),
    "Tensor.narrow": (0, 0, 1),
    "Tensor.unfold": (0, 1, 1),
    "Tensor.detach": (),
    "Tensor.diagonal": (),
}


@pytest.mark.parametrize("seed", range(150))
def test_random_lines_mean_what_they_mean_in_torch(seed: int) -> None:
    dice = random.Random(seed)
    x = torch.arange(48.0).view(4, 3, 4)
    x = x.transpose(0, 1) if dice.random() < 0.4 else x
    lines = Lines(x=x)
    copy = torch.empty_strided(x.shape, x.stride()).copy_(x)
    pairs: list[tuple[Ref, torch.Tensor]] = [(lines.site("x"), copy)]
    seen: list[tuple[Ref, torch.Tensor]] = []
    for _ in range(14):
        node, tensor = dice.choice(pairs)
        roll = dice.random()
        if roll < 0.2 and tensor.ndim:
            key = dice.choice([0, -1, slice(0, 2), (..., 0), slice(None, None, 2)])
            pairs.append((lines.do(GETITEM, node, key), tensor[key]))
        elif roll < 0.45 and tensor.ndim > 1:
            name = dice.choice(list(_VIEWS))
            if name == "Tensor.reshape" and tensor.numel() % 2:
                continue
            args = _VIEWS[name]
            pairs.append((lines.do(name, node, *args), BY_NAME[name].function(tensor, *args)))
        elif roll < 0.55:
            pairs.append((lines.do(_ADD, node, 1.0), tensor + 1.0))
        elif roll < 0.75:
            factor = dice.choice([2.0, -1.0, 0.5])
            lines.do(_MULTIPLY, node, factor)
            tensor.mul_(factor)
        elif roll < 0.85 and tensor.ndim:
            lines.do(SETITEM, node, 0, 3.0)
            tensor[0] = 3.0
        else:
            other, value = dice.choice(pairs)
            if value.numel() == 1 or value.shape == tensor.shape:
                lines.do("Tensor.add_", node, other)
                tensor.add_(value.clone())
        node, tensor = dice.choice(pairs)
        seen.append((lines.do(_ADD, node, 0.0), tensor.clone()))
    values = lines.run()
    for node, value in seen:
        assert torch.equal(values[node.index], value)
    given = lines.recording.graph.writes.get(0)
    assert torch.equal(x if given is None else values[given], copy)
