"""Runs what a test traces once more, from the bytes of its job, and compares the two runs."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import pytest
import torch

from insitu import CausalityError, InsituError, Job, LoadError, Results, WireError
from insitu.engine.seams import seams
from insitu.graph.node import Function, Graph, Node, Subgraph
from insitu.graph.operations import KEEP
from insitu.graph.written_arguments import written_arguments
from insitu.tracing.block import Block
from insitu.tracing.session import Session
from insitu.tracing.watching import watcher


@pytest.fixture(autouse=True)
def round_trip(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every block and session of a test gives the same when its job is run from bytes.

    A test marked `no_wire` is left alone.
    """
    if request.node.get_closest_marker("no_wire"):
        yield
        return
    if os.environ.get("INSITU_SERVED"):
        from tests.against_server import AgainstServer  # which starts servers

        before = watcher.set(AgainstServer())
    else:
        before = watcher.set(Twice())
    yield
    watcher.reset(before)


class Twice:
    """Runs the job of each block and session from its bytes, and compares."""

    def __init__(self) -> None:
        self.jobs: dict[int, tuple[bytes | None, torch.Tensor, list[dict[int, Any]]]] = {}
        self.within = False  # a session, whose blocks are run with it

    def begins(self, running: Any) -> None:
        own = isinstance(running, Session) or not self.within
        self.within = self.within or isinstance(running, Session)
        blocks = parts(running)
        away = running.away or running.model.away  # that it is sent is what happens anyway
        if own and blocks and away is None and not any(block.is_dry for block in blocks):
            holders = [dict(block.recording.saves) for block in blocks]
            self.jobs[id(running)] = (sent(running.job), torch.get_rng_state(), holders)

    def ended(self, running: Any, failure: BaseException | None) -> None:
        self.within = self.within and not isinstance(running, Session)
        data, before, holders = self.jobs.pop(id(running), (None, torch.empty(0), []))
        if data is None or not (failure is None or isinstance(failure, InsituError)):
            return
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        job = Job.from_bytes(data)
        results: Results | None = None
        again: BaseException | None = None
        unheard = seams.set(None)  # who listens to the block has heard its run
        try:
            results = running.model.run(job)
        except InsituError as error:
            again = error
        finally:
            seams.reset(unheard)
        torch.set_rng_state(after)
        if failure is None and "a job saves tensors and plain data only" in str(again):
            return  # a block of one's own saves an object too, such as a cache
        assert described(again) == described(failure), (again, failure)
        if results is not None:
            assert same(dict(results), contents(job, holders))
            assert same_as_file(results)
            for block, output in zip(parts(running), results.outputs, strict=True):
                ran = None if block.ran is None else block.ran.outputs
                assert (ran is None) == (output is None)
                assert ran is None or same(ran.whole, output and output.whole)


def parts(running: Block | Session) -> list[Block]:
    return [running] if isinstance(running, Block) else list(running.blocks or ())


def sent(job: Job) -> bytes | None:
    """The bytes of a job, or None where something in it stays at home."""
    if any(map(stays, arguments(job))) or any(
        keeps_own_statistics(node) or node.operation is KEEP
        for block in job.blocks
        for node in block.graph
    ):
        with pytest.raises(WireError, match="cannot be sent"):
            job.to_bytes()
        return None
    data = job.to_bytes()
    received = Job.from_bytes(data)
    assert received.to_bytes() == data
    for block, other in zip(job.blocks, received.blocks, strict=True):
        assert [row[3:5] for row in other.graph.rows] == [row[3:5] for row in block.graph.rows]
    return data


def arguments(job: Job) -> list[Any]:
    found: list[Any] = []
    for block in job.blocks:
        found += of_graph(block.graph)
        if block.procedure == "trace":
            found += block.options.values()
        else:
            options = block.options.items()
            found += [Live() for name, one in options if not plain(one) or name in _LIVE_OPTIONS]
        for prompt in block.prompts:
            given = [*prompt.args, *prompt.kwargs.values()]
            found += [prompt.ids, prompt.mask, *given]
            found += [Live() for one in given if not holds_data(one)]
    return found


_LIVE_OPTIONS = ("custom_generate", "logits_processor", "stopping_criteria", "trust_remote_code")


class Live:
    """Stands for what is live, as a function is."""

    def __call__(self) -> None: ...


def plain(option: Any) -> bool:
    if isinstance(option, list | tuple):
        return all(map(plain, option))
    return option is None or isinstance(option, bool | int | float | str | torch.Tensor)


def holds_data(value: Any) -> bool:
    """Whether an argument of a forward is plain data, or a tensor that travels."""
    if isinstance(value, list | tuple | dict):
        return all(map(holds_data, value.values() if isinstance(value, dict) else value))
    return plain(value) or isinstance(value, torch.dtype | torch.device | slice | complex | bytes)


def of_graph(graph: Graph) -> list[Any]:
    return [argument for node in graph for argument in (*node.args, *node.kwargs.values())]


def keeps_own_statistics(node: Node) -> bool:
    """Whether a node writes into statistics, or weights, that are arguments."""
    return bool(written_arguments(node.operation, node.args, node.kwargs)[0])


def stays(value: Any) -> bool:
    """Whether an argument is more than data."""
    if isinstance(value, Function | torch.Generator):
        return True
    if isinstance(value, Subgraph):
        return any(map(stays, of_graph(value.graph))) or stays(value.output)
    if isinstance(value, torch.Tensor):
        return type(value) not in (torch.Tensor, torch.nn.Parameter) or value.requires_grad
    if isinstance(value, tuple | list | dict):
        plain = type(value) in (tuple, list, dict, torch.Size)
        items = value.values() if isinstance(value, dict) else value
        return not (plain or type(value).__module__ == "torch.return_types") or any(
            map(stays, items)
        )
    return callable(value)


def contents(job: Job, holders: list[dict[int, Any]]) -> dict[str, Any]:
    """What was saved where a block of one's own ran, by its name in the job."""
    return {
        name: saved[index]._content
        for block, saved in zip(job.blocks, holders, strict=True)
        for index, name in block.saves.items()
    }


def same_as_file(results: Results) -> bool:
    """Whether results are the same after a trip through bytes, if all of them are data."""
    try:
        data = results.to_bytes()
    except WireError:
        return True
    received = Results.from_bytes(data)
    return same(plainly(dict(received)), plainly(dict(results)))


def plainly(value: Any) -> Any:
    """A value with plain containers and tensors without their history."""
    if isinstance(value, torch.Tensor):
        return value.detach().as_subclass(torch.Tensor).cpu()
    if isinstance(value, Mapping):
        return {key: plainly(item) for key, item in value.items()}
    if isinstance(value, tuple) and type(value).__module__ != "torch.return_types":
        return tuple(map(plainly, value))
    return [plainly(item) for item in value] if isinstance(value, list) else value


def described(failure: BaseException | None) -> tuple[type, str]:
    """An error without the folders of its files, which do not travel.

    Weights that cannot be loaded are about the line that runs, and not about one that was recorded.
    Of several writes that come too late, a job names that of the first invocation.
    """
    if isinstance(failure, CausalityError):
        return type(failure), ""
    if isinstance(failure, LoadError):
        return type(failure), str(failure).partition("\n")[0]
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
