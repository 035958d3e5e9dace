from insitu.graph.location import here
from insitu.graph.operations import BY_NAME, READ
from insitu.graph.proxy import Proxy
from insitu.graph.recording import NO_KWARGS, Recording
from insitu.runtime.plan import make_plan

ADD = BY_NAME["operator.add"]


def test_nodes_are_grouped_by_the_sites_that_they_wait_for() -> None:
    recording = Recording()

    def read(path: str) -> Proxy:
        return Proxy(recording, recording.apply(READ, (0, path, "output", 0, 0), NO_KWARGS, here()))

    def add(a: object, b: object) -> Proxy:
        return Proxy(recording, recording.apply(ADD, (a, b), NO_KWARGS, here()))

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
