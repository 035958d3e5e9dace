"""Objects that hold tensors in their attributes: copied with them, and told apart by their form."""

from __future__ import annotations

import threading
from collections import deque
from functools import partial
from typing import Any

import torch
from torch import nn

from insitu.graph.objects import form_of_object, is_object, map_objects, tensors_within


class State:
    def __init__(self, *tensors: torch.Tensor, **others: Any) -> None:
        self.tensors = [*tensors]
        self.others = others


def test_a_copy_shares_nothing_that_a_forward_could_fill() -> None:
    tensor, lock, layer = torch.ones(2), threading.Lock(), nn.Linear(1, 1)
    state = State(tensor, log=deque([tensor], 3), seen={1}, lock=lock, layer=layer)
    other = map_objects(torch.clone, {"state": state})["state"]
    other.tensors.append(tensor)
    other.tensors[0].zero_()
    other.others["log"].append(tensor)
    other.others["seen"].add(2)
    other.others["new"] = 1
    assert [*map(len, (state.tensors, state.others["log"], state.others["seen"]))] == [1, 1, 1]
    assert torch.equal(tensor, torch.ones(2)) and "new" not in state.others
    assert other.others["lock"] is lock and other.others["layer"] is layer
    assert other.others["log"].maxlen == 3


def test_what_is_one_object_stays_one() -> None:
    tensor = torch.ones(2)
    state = State(tensor, tensor)
    state.others["itself"] = state
    other, again = map_objects(torch.clone, (state, state))
    assert other is again is other.others["itself"]
    assert other.tensors[0] is other.tensors[1] is not tensor


def test_tensors_are_found_within_objects() -> None:
    first, second = torch.ones(1), torch.ones(2)
    found = tensors_within({"x": first, "state": State(second)})
    assert [id(tensor) for tensor in found] == [id(first), id(second)]
    assert not any(map(is_object, (first, 1, "x", nn.ReLU(), len, torch.float32)))


def test_forms_differ_where_shapes_or_constants_do() -> None:
    form = form_of_object(State(torch.ones(2), length=1))
    assert form == form_of_object(State(torch.zeros(2), length=1))
    assert form != form_of_object(State(torch.ones(3), length=1))
    assert form != form_of_object(State(torch.ones(2), length=2))
    assert form_of_object(partial(len, [1])) != form_of_object(partial(len, [2]))
