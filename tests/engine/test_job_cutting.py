"""A job that is cut into pieces gives what it gives whole, and each piece is a job of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from insitu import (
    Job,
    JobError,
    LanguageModel,
    Model,
    NoValueError,
    OptionError,
    Results,
    ShapeError,
    join,
)
from insitu.engine.job_cutting import cut, merge
from insitu.graph.operations import SAVE
from tests.conftest import Twice, tiny_gpt2

pytestmark = pytest.mark.no_wire
PROMPTS = [torch.tensor([ids]) for ids in ([5, 6, 7], [8, 9, 10, 11, 2], [3, 1], [4, 4, 9, 20])]


@pytest.fixture(scope="module")
def eiffel() -> LanguageModel:
    return LanguageModel("insitu/eiffel", device_map="cpu")


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel(tiny_gpt2())


def sizes(pieces: Sequence[Job]) -> list[list[int]]:
    return [[len(block.prompts) for block in piece.blocks] for piece in pieces]


def in_pieces(model: Model, job: Job, most: int) -> tuple[list[Job], Results]:
    """Cuts a job, runs each piece from its bytes, and merges what is read back."""
    pieces = cut(job, most)
    there = [Job.from_bytes(piece.to_bytes()) for piece in pieces]
    found = [model.run(piece, raises=False) for piece in there]
    results = [Results.from_bytes(one.to_bytes()) for one in found]
    return pieces, merge(Job.from_bytes(job.to_bytes()), there, results)


def is_whole(job: Job, most: int) -> bool:
    return all(piece is job for piece in cut(job, most))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and torch.allclose(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)
        )
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def failures(results: Results) -> list[Any]:
    return [
        (one.block, [*one.invocations], [*one.names], type(one.error).__name__)
        for one in results.failed
    ]


def check_like_whole(model: Model, job: Job, most: int) -> list[Job]:
    """Asserts that a job in pieces gives what it gives whole; returns the pieces."""
    pieces, merged = in_pieces(model, job, most)
    whole = model.run(job, raises=False)
    assert [*merged] == [*whole] and dict(merged.about) == dict(whole.about)
    for name, value in whole.items():
        assert same(merged[name], value), name
    assert failures(merged) == failures(whole)
    for mine, theirs in zip(merged.failed, whole.failed, strict=True):
        if not isinstance(mine.error, NoValueError):  # which names the blocks of the piece
            assert str(mine.error).splitlines()[0] == str(theirs.error).splitlines()[0]
    assert [one is None for one in merged.outputs] == [one is None for one in whole.outputs]
    for mine, theirs in zip(merged.outputs, whole.outputs, strict=True):
        if mine is not None and theirs is not None:
            assert same(mine.whole, theirs.whole) and same([*mine.each], [*theirs.each])
    assert [*merged.differences] == [*whole.differences]
    return pieces


def sweep(
    model: LanguageModel,
    count: int,
    extra: Callable[[int], None] = lambda number: None,
    donor: bool = False,
) -> Job:
    """Adds to the residual stream, in one place a run; or puts another prompt's there."""
    ids = torch.tensor([[11, 25, 40, 7, 3, 90]])
    with model.scan() as tracer:
        taken: Any = None
        if donor:
            with tracer.invoke(ids + 1):
                taken = [model.transformer.h[layer].output[0] for layer in range(4)]
                model.lm_head.output[0, -1].save("clean")
        for number in range(count):
            layer, position = number % 4, number % 6
            with tracer.invoke(ids):
                hidden = model.transformer.h[layer].output[0]
                if donor:
                    hidden[:, position] = taken[layer][:, position]
                else:
                    hidden[:, position] += float(number)
                extra(number)
                model.lm_head.output[0, -1].save(f"logits.{number}")
    return tracer.job


def hooked_sweep(model: LanguageModel, count: int, donor: bool) -> list[torch.Tensor]:
    """The oracle: the same sweep with plain hooks of PyTorch."""
    ids, module = torch.tensor([[11, 25, 40, 7, 3, 90]]), model.load()
    taken: dict[int, torch.Tensor] = {}

    def run(ids: torch.Tensor, layer: int, change: Callable[[torch.Tensor], None]) -> torch.Tensor:
        def hook(_: Any, args: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            change(hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = module.get_submodule(f"transformer.h.{layer}").register_forward_hook(hook)
        try:
            with torch.no_grad():
                return module(input_ids=ids, use_cache=False).logits[0, -1]
        finally:
            handle.remove()

    for layer in range(4):
        run(ids + 1, layer, lambda hidden, at=layer: taken.update({at: hidden.clone()}))
    found: list[torch.Tensor] = []
    for number in range(count):
        layer, position = number % 4, number % 6

        def change(
            hidden: torch.Tensor, number: int = number, layer: int = layer, position: int = position
        ) -> None:
            if donor:
                hidden[:, position] = taken[layer][:, position]
            else:
                hidden[:, position] += float(number)

        found.append(run(ids, layer, change))
    return found


@pytest.mark.thorough
def test_a_sweep_in_pieces_is_what_hooks_give(eiffel: LanguageModel) -> None:
    job = sweep(eiffel, 40)
    pieces, merged = in_pieces(eiffel, job, 12)
    assert sizes(pieces) == [[12], [12], [12], [4]]
    for number, logits in enumerate(hooked_sweep(eiffel, 40, donor=False)):
        assert torch.allclose(merged[f"logits.{number}"], logits, atol=1e-4, rtol=1e-5)
    assert [*merged] == [f"logits.{number}" for number in range(40)]
    assert merged.about == job.saves and not merged.failed and merged.outputs == [None]


def test_what_all_use_is_in_each_piece_and_saved_once(eiffel: LanguageModel) -> None:
    pieces, merged = in_pieces(eiffel, sweep(eiffel, 40, donor=True), 11)
    assert sizes(pieces) == [[11], [11], [11], [11]]
    for number, logits in enumerate(hooked_sweep(eiffel, 40, donor=True)):
        assert torch.allclose(merged[f"logits.{number}"], logits, atol=1e-4, rtol=1e-5)
    assert next(iter(merged)) == "clean"
    saved = [name for piece in pieces for name in piece.saves]
    assert saved.count("clean") == 1
    names = [row[0] for piece in pieces for row in piece.blocks[0].graph.rows]
    assert names.count(SAVE) == 41  # what another piece has saved is not even copied


def test_pieces_are_found_again_in_another_process(tiny: LanguageModel) -> None:
    job = sweep(tiny, 9, donor=True)
    again = [piece.to_bytes() for piece in cut(Job.from_bytes(job.to_bytes()), 4)]
    first = [Job.from_bytes(piece.to_bytes()).to_bytes() for piece in cut(job, 4)]
    assert again == first


def test_a_small_job_is_left_as_it_is(tiny: LanguageModel) -> None:
    job = sweep(tiny, 4)
    (alone,) = cut(job, 4)
    assert alone is job
    results = tiny.run(job)
    assert merge(job, [job], [results]) is results
    with pytest.raises(OptionError, match="`most` is 0"):
        cut(job, 0)
    joined = join([job, job])
    assert is_whole(joined, 1)


def test_what_fails_has_its_own_number(tiny: LanguageModel) -> None:
    def fails(number: int) -> None:
        if number in (2, 9):
            hidden = tiny.transformer.h[3].output[0]
            hidden[hidden > 1e9].reshape(number, 1111).save(f"bad.{number}")

    job = sweep(tiny, 12, fails)
    assert len(check_like_whole(tiny, job, 5)) == 3
    whole = tiny.run(job, raises=False)
    assert [one[:2] for one in failures(whole)] == [(0, [2]), (0, [9])]


def test_what_fails_in_a_donor_fails_for_all_once(tiny: LanguageModel) -> None:
    with tiny.scan() as tracer:
        with tracer.invoke(PROMPTS[0]):
            hidden = tiny.transformer.h[1].output[0]
            tiny.lm_head.output.save("clean")
            hidden[hidden > 1e9].reshape(7, 1111)
        for number in range(8):
            with tracer.invoke(PROMPTS[0]):
                if number != 5:
                    tiny.transformer.h[1].output[0][:] = hidden
                tiny.lm_head.output.save(f"logits.{number}")
    pieces = check_like_whole(tiny, tracer.job, 4)
    assert len(pieces) == 3
    (failure,) = in_pieces(tiny, tracer.job, 4)[1].failed
    assert [*failure.invocations] == [0, 1, 2, 3, 4, 5, 7, 8]


def test_a_line_outside_that_fails_is_told_once(tiny: LanguageModel) -> None:
    with tiny.scan() as tracer:
        with tracer.invoke(PROMPTS[0]):
            hidden = tiny.transformer.h[1].output[0]
            tiny.lm_head.output.save("clean")
        wrong = hidden[hidden > 1e9].reshape(7, 1111)
        for number in range(8):
            with tracer.invoke(PROMPTS[0]):
                if number % 2:
                    tiny.transformer.h[1].output[0][:] = wrong.sum()
                tiny.lm_head.output.save(f"logits.{number}")
    assert len(check_like_whole(tiny, tracer.job, 4)) == 3
    merged = in_pieces(tiny, tracer.job, 4)[1]
    (failure,) = merged.failed
    assert [*failure.invocations] == [2, 4, 6, 8] and "clean" in merged


def test_a_prompt_that_the_model_cannot_take_is_refused_alone(tiny: LanguageModel) -> None:
    job = sweep(tiny, 7)
    prompts = [*job.blocks[0].prompts]
    prompts[5].ids.fill_(100_000)  # pyright: ignore[reportOptionalMemberAccess]
    assert len(check_like_whole(tiny, job, 3)) == 3


def test_those_that_use_each_other_stay_together(tiny: LanguageModel) -> None:
    with tiny.scan() as tracer:
        for number in range(6):
            one, other = tracer.invoke(PROMPTS[0]), tracer.invoke(PROMPTS[0] + 1)
            with one:
                first = tiny.transformer.h[1].output[0]
            with other:
                tiny.transformer.h[1].output[0][:] = first * float(number)
                second = tiny.transformer.h[2].output[0]
            with one:
                tiny.transformer.h[3].output[0][:] = second
                tiny.lm_head.output.save(f"one.{number}")
            with other:
                tiny.lm_head.output.save(f"other.{number}")
    assert sizes(check_like_whole(tiny, tracer.job, 5)) == [[4], [4], [4]]
    assert sizes(check_like_whole(tiny, tracer.job, 1)) == [[2]] * 6


def test_a_chain_is_not_cut(tiny: LanguageModel) -> None:
    with tiny.scan() as tracer:
        last: Any = None
        for number in range(8):
            with tracer.invoke(PROMPTS[0]):
                if last is not None:
                    tiny.transformer.h[1].output[0][:] = last
                last = tiny.transformer.h[2].output[0]
                tiny.lm_head.output.save(f"logits.{number}")
    assert is_whole(tracer.job, 2)


def test_lines_outside_keep_together_what_they_use(tiny: LanguageModel) -> None:
    with tiny.scan() as tracer:
        found: list[Any] = []
        for ids in (*PROMPTS, *PROMPTS):
            with tracer.invoke(ids):
                found.append(tiny.lm_head.output[0, -1])
                found[-1].norm().save(f"norm.{len(found)}")
        stacked: Any = torch.stack([found[1], found[4]])
        stacked.save("stacked")
        found[6].sum().save("sum")
    assert sizes(check_like_whole(tiny, tracer.job, 3)) == [[3], [3], [2]]
    with tiny.scan() as tracer:
        found = []
        for ids in (*PROMPTS, *PROMPTS):
            with tracer.invoke(ids):
                found.append(tiny.lm_head.output[0, -1])
        stacked = torch.stack(found)
        stacked.save()
    assert is_whole(tracer.job, 3)


def test_a_line_in_another_invocation_needs_both(tiny: LanguageModel) -> None:
    """It is of the one in whose `with` it stands, which fails if it does."""
    with tiny.scan() as tracer:
        with tracer.invoke(PROMPTS[0]):
            clean = tiny.lm_head.output[0, -1]
            (clean * 2).save("clean")
        for number in range(9):
            with tracer.invoke(PROMPTS[1]):
                tiny.transformer.h[1].output[0][:] *= float(number)
                (tiny.lm_head.output[0, -1] - clean).norm().save(f"norm.{number}")
                half = clean[clean > 1e9].reshape(7, 3) if number == 4 else clean / 2
                half.save(f"half.{number}")
    assert sizes(check_like_whole(tiny, tracer.job, 4)) == [[4], [4], [4]]


def test_gradients_of_each_go_with_it(tiny: LanguageModel) -> None:
    def attributed(number: int) -> None:
        hidden = tiny.transformer.h[2].output[0]
        tiny.lm_head.output[0, -1, number].backward()
        hidden.grad.save(f"grad.{number}")

    job = sweep(tiny, 9, attributed)
    assert sizes(check_like_whole(tiny, job, 4)) == [[4], [4], [1]]
    job = sweep(tiny, 9, attributed, donor=True)
    assert sizes(check_like_whole(tiny, job, 4)) == [[4], [4], [4]]


def test_gradients_that_meet_keep_all_together(tiny: LanguageModel) -> None:
    with tiny.scan() as tracer:
        losses, hidden = [], []
        for ids in PROMPTS:
            with tracer.invoke(ids):
                hidden.append(tiny.transformer.h[1].output[0])
                losses.append(tiny.lm_head.output.sum())
        torch.stack(losses).sum().backward()
        for number, value in enumerate(hidden):
            value.grad.save(f"grad.{number}")
    assert is_whole(tracer.job, 2)
    vector = torch.zeros(16, requires_grad=True)
    with tiny.scan() as tracer:
        for ids in PROMPTS:
            with tracer.invoke(ids):
                tiny.transformer.h[1].output[0][:] += vector
                tiny.lm_head.output.sum().backward()
    assert is_whole(tracer.job, 2)


def test_sessions_are_cut_where_they_use_nothing_of_each_other(tiny: LanguageModel) -> None:
    with tiny.session() as session:
        with tiny.trace() as tracer:
            for number, ids in enumerate(PROMPTS):
                with tracer.invoke(ids):
                    tiny.transformer.h[1].output[0].save(f"first.{number}")
        with tiny.trace() as tracer:
            for number, ids in enumerate(PROMPTS):
                with tracer.invoke(ids):
                    tiny.transformer.h[2].output[0].save(f"second.{number}")
    pieces = check_like_whole(tiny, session.job, 3)
    assert sizes(pieces) == [[3], [1, 2], [2]]


def test_a_session_takes_the_values_of_its_first_block_along(tiny: LanguageModel) -> None:
    with tiny.session() as session:
        with tiny.trace(PROMPTS[0]):
            clean = tiny.transformer.h[1].output[0][:, -1]
            tiny.lm_head.output.save("clean")
        with tiny.trace() as tracer:
            direction = clean / clean.norm()
            for number in range(9):
                with tracer.invoke(PROMPTS[number % 4]):
                    tiny.transformer.h[2].output[0][:, -1] += direction * float(number)
                    tiny.lm_head.output.save(f"logits.{number}")
    pieces = check_like_whole(tiny, session.job, 4)
    assert sizes(pieces) == [[1, 3], [1, 3], [1, 3]]


def test_a_session_whose_first_block_fails_fails_as_it_does_whole(tiny: LanguageModel) -> None:
    with pytest.raises(ShapeError), tiny.session() as session:
        with tiny.trace() as tracer:
            with tracer.invoke(PROMPTS[0]):
                hidden = tiny.transformer.h[1].output[0]
                wrong = hidden[hidden > 1e9].reshape(7, 1111)
            with tracer.invoke(PROMPTS[1]):
                tiny.lm_head.output.save("fine")
        with tiny.trace() as tracer:
            for number in range(8):
                with tracer.invoke(PROMPTS[2]):
                    if number in (1, 6):
                        tiny.transformer.h[2].output[0][:] += wrong.sum()
                    tiny.lm_head.output.save(f"logits.{number}")
    assert len(check_like_whole(tiny, session.job, 3)) > 2


def test_a_generation_stays_whole(tiny: LanguageModel) -> None:
    with tiny.session() as session:
        with tiny.generate(max_new_tokens=3, do_sample=False) as generator:
            for number, ids in enumerate(PROMPTS):
                with generator.invoke(ids):
                    tiny.lm_head.output[:, -1].save(f"logits.{number}")
        with tiny.trace() as tracer:
            for number, ids in enumerate(PROMPTS):
                with tracer.invoke(ids):
                    tiny.transformer.h[2].output[0].save(f"hidden.{number}")
    assert sizes(check_like_whole(tiny, session.job, 2)) == [[4], [2], [2]]


def test_numbers_that_are_drawn_for_several_are_drawn_once(tiny: LanguageModel) -> None:
    def noisy(seeded: bool, in_donor: bool) -> Job:
        with tiny.scan() as tracer:
            with tracer.invoke(PROMPTS[0], **({"seed": 3} if seeded else {})):
                hidden = tiny.transformer.h[1].output[0]
                noise = torch.randn_like(hidden) if in_donor else hidden
            for number in range(8):
                with tracer.invoke(PROMPTS[0]):
                    added = noise if in_donor else hidden + torch.randn_like(hidden)
                    tiny.transformer.h[2].output[0][:] = added
                    tiny.lm_head.output.save(f"logits.{number}")
        return tracer.job

    assert len(cut(noisy(seeded=False, in_donor=False), 3)) == 4
    for seeded, in_donor in ((True, False), (False, True), (True, True)):
        job = noisy(seeded, in_donor)
        assert is_whole(job, 3)


def test_own_seeds_draw_what_they_draw_whole(tiny: LanguageModel) -> None:
    with tiny.scan() as tracer:
        for number in range(7):
            with tracer.invoke(PROMPTS[number % 4], seed=number):
                hidden = tiny.transformer.h[1].output[0]
                hidden[:] += torch.randn_like(hidden)
                tiny.lm_head.output.save(f"logits.{number}")
    assert sizes(check_like_whole(tiny, tracer.job, 3)) == [[3], [3], [1]]


def test_modules_that_are_skipped_called_and_stopped_at(tiny: LanguageModel) -> None:
    with tiny.scan() as tracer:
        with tracer.invoke(PROMPTS[0]):
            hidden = tiny.transformer.h[1].output[0]
            clean = tiny.lm_head(tiny.transformer.ln_f(hidden)).save("clean")
        for number in range(8):
            with tracer.invoke(PROMPTS[0]):
                if number % 3 == 0:
                    tiny.transformer.h[2].skip(hidden)
                if number % 3 == 1:
                    tiny.transformer.h[1].output[0].save(f"early.{number}")
                    tiny.transformer.h[1].stop()
                else:
                    (tiny.lm_head.output - clean).save(f"logits.{number}")
    assert sizes(check_like_whole(tiny, tracer.job, 4)) == [[4], [4], [3]]


def test_any_module_can_be_swept() -> None:
    torch.manual_seed(0)
    model = Model(Twice())
    with model.scan() as tracer:
        for number in range(5):
            with tracer.invoke(x=torch.ones(2, 4) * number):
                model.shared.output[:] += float(number)
                model.shared.output.save(f"{number}x")
    assert sizes(check_like_whole(model, tracer.job, 2)) == [[2], [2], [1]]


def test_pieces_and_results_of_others_are_refused(tiny: LanguageModel) -> None:
    job = sweep(tiny, 9)
    pieces = cut(job, 4)
    results = [tiny.run(piece) for piece in pieces]
    with pytest.raises(JobError, match="3 pieces and 2 results"):
        merge(job, pieces, results[:2])
    with pytest.raises(JobError, match="not all pieces"):
        merge(job, pieces[:2], results[:2])
    with pytest.raises(JobError, match="not the pieces"):
        merge(sweep(tiny, 8), pieces, results)


def check_any_job(tiny: LanguageModel, data: Any) -> None:
    """Invocations use values of others, in lines in and outside of them, some of which fail."""
    count, most = data.draw(st.integers(3, 9)), data.draw(st.integers(1, 5))
    with tiny.scan() as tracer:
        values: list[Any] = []
        for number in range(count):
            with tracer.invoke(data.draw(st.sampled_from(PROMPTS))[:, :2]):
                hidden = tiny.transformer.h[2].output[0]
                if values and data.draw(st.booleans()):
                    at = data.draw(st.integers(0, min(len(values) - 1, 2)))
                    tiny.transformer.h[3].output[0][:] += values[at] * 0.5
                if data.draw(st.integers(0, 9)) == 0:
                    hidden[hidden > 1e9].reshape(number + 1, 1111).save(f"bad.{number}")
                values.append(tiny.transformer.h[data.draw(st.integers(0, 1))].output[0])
                tiny.lm_head.output[0, -1].save(f"logits.{number}")
                (hidden * 2).save(f"hidden.{number}")
            if data.draw(st.integers(0, 5)) == 0:
                at = data.draw(st.integers(0, number))
                (values[at] + values[number]).save(f"sum.{number}")
    check_like_whole(tiny, tracer.job, most)


ANY = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=8, **ANY)
@given(st.data())
def test_any_job_in_pieces_gives_what_it_gives_whole(tiny: LanguageModel, data: Any) -> None:
    check_any_job(tiny, data)


@pytest.mark.slow
@settings(max_examples=100, **ANY)
@given(st.data())
def test_many_jobs_in_pieces_give_what_they_give_whole(tiny: LanguageModel, data: Any) -> None:
    check_any_job(tiny, data)
