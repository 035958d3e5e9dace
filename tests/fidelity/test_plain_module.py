"""Every feature on a plain `nn.Module` with all that is unusual in one, against plain hooks.

A module called twice, two modules with one weight, arguments by keyword only, and dictionaries.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from insitu import Model, NeverRanError, apply, cond, fold

Value = Any
Edits = dict[tuple[str, str, int], Callable[[Value], Value]]


class Split(nn.Module):
    """Takes a keyword and returns a dictionary."""

    def forward(self, *, h: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"left": h[:, :2], "right": h[:, 2:] * 2}


class Mix(nn.Module):
    """Takes two keywords, and calls torch functions between which there is no module."""

    def forward(self, *, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.softmax(left, -1), torch.tanh(right)], -1)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.split = Split()
        self.mix = Mix()
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.twice.weight

    def forward(self, *, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        h = self.twice(self.twice(x))
        parts = self.split(h=h)
        mixed = self.mix(right=parts["right"], left=parts["left"])
        return {"mixed": mixed, "scores": self.tied(mixed) * scale}


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model(Odd())


X = torch.linspace(-2, 2, 12).view(3, 4)
OTHER = X.flip(0) * 1.5


def run(module: nn.Module, edits: Edits, x: torch.Tensor = X, **kwargs: Any) -> dict[str, Value]:
    """The oracle: the model's output, with functions applied in plain hooks to what passes.

    Args:
        module: the model.
        edits: functions by a module's path, "output" or "inputs", and which of its calls. What one
            returns takes the place of what passes, unless it is None.
        x: the input.
        kwargs: other arguments.
    """
    calls: Counter[tuple[str, str]] = Counter()
    handles: list[Any] = []

    def passing(path: str, kind: str, value: Value) -> Value:
        calls[path, kind] += 1
        edit = edits.get((path, kind, calls[path, kind] - 1))
        return None if edit is None else edit(value)

    for path in {path for path, _, _ in edits}:

        def after(module: nn.Module, args: Any, output: Value, path: str = path) -> Value:
            return passing(path, "output", output)

        def before(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> Value:
            return passing(path, "inputs", (args, kwargs))

        part = module.get_submodule(path)
        handles.append(part.register_forward_hook(after))
        handles.append(part.register_forward_pre_hook(before, with_kwargs=True))
    try:
        return module(x=x, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def kept(values: dict[Any, Value], key: Any) -> Callable[[Value], Value]:
    """An edit that changes nothing and keeps what passes."""

    def edit(value: Value) -> None:
        values[key] = value

    return edit


def test_reads(model: Model) -> None:
    with model.trace(x=X, scale=2.0) as tracer:
        left = model.split.output["left"].save()
        keyword = model.split.inputs[1]["h"].save()
        right = model.mix.inputs[1]["right"].save()
        given = model.mix.input.save()
        second = model.twice.call(1).output.save()
        first = model.twice.output.save()
        scores = tracer.output["scores"].save()
    seen: dict[str, Value] = {}
    with torch.no_grad():
        output = run(
            model.module,
            {
                ("twice", "output", 0): kept(seen, "first"),
                ("twice", "output", 1): kept(seen, "second"),
                ("split", "output", 0): kept(seen, "split"),
                ("mix", "inputs", 0): kept(seen, "mix"),
            },
            scale=2.0,
        )
    assert torch.equal(first.value, seen["first"]) and torch.equal(second.value, seen["second"])
    assert torch.equal(keyword.value, seen["second"])
    assert torch.equal(left.value, seen["split"]["left"])
    assert torch.equal(right.value, seen["mix"][1]["right"])
    # The first argument is that of the signature, and not the one that the call names first.
    assert torch.equal(given.value, seen["mix"][1]["left"])
    assert torch.equal(scores.value, output["scores"])


def test_writes(model: Model) -> None:
    with model.trace(x=X) as tracer:
        again = model.twice.call(1)
        again.output = again.output * 0.5
        model.split.output["right"] = model.split.output["left"] + 1
        args, kwargs = model.mix.inputs
        model.mix.inputs = (args, {"left": kwargs["right"], "right": kwargs["left"]})
        output = tracer.output.save()
    with torch.no_grad():
        expected = run(
            model.module,
            {
                ("twice", "output", 1): lambda h: h * 0.5,
                ("split", "output", 0): lambda parts: {**parts, "right": parts["left"] + 1},
                ("mix", "inputs", 0): lambda given: (
                    given[0],
                    {"left": given[1]["right"], "right": given[1]["left"]},
                ),
            },
        )
    assert all(torch.equal(output.value[key], expected[key]) for key in expected)


def test_a_keyword_is_written_as_the_first_argument(model: Model) -> None:
    with model.trace(x=X) as tracer:
        model.split.input = model.split.input - 1
        scores = tracer.output["scores"].save()
    with torch.no_grad():
        edit: Edits = {("split", "inputs", 0): lambda given: (given[0], {"h": given[1]["h"] - 1})}
        assert torch.equal(scores.value, run(model.module, edit)["scores"])


def test_writes_in_place(model: Model) -> None:
    def second(h: Value) -> None:
        h[:, 1] += 1

    def split(parts: Value) -> None:
        parts["left"] = parts["left"].clone()
        parts["left"][:, 0] = 0
        parts["right"] = parts["right"] * 3

    with model.trace(x=X) as tracer:
        before = model.twice.call(1).output.save()
        parts = model.split.output
        second(model.twice.call(1).output)
        parts["left"][:, 0] = 0
        parts["right"].mul_(3)
        after = model.twice.call(1).output.save()
        output = tracer.output["scores"].save()
    seen: dict[str, Value] = {}

    def twin(h: Value) -> None:
        seen["before"] = h.clone()
        second(h)
        seen["after"] = h

    with torch.no_grad():
        expected = run(model.module, {("twice", "output", 1): twin, ("split", "output", 0): split})
    assert torch.equal(before.value, seen["before"])
    assert torch.equal(after.value, seen["after"])
    assert torch.equal(output.value, expected["scores"])


def test_values_of_another_invocation(model: Model) -> None:
    with model.trace() as tracer:
        with tracer.invoke(x=X) as one:
            first = model.twice.output
            early = one.output["scores"].save()
        with tracer.invoke(x=OTHER):
            donor = model.twice.output
        with tracer.invoke(x=X) as two:
            model.twice.output = donor
            model.mix.output = model.mix.output + first
            late = two.output["scores"].save()
    with torch.no_grad():
        seen: dict[str, Value] = {}
        run(model.module, {("twice", "output", 0): kept(seen, "donor")}, OTHER)
        plain = run(model.module, {("twice", "output", 0): kept(seen, "first")})
        edits: Edits = {
            ("twice", "output", 0): lambda h: seen["donor"],
            ("mix", "output", 0): lambda mixed: mixed + seen["first"],
        }
        assert torch.equal(early.value, plain["scores"])
        assert torch.equal(late.value, run(model.module, edits)["scores"])


def test_modules_are_functions(model: Model) -> None:
    with model.trace(x=X) as tracer:
        h = model.twice.output
        outside = model.tied(h).save()
        parts = model.split(h=h)
        mixed = model.mix(left=parts["left"], right=parts["right"]).save()
        second = model.twice.call(1).output.save()  # no call of ours counts
        scores = tracer.output["scores"].save()
    module, seen = model.module, dict[str, Value]()
    with torch.no_grad():
        expected = run(module, {("twice", "output", 0): kept(seen, "first")})
        parts = module.split(h=seen["first"])
        assert torch.equal(outside.value, module.tied(seen["first"]))
        assert torch.equal(mixed.value, module.mix(**parts))
        assert torch.equal(second.value, module.twice(seen["first"]))
        assert torch.equal(scores.value, expected["scores"])


def test_gradients(model: Model) -> None:
    module = model.module
    with model.trace(x=X) as tracer:
        grads = [
            model.twice.output.grad.save(),
            model.twice.call(1).output.grad.save(),
            model.split.output["right"].grad.save(),
        ]
        tracer.output["scores"].square().sum().backward()
    seen: dict[str, Value] = {}
    output = run(
        module,
        {
            ("twice", "output", 0): kept(seen, 0),
            ("twice", "output", 1): kept(seen, 1),
            ("split", "output", 0): kept(seen, 2),
        },
    )
    values = [seen[0], seen[1], seen[2]["right"]]
    expected = torch.autograd.grad(output["scores"].square().sum(), values)
    assert all(torch.equal(g.value, e) for g, e in zip(grads, expected, strict=True))
    assert all(parameter.grad is None for parameter in module.parameters())


def test_the_gradient_of_a_weight_of_two_modules_that_runs_three_times(model: Model) -> None:
    weight = model.module.tied.weight
    with model.trace(x=X) as tracer:
        (gradient,) = tracer.output["scores"].sum().backward(inputs=[weight])
        found = gradient.save()
    (expected,) = torch.autograd.grad(run(model.module, {})["scores"].sum(), weight)
    assert torch.equal(found.value, expected)
    assert weight.grad is None


def test_written_gradients_and_a_tensor_that_is_trained(model: Model) -> None:
    vector = torch.zeros(4, requires_grad=True)
    with model.trace(x=X) as tracer:
        model.twice.output = model.twice.output + vector
        model.twice.call(1).output.grad *= 2
        early = model.twice.output.grad.save()
        tracer.output["scores"].sum().backward()
    twin = torch.zeros(4, requires_grad=True)
    seen: dict[str, Value] = {}

    def first(h: Value) -> Value:
        seen["early"] = h + twin
        return seen["early"]

    def second(h: Value) -> None:
        h.register_hook(lambda grad: grad * 2)

    output = run(model.module, {("twice", "output", 0): first, ("twice", "output", 1): second})
    expected = torch.autograd.grad(output["scores"].sum(), [seen["early"], twin])
    assert torch.equal(early.value, expected[0])
    assert torch.equal(vector.grad, expected[1])


def test_one_of_two_calls_is_skipped(model: Model) -> None:
    with model.trace(x=X) as tracer:
        again = model.twice.call(1)
        again.skip(again.input + 1)
        scores = tracer.output["scores"].save()
    with torch.no_grad():
        seen: dict[str, Value] = {}
        edits: Edits = {
            ("twice", "output", 0): kept(seen, "first"),
            ("twice", "output", 1): lambda h: seen["first"] + 1,
        }
        assert torch.equal(scores.value, run(model.module, edits)["scores"])


def test_a_dictionary_stands_for_a_module_and_the_run_ends_after_another(model: Model) -> None:
    ran: list[torch.Tensor] = []
    handle = model.module.tied.register_forward_hook(lambda *args: ran.append(args[-1]))
    with model.trace(x=X):
        h = model.split.inputs[1]["h"]
        model.split.skip({"left": h[:, 2:], "right": h[:, :2]})
        model.mix.stop()
        mixed = model.mix.output.save()
    handle.remove()
    assert torch.Tensor not in map(type, ran)  # but for fake ones, when shapes are looked up
    with torch.no_grad():
        seen: dict[str, Value] = {}

        def swapped(parts: Value) -> Value:
            return {"left": seen["h"][:, 2:], "right": seen["h"][:, :2]}

        edits: Edits = {("twice", "output", 1): kept(seen, "h"), ("split", "output", 0): swapped}
        assert torch.equal(mixed.value, run(model.module, edits)["mixed"])
    with pytest.raises(NeverRanError), model.trace(x=X):
        model.mix.stop()
        model.tied.output.save()


def test_functions_inside_of_a_forward(model: Model) -> None:
    with model.trace(x=X) as tracer:
        softmax = model.mix.ops.softmax[0]
        arriving = softmax.input.save()
        softmax.output[:, 0] = 0.5
        tanh = model.mix.ops.tanh[0].output
        tanh.zero_()
        mixed = model.mix.output.save()
        scores = tracer.output["scores"].save()

    def mix(_: Value) -> Value:
        pattern = torch.softmax(seen["split"]["left"], -1)
        pattern[:, 0] = 0.5
        return torch.cat([pattern, torch.tanh(seen["split"]["right"]).zero_()], -1)

    seen: dict[str, Value] = {}
    with torch.no_grad():
        edits: Edits = {("split", "output", 0): kept(seen, "split"), ("mix", "output", 0): mix}
        expected = run(model.module, edits)
    assert torch.equal(arriving.value, seen["split"]["left"])
    assert torch.equal(mixed.value, expected["mixed"])
    assert torch.equal(scores.value, expected["scores"])


def test_control_flow_and_python_functions(model: Model) -> None:
    def busiest(parts: dict[str, torch.Tensor]) -> torch.Tensor:
        return max(parts.values(), key=lambda part: float(part.norm()))

    with model.trace(x=X) as tracer:
        parts = model.split.output
        chosen = cond(
            parts["left"].norm() > parts["right"].norm(), lambda p: p, torch.neg, parts["left"]
        )
        total = fold(lambda sum, row: sum + row, torch.zeros(2), parts["left"])
        model.split.output["left"] = chosen + total
        found = apply(busiest, {"left": parts["left"], "right": parts["right"]}).save()
        scores = tracer.output["scores"].save()

    def split(parts: Value) -> Value:
        seen["parts"] = dict(parts)
        left, right = parts["left"], parts["right"]
        chosen = left if left.norm() > right.norm() else -left
        total = torch.zeros(2)
        for row in left:
            total = total + row
        return {**parts, "left": chosen + total}

    seen: dict[str, Value] = {}
    with torch.no_grad():
        expected = run(model.module, {("split", "output", 0): split})
    assert torch.equal(found.value, busiest(seen["parts"]))
    assert torch.equal(scores.value, expected["scores"])


def test_edits_and_sessions(model: Model) -> None:
    with model.edit() as edited:
        edited.twice.call(1).output[:, 0] = 0
        edited.split.output["right"] = edited.split.output["right"] + 1
    with edited.session():
        with edited.trace(x=OTHER):
            donor = edited.twice.output
        with edited.trace(x=X) as tracer:
            edited.twice.output = donor
            scores = tracer.output["scores"].save()
    with model.trace(x=X) as tracer:
        untouched = tracer.output["scores"].save()

    def second(h: Value) -> None:
        h[:, 0] = 0

    with torch.no_grad():
        seen: dict[str, Value] = {}
        run(model.module, {("twice", "output", 0): kept(seen, "donor")}, OTHER)
        edits: Edits = {
            ("twice", "output", 0): lambda h: seen["donor"],
            ("twice", "output", 1): second,
            ("split", "output", 0): lambda parts: {**parts, "right": parts["right"] + 1},
        }
        assert torch.equal(scores.value, run(model.module, edits)["scores"])
        assert torch.equal(untouched.value, run(model.module, {})["scores"])
