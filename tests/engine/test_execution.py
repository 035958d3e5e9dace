import itertools

import pytest
import torch

from insitu import ExecutionError, ShapeError
from insitu.engine.execution import Execution
from insitu.engine.plan import make_plan
from insitu.graph.encoding import add_node
from insitu.graph.location import here
from insitu.graph.node import NO_KWARGS
from insitu.graph.operations import BY_NAME, READ
from insitu.graph.proxy import Proxy
from insitu.graph.recording import Recording


def recorded(recording: Recording, name: str, *args: object) -> Proxy:
    return Proxy(recording, add_node(recording, BY_NAME[name], args, NO_KWARGS, here()))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_of_arrival_does_not_matter(order: tuple[int, ...]) -> None:
    recording = Recording()
    a, b, c = (
        Proxy(recording, add_node(recording, READ, (0, path, "output", 0, 0), NO_KWARGS, here()))
        for path in "abc"
    )
    total = recorded(recording, "operator.add", recorded(recording, "operator.mul", a, b), c)
    pair = recorded(recording, "operator.sub", c, a)
    cells = [value.save() for value in (total, pair, b)]
    execution = Execution(recording.graph, make_plan(recording.graph, recording.saves))
    values = [torch.tensor(2.0), torch.tensor(3.0), torch.tensor(5.0)]
    for index in order:
        arriving = values[index].clone()
        execution.arrive(index, arriving)
        arriving.fill_(99)  # what the model does to its tensors afterwards is its own business
    execution.fill(recording.saves)
    assert [cell.value.item() for cell in cells] == [11.0, 3.0, 3.0]


def test_a_failing_operation_is_reported_with_its_line_and_its_values() -> None:
    recording = Recording()
    a = Proxy(recording, add_node(recording, READ, (0, "a", "output", 0, 0), NO_KWARGS, here()))
    recorded(recording, "operator.matmul", a, a)
    execution = Execution(recording.graph, make_plan(recording.graph, recording.saves))
    with pytest.raises(ShapeError, match=r"`\(a.output @ a.output\)`.*\(2, 3\), \(2, 3\)"):
        execution.arrive(0, torch.ones(2, 3))
    execution = Execution(recording.graph, make_plan(recording.graph, recording.saves))
    with pytest.raises(ExecutionError, match="values of type str, str") as caught:
        execution.arrive(0, "no tensor")
    assert caught.value.location.file == __file__
