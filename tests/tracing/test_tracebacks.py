"""Tracebacks of errors: they begin at the user's line and show next to nothing of libraries."""

import asyncio
import gc
import os
import subprocess
import sys
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from insitu import InsituError, LanguageModel, Model, ShapeError, apply

MODEL = Model(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).eval())
X = torch.ones(1, 3)


def wrong_write() -> None:
    with MODEL.trace(X):
        MODEL[0].output = torch.zeros(4)


def wrong_operation() -> None:
    with MODEL.trace(X):
        (MODEL[0].output @ torch.zeros(4)).save()


def wrong_backward() -> None:
    with MODEL.trace(X):
        MODEL[0].output.grad.save()
        MODEL.output.backward()


def wrong_shape_in_the_block() -> None:
    with MODEL.trace(X):
        print((MODEL[0].output @ torch.zeros(4)).shape)


def wrong_path_in_the_block() -> None:
    with MODEL.trace(X):
        MODEL[0].weights.output.save()


def wrong_prompt() -> None:
    with LanguageModel("insitu/eiffel").trace(3.5):
        pass


def wrong_prompt_of_an_invocation() -> None:
    with LanguageModel("insitu/eiffel").trace() as tracer, tracer.invoke({"a": 1}):
        pass


def wrong_session() -> None:
    with MODEL.session(), MODEL.trace(X):
        MODEL[0].output = torch.zeros(4)


def wrong_edit() -> None:
    with MODEL.edit():
        MODEL[0].output.save()


def wrong_name() -> None:
    LanguageModel("./there is no such folder")


def wrong_name_of_a_cache() -> None:
    LanguageModel("insitu/eiffel").run_with_cache("The", "residual_outt")


def wrong_method() -> None:
    from insitu.methods import logit_lens

    logit_lens(LanguageModel("insitu/eiffel"), "The Louvre", top=-3)


async def coroutine() -> None:
    async with MODEL.trace(X):
        MODEL[0].output = torch.zeros(4)


def wrong_write_in_a_task() -> None:
    asyncio.run(coroutine())


WRONG = [
    *(wrong_write, wrong_operation, wrong_backward, wrong_shape_in_the_block),
    *(wrong_path_in_the_block, wrong_prompt, wrong_prompt_of_an_invocation, wrong_session),
    *(wrong_edit, wrong_name, wrong_name_of_a_cache, wrong_method, wrong_write_in_a_task),
]


def failure(function: Callable[[], None]) -> InsituError:
    """The error that a function raises."""
    with pytest.raises(InsituError) as caught:
        function()
    return caught.value


@pytest.mark.no_wire
@pytest.mark.parametrize("wrong", WRONG)
def test_at_most_two_frames_after_the_users_are_not_the_users(
    wrong: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("INSITU_TRACEBACK", raising=False)
    error = failure(wrong)
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    mine = max(at for at, file in enumerate(files) if file == __file__)
    assert len(files) - 1 - mine <= 2
    shown = "".join(traceback.format_exception(error))
    assert shown.count("torch/") == 0
    assert shown.count("transformers/") == 0
    monkeypatch.setenv("INSITU_TRACEBACK", "full")
    assert len("".join(traceback.format_exception(failure(wrong)))) >= len(shown)


@pytest.mark.no_wire
def test_the_cause_is_there_with_the_users_own_frames() -> None:
    def mine(value: torch.Tensor) -> torch.Tensor:
        return value @ torch.zeros(4)  # a line of mine

    with pytest.raises(InsituError) as caught, MODEL.trace(X):
        apply(mine, MODEL[0].output).save()
    cause = caught.value.__cause__
    assert isinstance(cause, RuntimeError)
    frames = traceback.extract_tb(cause.__traceback__)
    assert [frame.line for frame in frames] == ["return value @ torch.zeros(4)  # a line of mine"]


def test_what_the_users_own_code_was_handling_is_left_alone() -> None:
    def compiled() -> None:
        nn.Linear(2, 2)(torch.zeros(3))

    try:
        compiled()
    except RuntimeError as error:
        before = traceback.extract_tb(error.__traceback__)
        with pytest.raises(ShapeError) as caught:
            wrong_write()
        inner = caught.value
        while inner.__context__ is not None and inner.__context__ is not error:
            inner = inner.__context__
        assert inner.__context__ is error
        assert len(traceback.extract_tb(error.__traceback__)) == len(before) > 3


def test_errors_of_others_keep_every_frame() -> None:
    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("mine")

    model = Model(Failing())
    with pytest.raises(KeyError) as caught, model.trace(X):
        model.output.save()
    assert any(
        "torch/" in frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)
    )


@pytest.mark.no_wire
def test_no_frame_is_kept_alive_by_an_error() -> None:
    class Large:
        pass

    def run() -> tuple[InsituError, weakref.ref[Large]]:
        large = Large()
        try:
            wrong_write()
        except InsituError as error:
            kept = error.with_traceback(None)
        return kept, weakref.ref(large)

    gc.collect()
    gc.disable()
    try:
        _, reference = run()
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_a_program_shows_its_own_line_first(tmp_path: Path, full: bool) -> None:
    program = tmp_path / "mine.py"
    program.write_text(
        "import torch\nfrom insitu import Model\nmodel = Model(torch.nn.Linear(3, 5))\n"
        "with model.trace(torch.ones(1, 3)):\n    model.output = torch.zeros(4)  # wrong\n"
    )
    env = {**os.environ, "INSITU_TRACEBACK": "full" if full else ""}
    run = subprocess.run([sys.executable, program], capture_output=True, text=True, env=env)
    frames = [line for line in run.stderr.splitlines() if line.startswith('  File "')]
    assert run.returncode == 1
    assert "# wrong" in run.stderr
    if full:
        assert len(frames) > 5
    else:
        assert "mine.py" in frames[0]
        assert sum("mine.py" not in frame for frame in frames) <= 2
