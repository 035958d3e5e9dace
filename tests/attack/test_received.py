"""Jobs that reach for what is not theirs, name what is not there, or are long to read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from insitu import InsituError, Job, JobError, LimitError, Limits, OperationError, WireError
from insitu.display import graph_text
from tests.attack.jobs import (
    IDS,
    READ,
    X,
    framed,
    gpt,
    job_bytes,
    opened,
    plain_job,
    quick,
    ref,
    row,
    served,
    small,
)

pytestmark = pytest.mark.no_wire
LONG = ["int", b"\x01" * 3000]


def test_a_backward_pass_leaves_nothing_on_parameters_that_a_site_shows() -> None:
    model = gpt()
    place = row(0, 0, "transformer.h.0.attn.c_attn>addmm", "inputs", 0, 0)
    names = ["read", "operator.getitem", "backward", "Tensor.sum"]
    loss = [row(0, 0, "lm_head", "output", 0, 0), row(3, ref(3))]
    reads = [place, row(1, ref(0), 0), row(1, ref(1), 2)]
    for inputs in (["list", [ref(2)]], ["list", [["weight", "transformer.wte.weight"]]]):
        rows = [*reads, *loss, row(2, ref(4), inputs=inputs)]
        data = job_bytes(model, names, rows, {"differentiates": [[]]})
        for _ in range(2):
            try:
                served(model, data)
            except InsituError as error:
                assert inputs[1][0] == ref(2), error
    assert all(one.grad is None for one in model.module.parameters())


def test_a_graph_reads_its_own_invocations_only() -> None:
    model = gpt()
    rows = [row(0, 1, "lm_head", "output", 0, 0), row(1, ref(0))]
    data = job_bytes(model, ["read", "save"], rows, prompts=[IDS])
    with pytest.raises(WireError, match="invocation 1"):
        served(model, data)


NOWHERE: dict[str, tuple[list[str], list[Any], dict[str, Any]]] = {
    "module": (["read", "save"], [row(0, 0, "zzz", "output", 0, 0), row(1, ref(0))], {}),
    "module that is called": (
        ["read", "apply", "save"],
        [READ, row(1, ["module", "zzz"], ref(0)), row(2, ref(1))],
        {},
    ),
    "module that a function calls": (
        ["read", "apply", "input", "fold", "save"],
        [
            READ,
            row(
                3,
                [
                    "function",
                    [row(2, 0), row(2, 1), row(1, ["module", "zzz"], ref(0))],
                    ref(2),
                    {},
                ],
                ref(0),
                ["list", [1]],
            ),
            row(4, ref(1)),
        ],
        {},
    ),
    "function": (["read", "save"], [row(0, 0, "zzz>softmax", "output", 0, 0), row(1, ref(0))], {}),
    "function of a module": (
        ["read", "save"],
        [row(0, 0, "1>zzz", "output", 0, 0), row(1, ref(0))],
        {},
    ),
    "call": (["read", "save"], [row(0, 0, "1", "output", 7, 0), row(1, ref(0))], {}),
    "step": (["read", "save"], [row(0, 0, "1", "output", 0, 7), row(1, ref(0))], {}),
    "tokens": (["read", "save"], [row(0, 0, "", "tokens", 0, 0), row(1, ref(0))], {}),
    "skip": (
        ["read", "skip"],
        [row(0, 0, "zzz", "inputs", 0, 0), row(1, ref(0), 0)],
        {"skips": [[0, 1]]},
    ),
    "invocation": (["read", "save"], [row(0, 7, "1", "output", 0, 0), row(1, ref(0))], {}),
    "invocation, in place": (
        ["read", "put", "save"],
        [row(0, 7, "1", "output", 0, 0), row(1, ref(0), ["tuple", []], "Tensor.add_", 1)],
        {"writes": [[0, 1]]},
    ),
    "skip by a number": (
        ["read", "skip", "save"],
        [
            row(0, 0, "1", "inputs", 0, 0),
            row(1, ref(0), 0),
            row(0, 0, "3", "output", 0, 0),
            row(2, ref(2)),
        ],
        {"skips": [[0, 1]]},
    ),
    "stop": (["read"], [row(0, 0, "zzz", "output", 0, 0)], {"stops": [[0, 0]]}),
    "weight": (
        ["read", "Tensor.sum", "backward"],
        [READ, row(1, ref(0)), row(2, ref(1), inputs=["list", [["weight", "zzz.weight"]]])],
        {"differentiates": [[]]},
    ),
    "gradient of nothing": (
        ["read", "Tensor.sum", "backward", "grad", "save"],
        [
            READ,
            row(1, ref(0)),
            row(2, ref(1)),
            row(0, 0, "3", "output", 0, 0),
            row(3, ref(3), ref(2)),
            row(4, ref(4)),
        ],
        {"differentiates": [[]]},
    ),
    "nothing to write": (
        ["read", "write"],
        [READ, row(1, ref(0), None, False)],
        {"writes": [[0, 1]]},
    ),
}


@pytest.mark.parametrize("name", NOWHERE)
def test_what_is_not_there_is_named_with_the_line(name: str) -> None:
    names, rows, fields = NOWHERE[name]
    model = small()
    with pytest.raises(InsituError) as caught:
        served(model, job_bytes(model, names, rows, fields))
    assert caught.value.location is not None


@pytest.mark.parametrize("integer", [LONG, ["int", b"\x01" * 500], 2**64 - 1, -(2**63)])
def test_integers_of_any_length_are_refused_or_printed(integer: Any) -> None:
    model = small()
    body = ["function", [row(2, integer)], None, {}]
    for names, rows in (
        (["read"], [row(0, 0, integer, "output", 0, 0)]),
        (["read"], [row(0, 0, "1", "output", integer, 0)]),
        (["read", "save"], [READ, row(1, ref(0), integer)]),
        (["read", "fold", "input"], [READ, row(1, body, 0, ref(0))]),
        (["read", "torch.add", "save"], [READ, row(1, ref(0), integer), row(2, ref(1))]),
        (["read", "torch.reshape", "save"], [READ, row(1, ref(0), ["list", [integer]]), row(2, 1)]),
        (["read", "Tensor.sin"], [READ, row(1)]),
        (["read", "operator.getitem"], [READ, row(1, ref(0), ["slice", integer, None, None])]),
        (["read", "Tensor.real", "save"], [READ, row(1, ref(0)), row(2, ref(1))]),
    ):
        try:
            job = Job.from_bytes(job_bytes(model, names, rows))
            assert graph_text(job.blocks[0].graph) and repr(job) and job.saves is not None
            model.run(job)
        except InsituError:
            pass


def test_many_entries_of_one_field_are_planned_quickly() -> None:
    model, count = small(), 3000
    rows = [row(0, 0, "1", "output", 0, -1)] + [row(1, ref(0))] * count
    fields = {"repeats": [[0, 0]] * count + [[0, count + 1]]}
    data = job_bytes(model, ["read", "torch.sin", "save"], rows, fields)
    quick(lambda: served(model, data, limits=Limits(nodes=count + 1)), 3)


@pytest.mark.thorough
def test_many_sites_are_refused_before_they_are_planned() -> None:
    model, count = small(), 60_000
    rows = [row(0, 0, "0", "output", call, 0) for call in range(count)]
    data = job_bytes(model, ["read"], rows)
    error = quick(lambda: served(model, data, limits=Limits(nodes=10**6, sites=1000)), 5, 200)
    assert isinstance(error, LimitError) and error.limit == "sites"


@pytest.mark.parametrize("kind", ["tuples", "numbers"])
def test_keys_that_collide_are_read_quickly(kind: str) -> None:
    model = small()
    keys: list[Any] = [["tuple", [0] * 40 + [number]] for number in range(5000)]
    if kind == "numbers":  # multiples of the modulus of Python's hashes
        step = 2**61 - 1
        keys = [["int", (number * step).to_bytes(12, "little")] for number in range(5000)]
    part = ["dict", keys, [0] * len(keys)]
    data = job_bytes(model, ["read", "torch.add"], [READ, row(1, ref(0), part)])
    error = quick(lambda: Job.from_bytes(data))
    assert isinstance(error, WireError)


def test_objects_that_are_no_data_are_not_saved() -> None:
    model = gpt()
    with model.trace(IDS, use_cache=True) as tracer:
        model.output.past_key_values.save("cache")
    with pytest.raises(OperationError, match="save the tensors in it") as caught:
        served(model, tracer.job.to_bytes())
    assert caught.value.location is not None
    with model.trace(IDS, use_cache=True) as tracer:
        model.output.save("output")
    with pytest.raises(OperationError, match="DynamicCache is no data"):
        served(model, tracer.job.to_bytes())
    with model.trace(IDS, use_cache=True) as tracer:
        model.output.logits.save("logits")
        model.transformer.h[0].output.save("pair")
        model.lm_head.output.shape  # noqa: B018
    results = served(model, tracer.job.to_bytes())
    assert results["logits"].shape == (1, 4, 100) and len(results["pair"]) == 2
    results.to_bytes()


def test_a_function_that_writes_into_its_arguments_writes_into_copies() -> None:
    model = small()
    before = {name: one.clone() for name, one in model.module.state_dict().items()}
    names = ["read", "apply", "put", "save"]
    for path in ("0", "1", "2", "3", ""):
        rows = [
            READ,
            row(1, ["module", path], ref(0)),
            row(2, ref(1), ["tuple", []], "Tensor.mul_", 0.0),
            row(3, ref(2)),
            row(3, ref(0)),
        ]
        results = served(model, job_bytes(model, names, rows))
        with torch.no_grad():
            torch.testing.assert_close(results["1"], model.module[1](X))
    assert all(torch.equal(before[name], one) for name, one in model.module.state_dict().items())


def test_a_job_for_another_model_is_refused() -> None:
    with pytest.raises(JobError):
        served(gpt(), job_bytes(small(), ["read", "save"], [READ, row(1, ref(0))]))


def test_a_function_returns_no_weights() -> None:
    function = ["function", [row(1, 0), row(1, 1)], ["weight", "1.weight"], {}]
    rows = [READ, row(2, function, ref(0), ref(0)), row(3, ref(1))]
    with pytest.raises(WireError, match="returns weights"):
        Job.from_bytes(job_bytes(small(), ["read", "input", "fold", "save"], rows))


def test_texts_of_lines_are_no_longer_than_what_is_shown() -> None:
    message, tensors = opened(plain_job(gpt(), [1, 2]))
    message[2] = [[0, 1, "x" * 1_000_000]]
    message[1] = ["file.py"]
    with pytest.raises(WireError):
        Job.from_bytes(framed(message, tensors))


def test_an_operation_that_is_not_there_is_named_in_short() -> None:
    data = job_bytes(small(), ["read", "x" * 100_000], [READ, row(1, ref(0))])
    with pytest.raises(WireError, match="no operation") as caught:
        Job.from_bytes(data)
    assert len(str(caught.value)) < 1000
