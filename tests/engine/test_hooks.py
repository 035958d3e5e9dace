"""Hooks of a pass beside other hooks, and beside those that come while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as everywhere

from insitu import Model


class Hooking(nn.Module):
    """Hangs a hook on its child in its forward, as Transformers does for hidden states."""

    def __init__(self, hook: Callable[..., object]) -> None:
        super().__init__()
        self.child = nn.Identity()
        self.hook = hook

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        handle = self.child.register_forward_hook(self.hook)
        try:
            return self.child(value)
        finally:
            handle.remove()


def test_a_librarys_hook_that_comes_during_the_run_notes_what_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noted: list[list[float]] = []

    def note(module: nn.Module, args: object, output: torch.Tensor) -> None:
        noted.append(output.tolist())

    note.__module__ = "torch.noting"
    model = Model(Hooking(note))
    with model.trace(torch.ones(2)):
        model.child.output = model.child.output * 5
        end = model.output.save()
    assert noted[0] == [5, 5] and end.tolist() == [5, 5]
    assert not model.child.module._forward_hooks


def test_two_names_of_a_module_are_written_in_the_order_of_their_lines() -> None:
    part = nn.Identity()
    model = Model(nn.ModuleDict({"one": part, "two": part}))
    model.module.forward = lambda value: part(value)
    with model.trace(torch.ones(2)):
        model["one"].output = model["one"].output + 1
        model["two"].output = model["two"].output * 10
        end = model.output.save()
    assert end.tolist() == [20, 20]


def test_backward_hooks_see_what_is_written() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    seen: list[torch.Tensor] = []
    module[1].register_full_backward_hook(lambda part, given, came: seen.append(came[0]))
    model = Model(module)
    with model.trace(torch.ones(1, 2, requires_grad=True)):
        model[1].output = model[1].output * 3
        grad = model[1].output.grad.save()
        model.output.sum().backward()
    assert torch.equal(seen[0], grad.value)


@pytest.mark.parametrize("registered", ["module", "everywhere"])
def test_hooks_before_a_forward_change_what_it_is_given(registered: str) -> None:
    module = nn.Sequential(nn.Identity())

    def before(part: nn.Module, args: Any) -> Any:
        return (args[0] * 3,) if part is module[0] else args

    if registered == "module":
        handle = module[0].register_forward_pre_hook(before)
    else:
        handle = everywhere.register_module_forward_pre_hook(before)
    model = Model(module)
    with handle, model.trace(torch.ones(2)):
        kept = model[0].output.save()
    assert kept.tolist() == [3, 3]


def test_a_module_is_as_before_when_its_run_ends_or_fails() -> None:
    module = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
    model = Model(module)
    before = [dict(vars(part)) for part in module.modules()]
    with model.trace(torch.ones(1, 2)):
        model[0].output.save()
    with pytest.raises(RuntimeError), model.trace(torch.ones(1, 5)):
        model[0].output.save()
        model[1].output.save()
    assert [dict(vars(part)) for part in module.modules()] == before


class Patched(nn.Identity):
    def _call_impl(self, value: torch.Tensor) -> torch.Tensor:
        return super()._call_impl(value) + 1


def test_calls_that_are_replaced_inside_are_kept() -> None:
    model = Model(nn.Sequential(Patched(), nn.Identity()))
    last = model[1].module
    vars(last)["_call_impl"] = lambda value: type(last)._call_impl(last, value) * 7
    with model.trace(torch.ones(2)):
        arrived = [model[0].output.save(), model[1].output.save()]
        end = model.output.save()
    assert arrived[0].tolist() == [1, 1] and end.tolist() == [14, 14]
    assert arrived[1].tolist() == [2, 2]


class Counting(nn.Module):
    """Calls a function after a child, in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Identity()

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return torch.exp(self.child(value))


def test_what_lines_do_to_a_childs_output_is_no_function_of_the_forward() -> None:
    model = Model(Counting())
    with model.trace(torch.zeros(2)):
        shifted = torch.exp(model.child.output).save()
        model.child.output = torch.exp(model.child.output) + 1
        found = model.ops.exp[0].output.save()
    assert shifted.tolist() == [1, 1]
    assert torch.equal(found.value, torch.full((2,), 2.0).exp())


class Named(nn.Module):
    """Takes arguments by names that a hook might have for its own."""

    def forward(self, value: torch.Tensor, **named: int) -> torch.Tensor:
        return value * sum(named.values())


def test_arguments_of_a_forward_may_have_any_name() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Named()

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            names = ("arrived", "first", "view", "module", "state", "args", "kwargs", "key")
            return self.part(value, **dict.fromkeys(names, 1))

    model = Model(Whole())
    with model.trace(torch.ones(2)):
        kept = model.part.output.save()
    assert kept.tolist() == [8, 8]
