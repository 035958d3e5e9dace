"""Where a block is current: exactly in the code that its `with` statement encloses."""

import asyncio
import contextlib
import contextvars
import threading

import pytest
import torch
from torch import nn

from insitu import BlockError, Model

X = torch.ones(2, 3)


@pytest.fixture
def model() -> Model:
    return Model(nn.Sequential(nn.Identity(), nn.Identity()))


def read(model: Model):
    return model[0].output


def test_functions_called_in_a_block_are_in_it(model: Model) -> None:
    with model.trace(X):
        saved = [read(model).save(), *(f(model).save() for f in [read])]
        mapped = list(map(lambda m: m[1].output.save(), [model]))  # noqa: C417
    assert all(torch.equal(value, X) for value in saved + mapped)


def test_a_suspended_generator_does_not_leak_into_its_caller(model: Model) -> None:
    def generator():
        with model.trace(X):
            yield read(model).save()
            yield read(model).save()

    running = generator()
    first = next(running)
    with pytest.raises(BlockError):
        read(model)
    with model.trace(X * 2):
        mine = read(model).save()
        second = next(running)  # the generator's own block, although ours was opened later
        mine_too = read(model).save()
    assert next(running, None) is None
    assert torch.equal(mine, X * 2) and torch.equal(mine_too, X * 2)
    assert torch.equal(first, X) and torch.equal(second, X)


def test_a_generator_closed_in_another_context_breaks_nothing(model: Model) -> None:
    def generator():
        with model.trace(X):
            yield read(model).save()

    running = contextvars.copy_context().run(lambda: (g := generator(), next(g)))[0]
    contextvars.copy_context().run(running.close)
    running = generator()
    next(running)
    thread = threading.Thread(target=running.close)
    thread.start()
    thread.join()
    with model.trace(X):
        saved = read(model).save()
    assert torch.equal(saved, X)
    with pytest.raises(BlockError):
        read(model)


def test_a_suspended_coroutine_does_not_leak_into_its_caller(model: Model) -> None:
    class Pause:
        def __await__(self):
            yield

    async def coroutine():
        with model.trace(X):
            await Pause()
            saved = read(model).save()
        return saved

    running = coroutine()
    running.send(None)
    with pytest.raises(BlockError):
        read(model)
    with pytest.raises(StopIteration) as stop:
        running.send(None)
    assert torch.equal(stop.value.value, X)


def test_tasks_have_their_own_blocks(model: Model) -> None:
    async def task(factor: int):
        with model.trace(X * factor):
            await asyncio.sleep(0)
            saved = read(model).save()
            await asyncio.sleep(0)
        return saved

    async def main():
        return await asyncio.gather(*(task(factor) for factor in range(4)))

    for factor, saved in enumerate(asyncio.run(main())):
        assert torch.equal(saved, X * factor)


def test_context_managers_may_wrap_a_block(model: Model) -> None:
    @contextlib.contextmanager
    def wrapped(factor):
        with model.trace(X * factor) as tracer:
            before = read(model).save()
            yield tracer, before

    with wrapped(2) as (_, before):
        inside = read(model).save()
    assert torch.equal(before, X * 2) and torch.equal(inside, X * 2)
    with contextlib.ExitStack() as stack:
        stack.enter_context(model.trace(X))
        first = read(model).save()
    assert torch.equal(first, X)
    with contextlib.ExitStack() as stack:
        stack.enter_context(wrapped(3))
        second = read(model).save()
    assert torch.equal(second, X * 3)


def test_exec_and_one_line(model: Model) -> None:
    namespace = {"model": model, "X": X}
    exec("with model.trace(X): saved = model[0].output.save()", namespace)
    assert torch.equal(namespace["saved"], X)


def test_return_in_a_block_runs_it(model: Model) -> None:
    def traced():
        with model.trace(X):
            return read(model).save()

    assert torch.equal(traced(), X)


def test_another_thread_is_not_in_the_block(model: Model) -> None:
    errors = []

    def reads():
        try:
            read(model)
        except BlockError as error:
            errors.append(error)

    with model.trace(X):
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(reads,))
        thread.start()
        thread.join()
    assert len(errors) == 1


def test_blocks_nest(model: Model) -> None:
    other = Model(nn.Sequential(nn.ReLU()))
    with model.trace(X):
        outer = read(model).save()
        with other.trace(-X):
            inner = other[0].output.save()
            outer_too = model[1].output.save()
        assert torch.equal(inner, torch.zeros(2, 3))
        with model.trace(X * 5):
            nested = read(model).save()
        after = read(model).save()
    assert torch.equal(outer, X) and torch.equal(outer_too, X) and torch.equal(after, X)
    assert torch.equal(nested, X * 5)


def test_a_class_of_the_users_own_may_wrap_a_block(model: Model) -> None:
    class Wraps:
        def __enter__(self):
            self.tracer = model.trace(X)
            return self.tracer.__enter__()

        def __exit__(self, *error: object) -> None:
            return self.tracer.__exit__(*error)

    with Wraps():
        saved = read(model).save()
    assert torch.equal(saved, X)
    with pytest.raises(BlockError):
        read(model)
