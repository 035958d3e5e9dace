from collections.abc import Callable
from typing import Any

import torch

from insitu.engine.plan import make_plan
from insitu.graph.encoding import add_node
from insitu.graph.intervention import write
from insitu.graph.location import here, mark
from insitu.graph.node import NO_KWARGS
from insitu.graph.operations import BY_NAME, READ
from insitu.graph.proxy import Proxy
from insitu.graph.recording import Recording

ADD = BY_NAME["operator.add"]


def test_nodes_are_grouped_by_the_sites_that_they_wait_for() -> None:
    recording = Recording()

    def read(path: str) -> Proxy:
        return Proxy(
            recording, add_node(recording, READ, (0, path, "output", 0, 0), NO_KWARGS, here())
        )

    def add(a: object, b: object) -> Proxy:
        return Proxy(recording, add_node(recording, ADD, (a, b), NO_KWARGS, here()))

    late, early = read("late"), read("early")  # nodes 0 and 1
    both = add(late, early)  # 2
    one = add(late, 1)  # 3
    more = add(one, both)  # 4
    more.save()  # 5
    plan = make_plan(recording.graph, recording.saves)
    assert plan.reads == {(0, "late", "output", 0, 0): 0, (0, "early", "output", 0, 0): 1}
    assert plan.bits == {0: 0b01, 1: 0b10}
    assert plan.groups == {0b11: [2, 4, 5], 0b01: [3]}
    assert plan.uses == [2, 1, 1, 1, 1, 1]
    assert plan.held == {0b01: [0, 3], 0b10: [1]}


def test_what_only_the_model_gets_is_not_copied() -> None:
    """A module may write into what it is given, so only what nothing else has goes as it is."""
    weight = torch.ones(3)

    def unshared(edit: Callable[[Any], Any]) -> int:
        recording = Recording()
        x = Proxy(recording, recording.read((0, "a", "output", 0, 0), mark()))
        write(recording, (0, "a", "output", 0, 0), edit(x), False, mark())
        return len(make_plan(recording.graph, recording.saves).unshared)

    assert unshared(lambda x: x * 0.5) == unshared(lambda x: weight - x) == 1
    assert unshared(lambda x: x * 2) == unshared(lambda x: x + x) == 0  # these may be tuples
    assert unshared(lambda x: x) == unshared(lambda x: weight) == unshared(lambda x: x[0]) == 0
    assert unshared(lambda x: (x * 0.5).view(-1)) == unshared(lambda x: (x * 0.5,)) == 0


def test_what_is_used_elsewhere_too_is_copied() -> None:
    recording = Recording()
    address = (0, "a", "output", 0, 0)
    x = Proxy(recording, recording.read(address, mark()))
    y = x * 0.5
    write(recording, address, y, False, mark())
    y.save()
    assert not make_plan(recording.graph, recording.saves).unshared
    recording = Recording()
    x = Proxy(recording, recording.read(address, mark()))
    write(recording, address, x * 0.5, False, mark())
    Proxy(recording, recording.read(address, mark())).save()  # what stands there now
    assert not make_plan(recording.graph, recording.saves).unshared
