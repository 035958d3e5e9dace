"""What `model.check(job)` says, against what runs give and PyTorch counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from insitu import (
    CausalityError,
    Job,
    LanguageModel,
    Limits,
    Model,
    NeverRanError,
    OperationError,
    ShapeError,
    cond,
    fold,
)
from insitu.graph.shapes import dtype_of, shape_of
from insitu.graph.structure import tensors_of
from tests.conftest import tiny_gpt2
from tests.thinning import sampled

pytestmark = pytest.mark.no_wire
IDS = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])


def saves(model: LanguageModel) -> Any:
    with model.trace(IDS) as tracer:
        hidden = model.transformer.h[1].output
        hidden.save("tuple")
        hidden[0].norm(dim=-1).save("norm")
        hidden[0].max(dim=-1).save("most")
        (hidden[0] @ hidden[0].mT).to(torch.float64).save("double")
        model.lm_head.output.argmax(-1).save("tokens")
    return tracer


def sweep(model: LanguageModel) -> Any:
    with model.trace() as tracer:
        for number in range(6):
            with tracer.invoke([[number, 6, 7, 8]]):
                model.transformer.h[number % 3].output[0][:, -1] = 0
                model.lm_head.output[0, -1].save(f"logits.{number}")
    return tracer


def gradients(model: LanguageModel) -> Any:
    with model.trace(IDS) as tracer:
        hidden = model.transformer.h[1].output[0]
        model.lm_head.output.logsumexp(-1).sum().backward()
        hidden.grad.save("grad")
    return tracer


def names(model: LanguageModel) -> Any:
    with model.trace(IDS) as tracer:
        model.blocks[1].residual_out.save("stream")
        model.blocks[2].attention.z.save("z")
        model.blocks[0].attention.pattern.save("pattern")
    return tracer


def functions(model: LanguageModel) -> Any:
    with model.trace(IDS) as tracer:
        hidden = model.transformer.h[1].output[0]
        cond(hidden.sum() > 0, lambda x: x + 1, lambda x: x * 2, hidden).save("either")
        fold(lambda c, x: c + x, hidden[:, 0], [hidden[:, 1], hidden[:, 2]]).save("sum")
        model.transformer.ln_f(hidden).save("norm")
    return tracer


def generation(model: LanguageModel) -> Any:
    with model.generate(IDS, max_new_tokens=3, eos_token_id=99) as tracer:
        model.transformer.h[1].output[0].save("hidden")
        model.lm_head.output[0, -1].save("logits")
    return tracer


@pytest.mark.parametrize(
    "lines",
    sampled(
        [saves, sweep, gradients, names, functions, generation],
        [saves, gradients, functions, generation],
    ),
)
@pytest.mark.filterwarnings("ignore:Attention scores")
def test_shapes_dtypes_and_bytes_are_those_of_a_run(lines: Callable[[LanguageModel], Any]) -> None:
    model = LanguageModel(tiny_gpt2())
    tracer = lines(model)
    job = Job.from_bytes(tracer.job.to_bytes())
    check, results = model.check(job), model.run(job)
    for name, value in results.items():
        expected = check.results[name]
        assert expected.shape == shape_of(value), name
        assert expected.dtype == dtype_of(value), name
        size = sum(one.numel() * one.element_size() for one in tensors_of(value))
        assert expected.bytes == size and not expected.reason, name
    assert check.result_bytes is not None and list(check.results) == list(results)
    assert check.passes == len(tracer.plan.passes)
    assert (
        check.peak_bytes.value
        > check.weight_bytes
        == sum(weight.numel() * 4 for weight in model.module.parameters())
        + sum(buffer.nbytes for buffer in model.module.buffers())
    )
    assert check.flops == check.model_flops.value + check.graph_flops.value
    for estimate in (check.model_flops, check.graph_flops, check.peak_bytes):
        assert estimate.value > 0 and estimate.how


def test_nothing_is_loaded_and_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel("insitu/eiffel")
    with model.scan("The Louvre is in", generate=True, max_new_tokens=2) as tracer:
        model.lm_head.output.save("logits")
    other = LanguageModel("insitu/eiffel")
    check = other.check(tracer.job)
    assert not model.loaded and not other.loaded
    assert check.results["logits"].shape == (1, 1, 1336) and check.passes == 1
    runs: list[int] = []
    small = tiny_gpt2()
    wrapped = LanguageModel(small)
    with wrapped.scan(IDS) as tracer:
        wrapped.lm_head.output.save()
    forward = small.transformer.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        runs.append(type(kwargs["input_ids"]) is torch.Tensor)
        return forward(*args, **kwargs)

    monkeypatch.setattr(small.transformer, "forward", counted)
    wrapped.check(tracer.job)
    assert not any(runs)


def test_floating_point_operations_are_about_what_pytorch_counts() -> None:
    module = tiny_gpt2()
    ids = torch.randint(100, (3, 20))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(ids, use_cache=False)
    counted = counter.get_total_flops()
    for model in (LanguageModel(module), Model(module)):
        with model.trace(input_ids=ids) as tracer:
            model.lm_head.output.save()
        flops = model.check(tracer.job).model_flops
        assert 0.95 * counted < flops.value < 1.35 * counted, flops


def test_what_was_recorded_is_counted_too() -> None:
    model = Model(nn.Sequential(nn.Identity()))
    x = torch.ones(64, 32)
    with model.trace(x) as tracer:
        product = model[0].output @ torch.ones(32, 128)
        product.save()
        torch.linalg.svdvals(product).save()
        (model[0].output.expand(1000, 64, 32) * 2.0).sum().save()
    check = model.check(tracer.job)
    known = 2 * 64 * 32 * 128 + 10 * 64 * 128 * 64 + 2 * 1000 * 64 * 32
    assert known < check.graph_flops.value < 1.2 * known
    wide = 1000 * 64 * 32 * 4
    assert wide < check.peak_bytes.value < 2 * wide


def test_a_shape_that_depends_on_values_is_said() -> None:
    model = LanguageModel(tiny_gpt2())
    with model.trace(IDS) as tracer:
        model.lm_head.output[0, -1].nonzero().save("where")
        model.lm_head.output.save("logits")
    check = model.check(tracer.job)
    where = check.results["where"]
    assert where.shape is None and where.bytes is None and "depends on values" in where.reason
    assert check.result_bytes is None and check.results["logits"].bytes == 2 * 4 * 100 * 4
    assert "2 at the largest size that they can have" in check.graph_flops.how
    assert "where: ? ?, ? bytes" in repr(check)


def test_later_steps_are_at_most_what_the_first_is() -> None:
    model = LanguageModel(tiny_gpt2())
    with model.generate(IDS, max_new_tokens=3, eos_token_id=99) as generator:
        with generator.every_step():
            model.transformer.h[1].output[0].save("all")
        with generator.step(2):
            model.transformer.h[1].output[0].save("third")
    check, results = model.check(generator.job), model.run(generator.job)
    assert check.results["all"].shape == results["all"][0].shape
    assert "list of at most 3" in check.results["all"].reason
    assert sum(one.nbytes for one in results["all"]) <= (check.results["all"].bytes or 0)
    assert results["third"].nbytes <= (check.results["third"].bytes or 0)
    assert "later step" in check.results["third"].reason


def test_the_peak_grows_with_prompts_gradients_and_results() -> None:
    model = LanguageModel(tiny_gpt2())

    def peak(ids: torch.Tensor, lines: Callable[[Any], Any]) -> float:
        with model.trace(ids) as tracer:
            lines(model.transformer.h[3].output[0])
        check = model.check(tracer.job)
        return check.peak_bytes.value - check.weight_bytes

    short, long = IDS[:, :2], torch.ones(2, 32).long()
    plain: Callable[[Any], Any] = lambda x: x.sum().save()  # noqa: E731
    assert 8 * peak(short, plain) < peak(long, plain)
    with_gradient: Callable[[Any], Any] = lambda x: (x.grad.save(), x.sum().backward())  # noqa: E731
    assert 1.5 * peak(long, plain) < peak(long, with_gradient)
    many: Callable[[Any], Any] = lambda x: [x.repeat(100, 1, 1).save() for _ in range(3)]  # noqa: E731
    assert peak(long, many) > 3 * 100 * 2 * 32 * 16 * 4


def wrong_shape(model: LanguageModel) -> None:
    model.transformer.h[1].output[0] @ torch.ones(3, 3)


def too_late(model: LanguageModel) -> None:
    model.transformer.h[0].output[0][:] = model.transformer.h[2].output[0]


def never(model: LanguageModel) -> None:
    model.transformer.h[0].attn.call(3).output.save()


@pytest.mark.parametrize(
    ("lines", "kind"),
    [(wrong_shape, ShapeError), (too_late, CausalityError), (never, NeverRanError)],
)
def test_what_is_wrong_is_found_at_its_line(
    lines: Callable[[LanguageModel], None], kind: type[Exception]
) -> None:
    model = LanguageModel(tiny_gpt2())
    with pytest.raises(kind), model.trace(IDS) as tracer:
        lines(model)
    with pytest.raises(kind) as caught:
        model.check(Job.from_bytes(tracer.job.to_bytes()))
    assert "test_job_check.py" in str(caught.value)


def test_a_list_of_values_is_not_known_before_the_run(gpt2: LanguageModel) -> None:
    def record(opened: Any) -> Any:
        with opened as tracer:
            gpt2.lm_head.output[0, -1, :3].tolist().save("numbers")
        return tracer.job

    job = record(gpt2.trace(IDS))
    check = gpt2.check(record(gpt2.scan(IDS)))
    assert check.results["numbers"].bytes is None
    with torch.no_grad():
        expected = gpt2.module(IDS, use_cache=False).logits[0, -1, :3].tolist()
    for limits in (None, Limits(operations=1e12, peak_bytes=2**30)):
        assert gpt2.run(job, limits=limits)["numbers"] == pytest.approx(expected)


def test_objects_without_data_are_not_copied_by_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch copies the storages of tensors in them, and those without data have no memory."""

    def read(self: torch.Tensor, memo: Any) -> torch.Tensor:
        raise AssertionError("memory that is not there was read")

    monkeypatch.setattr(torch.Tensor, "__deepcopy__", read)
    model = LanguageModel(tiny_gpt2())
    with model.scan(IDS, use_cache=True):
        model.transformer.h[1].output = model.transformer.h[1].output[0] * 2
        saved = model.output.past_key_values.save()
        again = saved.layers[1].keys.save()
    assert again.shape[2] == IDS.shape[1]


def test_an_object_is_no_result_of_a_job() -> None:
    model = LanguageModel(tiny_gpt2())
    with model.trace(IDS, use_cache=True) as tracer:
        saved = model.output.past_key_values.save()
    assert saved.value.layers[1].keys.shape[2] == IDS.shape[1]
    for run in (model.check, model.run):
        with pytest.raises(OperationError, match=r"DynamicCache is no data(.|\n)*test_job_check"):
            run(Job.from_bytes(tracer.job.to_bytes()))
