"""Who may use a module: threads, forks, and runs that were broken off."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from insitu import Model, apply
from insitu.engine.exclusive import Exclusive
from insitu.graph.errors import BlockError

ONES = torch.ones(2, 3)


def small() -> Model:
    return Model(nn.Sequential(nn.Identity(), nn.ReLU(), nn.Identity()))


def run(model: Model) -> torch.Tensor:
    with model.trace(ONES):
        value = (model[1].output * 2).save()
    return value.value


def interrupted(block: Callable[[], object], file: str, function: str) -> None:
    """Runs a block that is interrupted where a function of Insitu's is called."""
    came = False

    def trace(frame: Any, event: str, _: object) -> None:
        nonlocal came
        code = frame.f_code
        if not came and code.co_name == function and code.co_filename.endswith(file):
            came = True
            raise KeyboardInterrupt

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        block()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    assert came


def in_a_thread(block: Callable[[], object]) -> bool:
    thread = threading.Thread(target=block, daemon=True)
    thread.start()
    thread.join(10)
    return not thread.is_alive()


@pytest.mark.parametrize("function", ["__enter__", "__exit__"])
def test_a_run_that_is_interrupted_where_it_takes_or_gives_back_the_model_holds_nothing(
    function: str,
) -> None:
    model = small()
    run(model)
    interrupted(lambda: run(model), "engine/exclusive.py", function)
    assert in_a_thread(lambda: run(model)), "another thread waits for ever"
    interrupted(lambda: run(model), "engine/exclusive.py", function)
    assert torch.equal(run(model), ONES * 2)


def test_a_block_inside_of_a_run_of_the_same_model_is_refused_and_the_run_goes_on() -> None:
    model, said = small(), list[str]()

    def inner(value: torch.Tensor) -> torch.Tensor:
        try:
            run(model)
        except BlockError as error:
            said.append(str(error))
        return value

    with model.trace(ONES):
        value = apply(inner, model[1].output).save()
    assert torch.equal(value.value, ONES)
    assert len(said) == 1 and "running already" in said[0]


def test_threads_take_turns() -> None:
    use, inside, most, count = Exclusive(), 0, 0, 0

    def work() -> None:
        nonlocal inside, most, count
        for _ in range(50):
            with use:
                inside += 1
                most = max(most, inside)
                time.sleep(0.0001)
                count += 1
                inside -= 1

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (most, count) == (1, 200)


def test_a_thread_that_ended_without_giving_the_model_back_is_waited_for_no_longer() -> None:
    use = Exclusive()

    def broken_off() -> None:
        use.__enter__()

    assert in_a_thread(broken_off)

    def work() -> None:
        with use:
            pass

    assert in_a_thread(work)


def forked(block: Callable[[], object]) -> int:
    """Runs a block in a forked process and returns how that ended."""
    child = os.fork()
    if not child:
        signal.alarm(20)
        try:
            block()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_process_that_is_forked_while_another_thread_runs_does_not_wait_for_it() -> None:
    model, inside, go = small(), threading.Event(), threading.Event()
    run(model)

    def hold() -> None:
        with model.trace(ONES):
            apply(lambda value: (inside.set(), go.wait(30), value)[2], model[0].output).save()
            model[2].output.save()

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert inside.wait(10)

    def in_child() -> None:
        assert torch.equal(run(model), ONES * 2)
        assert in_a_thread(lambda: run(model))
        for part in model.module.modules():
            assert "_compiled_call_impl" not in vars(part) and not part._forward_hooks

    status = forked(in_child)
    go.set()
    thread.join(10)
    assert status == 0
    assert torch.equal(run(model), ONES * 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_inside_of_a_run_goes_on_with_the_run_in_both_processes() -> None:
    model, child = small(), list[int]()

    def fork(value: torch.Tensor) -> torch.Tensor:
        child.append(os.fork())
        return value + (0 if child[-1] else 1)

    try:
        with model.trace(ONES):
            value = apply(fork, model[0].output).save()
            end = model[2].output.save()
        right = torch.equal(end.value, ONES) and torch.equal(
            value.value, ONES + (0 if child[0] else 1)
        )
        right = right and torch.equal(run(model), ONES * 2)
    finally:
        if child and not child[0]:
            os._exit(0 if right else 1)
    assert right and os.waitpid(child[0], 0)[1] == 0
