"""Blocks in every form that Python has for them, against a plain forward hook."""

import asyncio
import contextlib
import linecache
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch

from insitu import InsituError, LanguageModel, NoValueError, ShapeError
from tests.conftest import hooked_hidden
from tests.fidelity.test_writing import IDS, OTHER, SHORT, logits

PATH = "transformer.h.1"
LINE = "with model.trace(ids): saved = model.transformer.h[1].output[0].save()"


def expected(model: LanguageModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    return hooked_hidden(model.module, PATH, ids)


def test_exec_of_a_string_on_one_line(gpt2: LanguageModel) -> None:
    names: dict[str, Any] = {"model": gpt2, "ids": IDS}
    exec(LINE, names)
    assert torch.equal(names["saved"], expected(gpt2))


def test_exec_with_names_of_its_own_and_in_eval(gpt2: LanguageModel) -> None:
    inner: dict[str, Any] = {}
    exec(LINE, {"model": gpt2, "ids": IDS}, inner)
    assert torch.equal(inner["saved"], expected(gpt2))
    tracer = gpt2.trace(IDS)
    with tracer:
        saved = eval("gpt2.transformer.h[1].output[0].save()")
    assert torch.equal(saved, expected(gpt2))


def test_a_notebook_cell_and_its_line_in_an_error(gpt2: LanguageModel) -> None:
    def run_cell(number: int, source: str, names: dict[str, Any]) -> None:
        file = f"/tmp/ipykernel_1/{number}.py"  # the way a kernel compiles a cell
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)
        exec(compile(source, file, "exec"), names)

    names: dict[str, Any] = {"model": gpt2, "ids": IDS}
    run_cell(
        1, "with model.trace(ids):\n    saved = model.transformer.h[1].output[0].save()", names
    )
    run_cell(2, "total = saved.sum()", names)
    assert torch.equal(names["total"], expected(gpt2).sum())
    wrong = "with model.trace(ids):\n    model.lm_head.output @ model.lm_head.output  # the cell"
    with pytest.raises(ShapeError, match=r"3\.py.*line 2\n.*the cell"):
        run_cell(3, wrong, names)


def test_an_exit_stack(gpt2: LanguageModel) -> None:
    with contextlib.ExitStack() as stack:
        tracer = stack.enter_context(gpt2.trace())
        stack.enter_context(tracer.invoke(IDS))
        saved = gpt2.transformer.h[1].output[0].save()
    assert torch.equal(saved, expected(gpt2))


def test_a_context_manager_of_the_users(gpt2: LanguageModel) -> None:
    @contextlib.contextmanager
    def doubled(ids: torch.Tensor) -> Iterator[None]:
        with gpt2.trace(ids):
            gpt2.transformer.h[1].output = gpt2.transformer.h[1].output[0] * 2
            yield

    with doubled(IDS):
        result = gpt2.lm_head.output.save()
    assert torch.equal(result, logits(gpt2, {PATH: lambda h: h * 2}, IDS))


def test_a_class_of_the_users_with_enter_and_exit(gpt2: LanguageModel) -> None:
    class Traced:
        def __enter__(self) -> "Traced":
            self.tracer = gpt2.trace(IDS)
            self.tracer.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.tracer.__exit__(*error)

    with Traced():
        saved = gpt2.transformer.h[1].output[0].save()
    assert torch.equal(saved, expected(gpt2))


def test_generators_that_are_suspended_in_a_block(gpt2: LanguageModel) -> None:
    def hidden(ids: torch.Tensor) -> Iterator[Any]:
        with gpt2.trace(ids):
            saved = gpt2.transformer.h[1].output[0].save()
            yield None
        yield saved

    first, second = hidden(IDS), hidden(OTHER)
    next(first), next(second)  # both are inside of their blocks
    assert torch.equal(next(first), expected(gpt2))
    assert torch.equal(next(second), expected(gpt2, OTHER))


def test_a_generator_that_is_never_finished_runs_nothing(gpt2: LanguageModel) -> None:
    def hidden() -> Iterator[Any]:
        with gpt2.trace(IDS):
            yield gpt2.transformer.h[1].output[0].save()

    generator = hidden()
    saved = next(generator)
    generator.close()
    with pytest.raises(NoValueError, match="GeneratorExit"):
        print(saved.value)
    with gpt2.trace(IDS):
        again = gpt2.transformer.h[1].output[0].save()
    assert torch.equal(again, expected(gpt2))


def test_a_return_in_the_block(gpt2: LanguageModel) -> None:
    def hidden(ids: torch.Tensor) -> Any:
        with gpt2.trace(ids):
            return gpt2.transformer.h[1].output[0].save()

    assert torch.equal(hidden(IDS), expected(gpt2))


def test_break_and_continue_out_of_the_block(gpt2: LanguageModel) -> None:
    found = []
    for ids in (IDS, OTHER, SHORT):
        with gpt2.trace(ids):
            found.append(gpt2.transformer.h[1].output[0].save())
            if ids is OTHER:
                break
            continue
    assert torch.equal(found[0], expected(gpt2)) and torch.equal(found[1], expected(gpt2, OTHER))
    assert len(found) == 2


def test_try_and_finally_in_the_block(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        try:
            raise KeyError
        except KeyError:
            caught = gpt2.transformer.h[1].output[0].save()
        try:
            print(gpt2.transformer.nothing)
        except AttributeError:
            other = gpt2.transformer.h[1].output[0].mean().save()
        finally:
            last = gpt2.transformer.h[1].output[0].sum().save()
    value = expected(gpt2)
    assert torch.equal(caught, value) and torch.equal(other, value.mean())
    assert torch.equal(last, value.sum())


def test_an_error_that_is_caught_around_the_block(gpt2: LanguageModel) -> None:
    try:
        with gpt2.trace(IDS):
            saved = gpt2.transformer.h[1].output[0].save()
            raise KeyError
    except KeyError:
        pass
    with pytest.raises(NoValueError, match="KeyError"):
        print(saved.value)


def test_comprehensions_lambdas_nested_functions_and_class_bodies(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        listed = [block.output[0].save() for block in gpt2.transformer.h]
        mapped = list(map(lambda block: block.output[0].save(), gpt2.transformer.h))  # noqa: C417

        def nested() -> Any:
            return (lambda: gpt2.transformer.h[1].output[0].save())()

        called = nested()

        class Body:
            saved = gpt2.transformer.h[1].output[0].save()

    value = expected(gpt2)
    for saved in (listed[1], mapped[1], called, Body.saved):
        assert torch.equal(saved, value)


def test_an_async_function_and_an_async_block(gpt2: LanguageModel) -> None:
    async def plain(ids: torch.Tensor) -> Any:
        with gpt2.trace(ids):
            await asyncio.sleep(0)
            return gpt2.transformer.h[1].output[0].save()

    async def block(ids: torch.Tensor) -> Any:
        async with gpt2.trace(ids):
            saved = gpt2.transformer.h[1].output[0].save()
            await asyncio.sleep(0.001)
            doubled = (saved * 2).save()
        return doubled

    async def everything() -> list[Any]:
        return await asyncio.gather(plain(IDS), block(OTHER), block(SHORT), plain(OTHER))

    one, other, short, last = asyncio.run(everything())
    assert torch.equal(one, expected(gpt2)) and torch.equal(last, expected(gpt2, OTHER))
    assert torch.equal(other, expected(gpt2, OTHER) * 2)
    assert torch.equal(short, expected(gpt2, SHORT) * 2)


def test_async_generation_with_invocations_and_generators(gpt2: LanguageModel) -> None:
    async def steps() -> AsyncIterator[Any]:
        async with gpt2.generate(max_new_tokens=2, eos_token_id=None) as generator:
            with generator.invoke(IDS):
                saved = gpt2.transformer.h[1].output[0].save()
            yield generator
        yield saved

    async def run() -> list[Any]:
        return [item async for item in steps()]

    generator, saved = asyncio.run(run())
    assert torch.equal(saved, expected(gpt2)) and generator.output.shape == (1, 8)


def slow(model: LanguageModel, seconds: float) -> Any:
    return model.module.transformer.wte.register_forward_hook(lambda *_: time.sleep(seconds))


def test_the_event_loop_goes_on_while_the_model_runs(gpt2: LanguageModel) -> None:
    handle, ticks = slow(gpt2, 0.2), 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    async def run() -> None:
        ticking = asyncio.ensure_future(tick())
        async with gpt2.trace(IDS):
            gpt2.lm_head.output.save()
        ticking.cancel()

    asyncio.run(run())
    handle.remove()
    assert ticks >= 5


def test_an_async_block_that_is_cancelled_or_fails_leaves_the_model_usable(
    gpt2: LanguageModel,
) -> None:
    handle, kept = slow(gpt2, 0.05), []

    async def run() -> None:
        async with gpt2.trace(IDS):
            kept.append(gpt2.lm_head.output.save())

    async def cancelled() -> None:
        task = asyncio.ensure_future(run())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    handle.remove()
    with pytest.raises(NoValueError, match="cancelled"):
        print(kept[0].value)

    async def fails() -> None:
        async with gpt2.trace(IDS):
            gpt2.lm_head.output @ torch.zeros(3, 3)  # the line to find

    with pytest.raises(InsituError, match="the line to find"):
        asyncio.run(fails())
    assert not any(part._forward_hooks for part in gpt2.module.modules())
    with gpt2.trace(IDS):
        again = gpt2.transformer.h[1].output[0].save()
    assert torch.equal(again, expected(gpt2))


def test_eight_threads_have_their_own_results(gpt2: LanguageModel) -> None:
    found: dict[int, list[Any]] = {}
    ready = threading.Barrier(8)

    def work(number: int) -> None:
        ready.wait()
        values = []
        for _ in range(5):
            with gpt2.trace(IDS):
                gpt2.transformer.h[1].output = gpt2.transformer.h[1].output[0] * number
                gpt2.transformer.h[2].output[0][:, 0] = number
                values.append(gpt2.lm_head.output.save())
        found[number] = values

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for number in range(8):

        def set_first(h: torch.Tensor, number: int = number) -> torch.Tensor:
            h[:, 0] = number
            return h

        edits = {PATH: lambda h, number=number: h * number, "transformer.h.2": set_first}
        for value in found[number]:
            assert torch.equal(value, logits(gpt2, edits, IDS)), number
