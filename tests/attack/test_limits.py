"""`Limits` hold in `check` and in the run, before anything large is made."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from insitu import InsituError, Job, LanguageModel, LimitError, Limits, Model, OptionError, fold
from tests.attack.jobs import IDS, READ, X, gpt, job_bytes, quick, ref, row, served, small
from tests.thinning import sampled
from tests.tracing.test_job_check import gradients

pytestmark = pytest.mark.no_wire
LIMITS = Limits(peak_bytes=2**26, operations=1e8, nodes=2000, sites=100, seconds=20)

BIG = 10**11
NUMBER = ["Tensor.abs", "operator.mul", "Tensor.long", "Tensor.sum", "Tensor.item"]
A_NUMBER = [row(1, ref(0)), row(2, ref(1), 1e12), row(3, ref(2)), row(4, ref(3)), row(5, ref(4))]
# Each makes something huge of what the first layer returns, (3, 4), in a few bytes.
HUGE: dict[str, tuple[list[str], list[Any]]] = {
    "sum of an expanded view": (
        ["operator.getitem", "Tensor.expand", "Tensor.sum"],
        [row(1, ref(0), ["tuple", [0, 0]]), row(2, ref(1), BIG), row(3, ref(2))],
    ),
    "copy of an expanded view": (
        ["operator.getitem", "Tensor.expand", "Tensor.contiguous"],
        [row(1, ref(0), ["tuple", [0, 0]]), row(2, ref(1), BIG), row(3, ref(2))],
    ),
    "product of expanded views": (
        ["Tensor.expand", "attribute", "torch.matmul"],
        [row(1, ref(0), 10**7, 3, 4), row(2, ref(1), "mT"), row(3, ref(1), ref(2))],
    ),
    "mask of an expanded view": (
        ["Tensor.expand", "operator.gt", "torch.masked_select"],
        [row(1, ref(0), 10**8, 3, 4), row(2, ref(1), 0.0), row(3, ref(1), ref(2))],
    ),
    "positions in an expanded view": (
        ["Tensor.expand", "torch.nonzero"],
        [row(1, ref(0), 10**8, 3, 4), row(2, ref(1))],
    ),
    "boolean index": (
        ["Tensor.expand", "operator.gt", "operator.getitem"],
        [row(1, ref(0), 10**8, 3, 4), row(2, ref(1), 0.0), row(3, ref(1), ref(2))],
    ),
    "values of an expanded view": (
        ["Tensor.expand", "Tensor.unique"],
        [row(1, ref(0), 10**8, 3, 4), row(2, ref(1))],
    ),
    "zeros": (["Tensor.new_zeros"], [row(1, ref(0), ["list", [10**10]])]),
    "full": (["Tensor.new_full"], [row(1, ref(0), ["list", [10**10]], 1.0)]),
    "repeat": (["Tensor.repeat"], [row(1, ref(0), 10**9, 1)]),
    "tile": (["torch.tile"], [row(1, ref(0), ["list", [10**9, 1]])]),
    "repeats": (["torch.repeat_interleave"], [row(1, ref(0), 10**9)]),
    "padding": (["functional.pad"], [row(1, ref(0), ["list", [10**9, 0]])]),
    "kron": (["torch.kron"], [row(1, ref(at), ref(at)) for at in range(4)]),
    "outer": (
        ["Tensor.flatten", "Tensor.repeat", "torch.outer"],
        [row(1, ref(0)), row(2, ref(1), 10**4), row(3, ref(2), ref(2))],
    ),
    "cat in a chain": (
        ["torch.cat"],
        [row(1, ["list", [ref(at)] * 20]) for at in range(8)],
    ),
    "decomposition": (
        ["Tensor.repeat", "linalg.svdvals"],
        [row(1, ref(0), 700, 500), row(2, ref(1))],
    ),
    "bins": (["torch.histc"], [row(1, ref(0), 10**10)]),
    "vander": (["linalg.vander"], [row(1, ref(0), N=10**8)]),
    "interpolate": (
        ["operator.getitem", "functional.interpolate"],
        [row(1, ref(0), None), row(2, ref(1), 10**9)],
    ),
    "one hot": (
        ["operator.mul", "Tensor.abs", "Tensor.long", "functional.one_hot"],
        [row(1, ref(0), 1e9), row(2, ref(1)), row(3, ref(2)), row(4, ref(3))],
    ),
    "counts": (
        ["Tensor.abs", "operator.mul", "Tensor.long", "Tensor.flatten", "torch.bincount"],
        [row(1, ref(0)), row(2, ref(1), 1e10), row(3, ref(2)), row(4, ref(3)), row(5, ref(4))],
    ),
    "repeats of a value": (
        ["Tensor.abs", "operator.mul", "Tensor.long", "Tensor.flatten", "torch.repeat_interleave"],
        [row(1, ref(0)), row(2, ref(1), 1e9), row(3, ref(2)), row(4, ref(3)), row(5, ref(4))],
    ),
    "covariance": (
        ["Tensor.repeat", "torch.cov"],
        [row(1, ref(0), 5000, 1), row(2, ref(1))],
    ),
    "correlation": (
        ["Tensor.repeat", "torch.corrcoef"],
        [row(1, ref(0), 5000, 1), row(2, ref(1))],
    ),
    "where alone": (
        ["Tensor.expand", "torch.where"],
        [row(1, ref(0), 2 * 10**7, 3, 4), row(2, ref(1))],
    ),
    "least squares": (
        ["Tensor.repeat", "linalg.lstsq"],
        [row(1, ref(0), 700, 500), row(2, ref(1), ref(1))],
    ),
    "all close": (
        ["Tensor.expand", "torch.allclose"],
        [row(1, ref(0), 2 * 10**7, 3, 4), row(2, ref(1), ref(0))],
    ),
    "equal": (
        ["Tensor.expand", "torch.equal"],
        [row(1, ref(0), 5 * 10**8, 3, 4), row(2, ref(1), ref(1))],
    ),
    "sums of logarithms": (
        ["Tensor.abs", "operator.add", "torch.mvlgamma"],
        [row(1, ref(0)), row(2, ref(1), 1e9), row(3, ref(2), 10**7)],
    ),
    "wide window": (
        ["Tensor.repeat", "functional.avg_pool1d"],
        [row(1, ref(0), 1, 40000), row(2, ref(1), 20000, 1)],
    ),
    "wide window of two axes": (
        ["Tensor.repeat", "operator.getitem", "functional.max_pool2d"],
        [row(1, ref(0), 200, 200), row(2, ref(1), None), row(3, ref(2), 300, 1)],
    ),
    "distances": (
        ["Tensor.repeat", "functional.pdist"],
        [row(1, ref(0), 1000, 1000), row(2, ref(1))],
    ),
    "margins": (
        [
            *("Tensor.flatten", "Tensor.repeat", "operator.mul", "Tensor.long"),
            "functional.multilabel_margin_loss",
        ],
        [
            *(row(1, ref(0)), row(2, ref(1), 4000), row(3, ref(2), 0.0), row(4, ref(3))),
            row(5, ref(2), ref(4)),
        ],
    ),
    "size of a value": (
        [*NUMBER, "Tensor.new_zeros"],
        [*A_NUMBER, row(6, ref(0), ref(5))],
    ),
    "view of the size of a value": (
        [*NUMBER, "operator.getitem", "Tensor.expand", "Tensor.sum"],
        [*A_NUMBER, row(6, ref(0), ["tuple", [0, 0]]), row(7, ref(6), ref(5)), row(8, ref(7))],
    ),
}
IN_THE_RUN = {"one hot", "counts", "repeats of a value", "size of a value"}
IN_THE_RUN |= {"view of the size of a value"}


def hostile(model: Model, name: str) -> Job:
    operations, rows = HUGE[name]
    names = ["read", *operations, "save"]
    rows = [READ, *rows, row(len(names) - 1, ref(len(rows)))]
    return Job.from_bytes(job_bytes(model, names, rows))


@pytest.mark.parametrize("name", HUGE)
def test_what_would_take_too_much_is_refused_before_it_is_made(name: str) -> None:
    model = small()
    job = hostile(model, name)
    with model.trace(X):  # what a first block takes is not what is measured
        model[1].output.save()
    in_check = quick(lambda: model.check(job, limits=LIMITS))
    in_run = quick(lambda: model.run(job, limits=LIMITS))
    assert isinstance(in_run, LimitError) and in_run.limit in ("peak_bytes", "operations")
    assert in_run.found > in_run.allowed and in_run.location is not None
    assert isinstance(in_check, LimitError) or name in IN_THE_RUN


@pytest.mark.parametrize("name", sorted(IN_THE_RUN))
def test_what_depends_on_values_is_looked_at_inside_of_functions_too(name: str) -> None:
    model = small()
    operations, rows = HUGE[name]
    inner = [[one[0] + 2, *one[1:]] for one in rows]  # "read", "input" and "fold" are before them
    body = ["function", [row(1, 0), *inner], ref(len(rows)), {}]
    names = ["read", "input", "fold", *operations, "save"]
    body[1].insert(1, row(1, 1))
    for at, one in enumerate(body[1][2:], 2):
        one[2] = [["ref", max(arg[1] + (arg[1] > 0), 0)] if is_ref(arg) else arg for arg in one[2]]
        assert at
    body[2] = ref(len(rows) + 1)
    rows = [READ, row(2, body, ref(0), ["list", [0]]), row(len(names) - 1, ref(1))]
    job = Job.from_bytes(job_bytes(model, names, rows))
    assert isinstance(quick(lambda: model.run(job, limits=LIMITS)), LimitError)


def is_ref(arg: Any) -> bool:
    return isinstance(arg, list) and arg[:1] == ["ref"]


def usual(model: LanguageModel) -> Any:
    with model.trace(IDS) as tracer:
        hidden = model.transformer.h[1].output[0]
        hidden[:, 0] = 0
        hidden[hidden > 0.1].save("above")
        hidden.abs().sum(-1).topk(2).indices.save("top")
        torch.nn.functional.one_hot(model.lm_head.output.argmax(-1)).save("hot")
        hidden[0, 0].nonzero().save("where")
        fold(lambda carry, row: carry + row, hidden[0, 0] * 0, hidden[0]).save("sum")
        hidden.expand(3, 4, 16).contiguous().save("wide")
        model.lm_head.output.save("logits")
    return tracer


def generation(model: LanguageModel) -> Any:
    with model.generate(IDS, max_new_tokens=4, do_sample=False) as tracer:
        with tracer.every_step():
            hidden = model.transformer.h[1].output[0]
            hidden[hidden > 0].mean().save("mean")
            model.transformer.h[0].output[0][:] *= 1.5
    return tracer


@pytest.mark.parametrize("make", sampled([usual, gradients, generation], [usual]))
def test_a_usual_job_within_its_limits_gives_the_same(make: Callable[[Any], Any]) -> None:
    model = gpt()
    job = make(model).job
    plain, limited = model.run(job), model.run(Job.from_bytes(job.to_bytes()), limits=LIMITS)
    assert list(plain) == list(limited)
    for name in plain:
        torch.testing.assert_close(limited[name], plain[name])
    assert model.check(job, limits=LIMITS).passes == model.check(job).passes


@pytest.mark.parametrize("make", [usual, gradients, generation])
@pytest.mark.parametrize("limit", ["peak_bytes", "operations", "nodes", "sites", "seconds"])
def test_each_limit_holds_for_itself(make: Callable[[Any], Any], limit: str) -> None:
    model = gpt()
    job = make(model).job
    limits = Limits(**{limit: 0})
    calls = [model.run] if limit == "seconds" else [model.run, model.check]
    for call in calls:
        with pytest.raises(LimitError, match=limit) as caught:
            call(job, limits=limits)
        assert caught.value.limit == limit and caught.value.allowed == 0 < caught.value.found
        assert caught.value.location is not None
    with model.trace(IDS):
        logits = model.lm_head.output.save()
    with torch.no_grad():
        torch.testing.assert_close(logits.value, model.module(torch.tensor(IDS)).logits)


@pytest.mark.parametrize("make", [usual, gradients, generation])
def test_what_a_check_says_is_enough(make: Callable[[Any], Any]) -> None:
    model = gpt()
    job = make(model).job
    check = model.check(job)
    bytes_ = int(check.peak_bytes.value) - check.weight_bytes + 2**16  # `one_hot` has no largest
    model.run(job, limits=Limits(peak_bytes=bytes_, operations=check.flops * 1.1))


def test_a_loop_counts_its_nodes_for_each_item() -> None:
    model = small()
    with model.trace(X) as tracer:
        fold(lambda carry, row: carry + row * 2, 0.0, model[1].output.flatten()).save("sum")
    # A read, `flatten`, `fold` and `save`, and for each of 12 items two inputs and two operations.
    model.run(tracer.job, limits=Limits(nodes=4 + 12 * 4))
    for call in (model.run, model.check):
        with pytest.raises(LimitError, match="nodes") as caught:
            call(tracer.job, limits=Limits(nodes=4 + 12 * 4 - 1))
        assert caught.value.limit == "nodes" and "fold" in str(caught.value)


def test_folds_in_folds_count_by_their_product_before_they_run() -> None:
    model, names = small(), ["read", "input", "operator.add", "fold", "save"]
    body = ["function", [row(1, 0), row(1, 1), row(2, ref(0), 1)], ref(2), {}]
    for _ in range(3):
        body = ["function", [row(1, 0), row(1, 1), row(3, body, ref(0), ["list", [0] * 30])]]
        body += [ref(2), {}]
    rows = [READ, row(3, body, ref(0), ["list", [0] * 30]), row(4, ref(1))]
    job = Job.from_bytes(job_bytes(model, names, rows))  # 810,000 steps, which a run may take
    for call in (model.run, model.check):
        error = quick(lambda call=call: call(job, limits=Limits(nodes=10_000)))
        assert isinstance(error, LimitError) and error.limit == "nodes"


def test_the_clock_is_looked_at_between_operations() -> None:
    model, names = small(), ["read", "input", "operator.add", "fold", "save"]
    body = ["function", [row(1, 0), row(1, 1), row(2, ref(0), 1)], ref(2), {}]
    body = ["function", [row(1, 0), row(1, 1), row(3, body, ref(0), ["list", [0] * 1000])]]
    body += [ref(2), {}]
    rows = [READ, row(3, body, ref(0), ["list", [0] * 1000]), row(4, ref(1))]
    job = Job.from_bytes(job_bytes(model, names, rows))  # a million steps
    begun = time.perf_counter()
    with pytest.raises(LimitError) as caught:
        model.run(job, limits=Limits(seconds=0.2))
    assert time.perf_counter() - begun < 3 and caught.value.limit == "seconds"


def test_the_clock_ends_a_generation_between_its_steps() -> None:
    model = gpt()
    with model.generate(IDS, max_new_tokens=3, eos_token_id=99, do_sample=False) as tracer:
        model.transformer.h[1].output[0].save("hidden")
    slow: list[int] = []
    handle = model.module.transformer.h[0].register_forward_hook(
        lambda *_: slow.append(1) or time.sleep(0.1)
    )
    with pytest.raises(LimitError):
        model.run(tracer.job, limits=Limits(seconds=0.05))
    handle.remove()
    assert len(slow) == 1


def test_a_job_with_more_bytes_nodes_or_sites_is_not_even_made() -> None:
    model = small()
    many = [row(0, 0, "1", "output", call, 0) for call in range(500)]
    data = job_bytes(model, ["read"], many)
    for limits, limit in (
        (Limits(nodes=400), "nodes"),
        (Limits(sites=400), "sites"),
        (Limits(peak_bytes=1000), "peak_bytes"),
    ):
        with pytest.raises(LimitError) as caught:
            Job.from_bytes(data, limits=limits)
        assert caught.value.limit == limit
    assert len(Job.from_bytes(data, limits=Limits(nodes=500, sites=500)).blocks[0].graph) == 500


def test_a_job_of_more_nodes_than_it_may_have_takes_no_memory() -> None:
    model = small()
    data = job_bytes(model, ["read", "torch.mean"], [READ] + [[1, 0, [], {}]] * 200_000)
    inner = ["function", [[1, 0, [], {}]] * 200_000, None, {}]
    nested = job_bytes(model, ["read", "torch.mean", "fold"], [READ, row(2, inner, 0, ref(0))])
    for one in (data, nested):
        error = quick(lambda one=one: Job.from_bytes(one, limits=LIMITS), 1, 20)
        assert isinstance(error, LimitError)


@pytest.mark.parametrize("value", [-1, True, float("nan")])
def test_what_is_no_limit_is_refused(value: Any) -> None:
    with pytest.raises(OptionError, match="no limit"):
        Limits(nodes=value)


def test_results_of_earlier_blocks_count() -> None:
    model = small()
    with model.session() as session:
        for number in range(4):
            with model.trace(X):
                model[1].output.repeat(2**12, 1).save(f"wide.{number}")
    one = 3 * 4 * 4 * 2**12
    model.run(session.job, limits=Limits(peak_bytes=12 * one))
    for call in (model.run, model.check):
        with pytest.raises(LimitError) as caught:
            call(session.job, limits=Limits(peak_bytes=3 * one))
        assert caught.value.limit == "peak_bytes"


def test_a_limit_is_an_error_that_one_expects() -> None:
    error = quick(lambda: served(small(), plain(), limits=Limits(nodes=1)))
    assert isinstance(error, RuntimeError) and isinstance(error, InsituError)


def plain() -> bytes:
    return job_bytes(small(), ["read", "save"], [READ, row(1, ref(0))])


ONES = ["list", [1] * 800]
# Each asks for a tensor of hundreds of axes.
MANY_AXES: dict[str, tuple[list[str], list[Any]]] = {
    "reshape": (["Tensor.reshape"], [row(1, ref(0), ["list", [*ONES[1], 12]])]),
    "view": (["Tensor.view"], [row(1, ref(0), *ONES[1], 12)]),
    "repeat": (["Tensor.repeat"], [row(1, ref(0), *ONES[1])]),
    "tile": (["torch.tile"], [row(1, ref(0), ONES)]),
    "expand": (["Tensor.expand"], [row(1, ref(0), *ONES[1], 3, 4)]),
    "new_zeros": (["Tensor.new_zeros"], [row(1, ref(0), ONES)]),
    "index": (["operator.getitem"], [row(1, ref(0), ["tuple", [None] * 800])]),
    "unravel": (
        ["Tensor.long", "torch.unravel_index"],
        [row(1, ref(0)), row(2, ref(1), ["tuple", [1] * 800])],
    ),
    "sizes of a run": (
        ["Tensor.flatten", "Tensor.tolist", "operator.getitem", "operator.mul", "Tensor.reshape"],
        [
            *(row(1, ref(0)), row(2, ref(1)), row(3, ref(2), ["slice", 0, 1, None])),
            *(row(4, ref(3), 800), row(5, ref(0), ref(4))),
        ],
    ),
}


@pytest.mark.parametrize("name", MANY_AXES)
def test_a_tensor_has_no_hundreds_of_axes(name: str) -> None:
    model = small()
    operations, rows = MANY_AXES[name]
    names = ["read", *operations, "save"]
    made = [READ, *rows, row(len(names) - 1, ref(len(rows)))]
    job = Job.from_bytes(job_bytes(model, names, made))
    with model.trace(X):
        model[1].output.save()
    for call in (model.run, model.check):
        error = quick(lambda call=call: call(job))
        if call == model.check and name == "sizes of a run":
            continue  # a list of values is not known before
        assert isinstance(error, LimitError) and "axes" in str(error)
        assert error.allowed == 64 < error.found


@pytest.mark.parametrize("make", [usual, generation])
def test_what_is_counted_in_the_check_is_not_counted_again_in_the_run(
    make: Callable[[Any], Any],
) -> None:
    model = gpt()
    job = make(model).job
    most = model.check(job).flops
    model.run(job, limits=Limits(operations=1.01 * most))


def test_lines_in_later_steps_are_counted_once() -> None:
    model = gpt()
    weight = torch.randn(16, 1000)
    with model.scan(IDS, generate=True, max_new_tokens=2, do_sample=False) as tracer:
        with tracer.step(1):
            (model.transformer.h[1].output[0] @ weight).relu().sum().save("sum")
    most = model.check(tracer.job).flops
    assert model.run(tracer.job, limits=Limits(operations=1.01 * most))["sum"].ndim == 0


def test_blocks_of_a_session_count_their_nodes_together() -> None:
    model = small()
    with model.session() as session:
        for _ in range(3):
            with model.trace(X):
                flat = model[1].output.flatten()
                fold(lambda carry, row: carry + row * 2, 0.0, flat[flat > -1e9]).save()
    with pytest.raises(LimitError, match="nodes"):
        model.run(session.job, limits=Limits(nodes=2 * (6 + 12 * 4)))
    model.run(session.job, limits=Limits(nodes=3 * (6 + 12 * 4)))
