"""Python's numbers, strings and lists, loops and structures stay small, whatever makes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from insitu import InsituError, Job, LimitError, Model, OperationError, apply, cond, fold
from insitu.display import graph_text
from tests.attack.jobs import READ, X, gpt, job_bytes, quick, ref, row, served, small

pytestmark = pytest.mark.no_wire

GROWING: dict[str, tuple[str, list[Any]]] = {
    "power": ("operator.pow", [ref(1), 10**8]),
    "shift": ("operator.lshift", [ref(1), 8 * 10**9]),
    "shift by a value": ("operator.lshift", [1024, ["int", (2**36).to_bytes(8, "little")]]),
    "format": ("operator.mod", ["%999999999d", ref(1)]),
    "format of width": ("operator.mod", ["%*d", ["tuple", [10**9, ref(1)]]]),
    "format of bytes": ("operator.mod", [["bytes", b"%999999999d"], ref(1)]),
    "list": ("operator.mul", [["list", [ref(1)]], 10**8]),
    "list on the right": ("operator.mul", [10**8, ["list", [ref(1)]]]),
    "tuple": ("operator.mul", [["tuple", [ref(1)]], 10**9]),
    "string": ("operator.mul", ["x" * 100, ["int", (10**9).to_bytes(8, "little")]]),
    "sections": ("torch.tensor_split", [ref(0), 10**8]),
    "shift by many bits": ("operator.lshift", [ref(1), 2**62]),
}


@pytest.mark.parametrize("name", GROWING)
def test_an_operation_on_pythons_values_makes_nothing_large(name: str) -> None:
    operation, args = GROWING[name]
    if not any(isinstance(arg, list) and "ref" in str(arg) for arg in args):
        args = [ref(1), *args[1:]] if name != "string" else [args[0], ref(1)]
        operation = "operator.mul" if name == "string" else operation
    names = ["read", "torch.numel", operation, "save"]
    model = small()
    data = job_bytes(model, names, [READ, row(1, ref(0)), row(2, *args), row(3, ref(2))])
    if name == "string":
        assert served(model, data)["0"] == "x" * 1200  # of 12 numbers: that is little
        return
    error = quick(lambda: served(model, data))
    assert isinstance(error, LimitError | OperationError)
    assert error.location is not None
    job = Job.from_bytes(data)
    assert quick(lambda: model.check(job)) is not None


def test_numbers_of_a_usual_size_are_computed() -> None:
    model = small()
    with model.trace(X):
        size = apply(lambda x: x.numel(), model[1].output)
        values = [(size << 40).save(), (size**20).save(), (size * 3 + 2).save(), (size % 5).save()]
        values += [(size * [1, 2])[:3].save(), (2**size).save()]
    assert [one.value for one in values] == [12 << 40, 12**20, 38, 2, [1, 2, 1], 2**12]


def test_the_bound_is_said_at_the_line_with_what_to_write() -> None:
    model = small()
    with pytest.raises(LimitError, match="makes an integer of about 10,004 bits") as caught:
        with model.trace(X):
            size = apply(lambda x: x.numel(), model[1].output)
            (size << 10_000).save()
    assert caught.value.limit == "values"
    assert (caught.value.allowed, caught.value.found) == (4096, 10_004)
    assert "size << 10_000" in str(caught.value)


def test_after_the_run_numbers_are_as_large_as_one_likes() -> None:
    model = small()
    with model.trace(X):
        size = apply(lambda x: x.numel(), model[1].output).save()
    assert size.value << 10_000 == 12 << 10_000
    assert (size << 10_000) == 12 << 10_000


def test_a_chain_of_products_is_bounded() -> None:
    model, names = small(), ["read", "torch.numel", "operator.mul", "save"]
    squares = [row(2, ref(at), ref(at)) for at in range(1, 40)]
    data = job_bytes(model, names, [READ, row(1, ref(0)), *squares, row(3, ref(40))])
    assert isinstance(quick(lambda: served(model, data)), LimitError)


@pytest.mark.parametrize("kind", ["tuple", "list"])
def test_a_chain_of_sums_of_lists_is_bounded(kind: str) -> None:
    model, names = small(), ["read", "torch.numel", "operator.add", "operator.getitem", "save"]
    whole = ["slice", None, None, None]
    first = row(3, [kind, [ref(1), ref(1)]], whole)
    sums = [row(2, ref(at), ref(at)) for at in range(2, 40)]
    data = job_bytes(model, names, [READ, row(1, ref(0)), first, *sums, row(4, ref(40))])
    assert isinstance(quick(lambda: served(model, data)), LimitError)


@pytest.mark.parametrize("size", [10**9, 2**40])
@pytest.mark.parametrize("name", ["Tensor.unbind", "torch.split", "Tensor.tolist", "torch.chunk"])
def test_a_tensor_without_memory_is_not_divided_into_many(name: str, size: int) -> None:
    model, names = small(), ["read", "operator.getitem", "Tensor.expand", name, "save"]
    more = {"torch.split": [1], "torch.chunk": [10**9]}.get(name, [])
    first = row(1, ref(0), ["tuple", [0, 0]])
    rows = [READ, first, row(2, ref(1), size), row(3, ref(2), *more), row(4, ref(3))]
    data = job_bytes(model, names, rows)
    assert isinstance(quick(lambda: served(model, data)), LimitError)
    assert quick(lambda: model.check(Job.from_bytes(data))) is not None or name == "Tensor.tolist"


def test_dividing_a_tensor_as_usual_works() -> None:
    model = small()
    with model.trace(X):
        hidden = model[1].output
        parts = [part.save() for part in hidden.split(2, dim=-1)]
        rows = hidden.unbind(0)[2].save()
        thirds = hidden.tensor_split(3)[1].save()
        numbers = hidden[0].tolist().save()
        whole = hidden.save()
    torch.testing.assert_close(torch.cat([part.value for part in parts], -1), whole.value)
    torch.testing.assert_close(rows.value, whole.value[2])
    torch.testing.assert_close(thirds.value, whole.value[1:2])
    assert numbers.value == whole.value[0].tolist()


def nested_folds(depth: int, items: int) -> list[Any]:
    body = ["function", [row(1, 0), row(1, 1), row(2, ref(0), 1)], ref(2), {}]
    xs = ["list", [0] * items]
    for _ in range(depth):
        body = ["function", [row(1, 0), row(1, 1), row(3, body, ref(0), xs)], ref(2), {}]
    return [READ, row(3, body, ref(0), xs), row(4, ref(1))]


@pytest.mark.parametrize(("depth", "items"), [(30, 2), (6, 20), (3, 200)])
def test_folds_in_folds_are_bounded_by_their_product(depth: int, items: int) -> None:
    model, names = small(), ["read", "input", "operator.add", "fold", "save"]
    data = job_bytes(model, names, nested_folds(depth, items))
    job = Job.from_bytes(data)
    assert isinstance(quick(lambda: model.run(job)), LimitError)
    assert isinstance(quick(lambda: model.check(job)), LimitError)


def test_a_fold_over_a_tensor_without_memory_is_bounded() -> None:
    model, names = small(), ["read", "input", "operator.add", "fold", "Tensor.expand", "save"]
    body = ["function", [row(1, 0), row(1, 1), row(2, ref(0), 1)], ref(2), {}]
    rows = [READ, row(4, ref(0), 10**9, 3, 4), row(3, body, ref(0), ref(1)), row(5, ref(2))]
    job = Job.from_bytes(job_bytes(model, names, rows))
    assert isinstance(quick(lambda: model.run(job)), LimitError)
    assert isinstance(quick(lambda: model.check(job)), LimitError)


def test_folds_of_a_usual_size_run() -> None:
    model = small()
    with model.trace(X):
        total = fold(lambda sum_, x: fold(lambda a, b: a + b, sum_, x), 0.0, model[1].output).save()
        whole = model[1].output.save()
    torch.testing.assert_close(total.value, whole.value.sum())


def test_a_structure_that_doubles_in_every_step_is_bounded() -> None:
    model, names = small(), ["read", "input", "fold", "save"]
    body = ["function", [row(1, 0), row(1, 1)], ["tuple", [ref(0), ref(0)]], {}]
    data = job_bytes(model, names, [READ, row(2, body, ref(0), ["list", [0] * 40]), row(3, ref(1))])
    assert isinstance(quick(lambda: served(model, data)), LimitError)


@pytest.mark.parametrize("through", ["getitem", "cond", "module"])
def test_a_structure_that_doubles_in_every_line_is_bounded(through: str) -> None:
    model = small()
    names = ["read", "operator.getitem", "input", "cond", "apply", "save"]
    body = ["function", [row(2, 0)], ["tuple", [ref(0), ref(0)]], {}]

    def doubled(at: int) -> list[Any]:
        pair = ["tuple", [ref(at), ref(at)]]
        if through == "getitem":
            return row(1, pair, ["slice", None, None, None])
        if through == "module":
            return row(4, ["module", "0"], pair)
        return row(3, True, body, body, ref(at))

    rows = [READ, *map(doubled, range(60)), row(5, ref(60))]
    data = job_bytes(model, names, rows)
    assert isinstance(quick(lambda: served(model, data)), LimitError)


def test_a_structure_that_gets_deeper_in_every_line_is_bounded() -> None:
    model, names = small(), ["read", "operator.getitem", "save"]
    deeper = [row(1, ["tuple", [ref(at)]], ["slice", None, None, None]) for at in range(3000)]
    data = job_bytes(model, names, [READ, *deeper, row(2, ref(3000))])
    assert isinstance(quick(lambda: served(model, data)), LimitError)


def test_an_error_is_as_short_as_a_line_whatever_its_expression_is_made_of() -> None:
    model = small()
    empty = row(1, ref(0), ["slice", 0, 0, None])  # values stay small, their text does not
    wide = [row(2, ["list", [ref(at)] * 20]) for at in range(1, 8)]
    rows = [READ, empty, *wide, row(3, ref(8), ["list", [7, 11]]), row(4, ref(9))]
    names = ["read", "operator.getitem", "torch.cat", "torch.reshape", "save"]
    job = Job.from_bytes(job_bytes(model, names, rows))
    error = quick(lambda: model.run(job))
    assert error is not None and "reshape" in str(error) and len(str(error)) < 5000
    assert quick(lambda: graph_text(job.blocks[0].graph)) is None
    assert quick(lambda: job.saves) is None


def test_an_error_is_short_whatever_its_arguments_are() -> None:
    model, names = small(), ["read", "torch.reshape", "torch.add", "torch.cat", "save"]
    many = ["list", [ref(0)] * 5000]
    for rows in (
        [READ, row(1, ref(0), ["list", [7] * 50_000]), row(4, ref(1))],
        [READ, row(2, ref(0), "x" * 100_000), row(4, ref(1))],
        [READ, row(2, ref(0), ["int", b"\x01" * 500]), row(4, ref(1))],
        [READ, row(3, many), row(1, ref(1), ["list", [7]]), row(4, ref(2))],
        [READ, row(3, ["list", [*many[1], 1]]), row(4, ref(1))],
    ):
        job = Job.from_bytes(job_bytes(model, names, rows))
        error = quick(lambda job=job: model.run(job))
        assert isinstance(error, InsituError) and len(str(error)) < 8000


class Learned(torch.nn.Module):
    """Returns its own parameter, buffer or cached table, as it is or as a view."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("buffer", torch.ones(4))
        self.table = torch.ones(4)
        self.what = what

    def forward(self, x: Any) -> Any:
        name, _, how = self.what.partition(" ")
        found = getattr(self, name)
        return {"view": found[:], "tuple": (found, x), "": found}[how]


class Net(torch.nn.Module):
    """A linear layer, learned positions, and a layer that writes into what it is given."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.positions, self.linear = Learned(what), torch.nn.Linear(4, 4)
        self.relu = torch.nn.ReLU(inplace=True)

    def forward(self, x: Any) -> Any:
        self.positions(x)
        return self.relu(self.linear(x)[0])


@pytest.mark.parametrize("what", ["weight", "buffer", "table", "weight view", "weight tuple"])
@pytest.mark.parametrize("way", ["apply", "cond", "site"])
def test_a_module_that_is_called_gives_nothing_away_that_can_be_written(
    what: str, way: str
) -> None:
    model = Model(Net(what).eval())
    module = model.module.positions
    with model.trace(X):
        hidden = model.linear.output
        if way == "cond":
            made = cond(hidden.sum() > -1e9, lambda x: model.positions(x), lambda x: x[0], hidden)
        else:
            made = model.positions(hidden)
        made = made[0] if what.endswith("tuple") else made
        if way == "site":  # the model itself writes into it next
            model.relu.input = made
        elif not what.endswith("tuple"):  # what a module returns parts of is not written in place
            made[:] = 0.0
        made.save()
    for tensor in (module.weight, module.buffer, module.table):
        assert bool((tensor == 1).all())


def test_normalising_weights_while_they_are_looked_up_does_not_write_into_the_model() -> None:
    model = gpt()
    weight = model.module.transformer.wte.weight
    before = weight.detach().clone()
    names = ["read", "operator.getitem", "functional.embedding", "save"]
    rows = [
        row(0, 0, "transformer.wte>embedding", "inputs", 0, 0),
        row(1, ref(0), 0),
        row(1, ref(1), 0),
        row(1, ref(1), 1),
        row(2, ref(2), ref(3), max_norm=0.01),
        row(3, ref(4)),
    ]
    with pytest.raises(InsituError, match="max_norm"):
        served(model, job_bytes(model, names, rows))
    assert torch.equal(weight, before)
    with pytest.raises(OperationError, match="renorm"), model.trace([[1, 2, 3]]):
        args = model.transformer.wte.ops.embedding[0].inputs[0]
        torch.nn.functional.embedding(args[0], args[1], max_norm=0.01).save()
    assert torch.equal(weight, before)
