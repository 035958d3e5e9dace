"""Runs what a test traces once more, from the bytes of its graph, and compares the two runs."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch

from insitu import InsituError, WireError
from insitu.graph import location
from insitu.graph.node import Carried, Function, Graph, Node, Subgraph
from insitu.graph.recorded import Cell
from insitu.graph.structure import map_structure
from insitu.graph.wire import keeps_statistics
from insitu.tracing.tracer import Tracer


@pytest.fixture(autouse=True)
def round_trip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every graph that a test runs does the same after a trip through bytes.

    A test marked `no_wire` is left alone.
    """
    if request.node.get_closest_marker("no_wire"):
        return
    run = Tracer._run
    monkeypatch.setattr(Tracer, "_run", lambda tracer: run_twice(run, tracer))
    # Its frames stand between the user's and ours, and are not the user's.
    monkeypatch.setattr(location, "_CALLING_BACK", (*location._CALLING_BACK, __file__))
    monkeypatch.setitem(location._known, __file__, True)


def run_twice(run: Callable[[Tracer], None], tracer: Tracer) -> None:
    """Runs a block, and then its graph as another process would get it, and compares."""
    before = torch.get_rng_state()
    requests = [map_structure(copied, request) for request in tracer._requests]
    failure = attempt(run, tracer)
    after = torch.get_rng_state()
    wired = sent(tracer.graph)
    if wired is not None and (failure is None or isinstance(failure, InsituError)):
        recording = tracer.recording
        first = state(tracer)
        recording.graph = wired
        recording.saves = {index: Cell() for index in recording.saves}
        recording.fakes = {}
        for invocation, request in zip(tracer._invocations, requests, strict=True):
            invocation.request = request
        tracer._requests = requests
        torch.set_rng_state(before)
        again = attempt(run, tracer)
        torch.set_rng_state(after)
        try:
            assert described(again) == described(failure)
            if failure is None:
                assert same(results(tracer), first["results"])
        finally:
            restore(tracer, first)
    if failure is not None:
        raise failure


def copied(leaf: Any) -> Any:
    """A copy of a part of a prompt, into which a model may write."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)


def attempt(run: Callable[[Tracer], None], tracer: Tracer) -> BaseException | None:
    try:
        run(tracer)
    except BaseException as failure:
        return failure
    return None


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


def state(tracer: Tracer) -> dict[str, Any]:
    recording = tracer.recording
    return {
        "graph": recording.graph,
        "saves": recording.saves,
        "fakes": recording.fakes,
        "ended": tracer._ended,
        "results": results(tracer),
        "requests": tracer._requests,
    }


def restore(tracer: Tracer, first: dict[str, Any]) -> None:
    recording = tracer.recording
    recording.graph, recording.saves = first["graph"], first["saves"]
    recording.fakes, tracer._ended = first["fakes"], first["ended"]
    tracer._requests = first["requests"]
    _, tracer._result, each = first["results"]
    for invocation, result, request in zip(
        tracer._invocations, each, first["requests"], strict=True
    ):
        invocation.result, invocation.request = result, request


def results(tracer: Tracer) -> tuple[Any, ...]:
    """All that a run hands over: what was saved, and what the model returned."""
    saved = {index: cell._content for index, cell in tracer.recording.saves.items()}
    return saved, tracer._result, [invocation.result for invocation in tracer._invocations]


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
