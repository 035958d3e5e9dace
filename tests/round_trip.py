"""Runs what a test traces once more, from the bytes of its graph, and compares the two runs."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import pytest
import torch

from insitu import InsituError, WireError
from insitu.graph import location
from insitu.graph.node import Carried, Function, Graph, Node, Subgraph
from insitu.graph.recorded import Cell
from insitu.graph.recording import Recording
from insitu.graph.structure import map_structure
from insitu.graph.wire import keeps_statistics
from insitu.runtime.plan import Plan
from insitu.runtime.procedure import Outputs, Procedure, Subject
from insitu.tracing import block as blocks
from insitu.tracing.invocation import Invocation

Run = Callable[..., tuple[Plan, list[Any]]]


@pytest.fixture(autouse=True)
def round_trip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every graph that a test runs does the same after a trip through bytes.

    A test marked `no_wire` is left alone.
    """
    if request.node.get_closest_marker("no_wire"):
        return
    run = blocks.run_block
    monkeypatch.setattr(blocks, "run_block", lambda *block: run_twice(run, *block))
    # Its frames stand between the user's and ours, and are not the user's.
    monkeypatch.setattr(location, "_CALLING_BACK", (*location._CALLING_BACK, __file__))
    monkeypatch.setitem(location._known, __file__, True)


def run_twice(
    run: Run,
    model: Subject,
    procedure: Procedure[Any],
    recording: Recording,
    invocations: Sequence[Invocation],
    requests: Sequence[Any],
    *rest: Any,
) -> tuple[Plan, list[Any]]:
    """Runs a block, and then its graph as another process would get it, and compares."""
    before = torch.get_rng_state()
    copies = [map_structure(copied, request) for request in requests]
    failure, ran = attempt(run, model, procedure, recording, invocations, requests, *rest)
    after = torch.get_rng_state()
    wired = sent(recording.graph)
    if wired is not None and (failure is None or isinstance(failure, InsituError)):
        graph, saves, fakes = recording.graph, recording.saves, recording.fakes
        recording.graph = wired
        recording.saves = {index: Cell() for index in saves}
        recording.fakes = {}
        for invocation, request in zip(invocations, copies, strict=True):
            invocation.request = request
        torch.set_rng_state(before)
        again, ran_again = attempt(run, model, procedure, recording, invocations, copies, *rest)
        torch.set_rng_state(after)
        try:
            assert described(again) == described(failure)
            if ran is not None and ran_again is not None:
                assert same(contents(recording.saves), contents(saves))
                assert same(
                    outputs(procedure, copies, ran_again), outputs(procedure, requests, ran)
                )
        finally:
            recording.graph, recording.saves, recording.fakes = graph, saves, fakes
            for invocation, request in zip(invocations, requests, strict=True):
                invocation.request = request
    if ran is None:
        assert failure is not None
        raise failure
    return ran


def copied(leaf: Any) -> Any:
    """A copy of a part of a prompt, into which a model may write."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)


def attempt(run: Run, *block: Any) -> tuple[BaseException | None, tuple[Plan, list[Any]] | None]:
    try:
        return None, run(*block)
    except BaseException as failure:
        return failure, None


def sent(graph: Graph) -> Graph | None:
    """The graph after a trip through bytes, or None where something in it stays at home."""
    if any(map(stays, arguments(graph))) or any(map(keeps_own_statistics, graph)):
        with pytest.raises(WireError, match="cannot be sent"):
            graph.to_bytes()
        return None
    data = graph.to_bytes()
    wired = Graph.from_bytes(data)
    assert wired.to_bytes() == data
    assert [row[3:5] for row in wired.rows] == [row[3:5] for row in graph.rows]
    return wired


def arguments(graph: Graph) -> list[Any]:
    return [argument for node in graph for argument in (*node.args, *node.kwargs.values())]


def keeps_own_statistics(node: Node) -> bool:
    """Whether a node is a normalisation that is being trained."""
    normalises = node.operation.short in ("batch_norm", "instance_norm")
    return normalises and keeps_statistics(node.args, node.kwargs)


def stays(value: Any) -> bool:
    """Whether an argument is more than data."""
    if isinstance(value, Carried | Function | torch.Generator):
        return True
    if isinstance(value, Subgraph):
        return any(map(stays, arguments(value.graph))) or stays(value.output)
    if isinstance(value, torch.Tensor):
        return type(value) is not torch.Tensor or value.requires_grad
    if isinstance(value, tuple | list | dict):
        plain = type(value) in (tuple, list, dict, torch.Size)
        items = value.values() if isinstance(value, dict) else value
        return not (plain or type(value).__module__ == "torch.return_types") or any(
            map(stays, items)
        )
    return callable(value)


def contents(saves: Mapping[int, Any]) -> dict[int, Any]:
    """What was saved."""
    return {index: cell._content for index, cell in saves.items()}


def outputs(
    procedure: Procedure[Any], requests: Sequence[Any], ran: tuple[Plan, list[Any]]
) -> Outputs | None:
    """What the model returned, where a block hands that over."""
    plan, results = ran
    return None if plan.stops else procedure.outputs(results, requests)


def described(failure: BaseException | None) -> tuple[type, str]:
    """An error without the folders of its files, which do not travel."""
    return type(failure), re.sub(r'File "[^"]*/', 'File "', str(failure))


def same(one: Any, other: Any) -> bool:
    """Whether two values agree bit for bit, in structure, dtypes and numbers."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        return alike and (one.is_meta or torch.equal(bits(one), bits(other)))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, slice):
        return same((one.start, one.stop, one.step), (other.start, other.stop, other.step))
    if dataclasses.is_dataclass(one) and not isinstance(one, type):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if type(one).__eq__ is object.__eq__ and hasattr(one, "__dict__"):
        return same(vars(one), vars(other))
    return one == other or one != one


def bits(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    plain = tensor.detach().resolve_conj().clone(memory_format=torch.contiguous_format)
    return plain.reshape(-1).view(torch.uint8)
