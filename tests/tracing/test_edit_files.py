"""Files of edits: what `save_edits` writes, and what `load_edits` refuses."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from insitu import InsituError, LoadError, Model, OperationError, SaveError, WireError
from insitu.tracing.edit_files import edits_to_bytes
from tests.methods.test_broken_files import mutations

pytestmark = pytest.mark.no_wire

X = torch.arange(12.0).reshape(3, 4)
HEADER = struct.calcsize("<12sI")


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model(nn.Sequential(nn.Identity(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))


def edited_twice(model: Model) -> Model:
    with model.edit() as once:
        once[1].output[:, 0] = 0
    with once.edit() as twice:
        twice[2].output = torch.relu(model[3](twice[2].output))
    return twice


def traced(model: Model, lines: Callable[[Model], object]) -> bytes:
    with model.trace(X) as tracer:
        lines(model)
    return edits_to_bytes([tracer.graph])


def test_several_edits_come_back_in_their_order(model: Model, tmp_path: Path) -> None:
    edited = edited_twice(model)
    edited.save_edits(tmp_path / "edits")
    loaded = model.load_edits(tmp_path / "edits")
    with edited.trace(X):
        expected = edited.output.save()
    with loaded.trace(X):
        found = loaded.output.save()
    assert torch.equal(found.value, expected.value) and len(loaded.edits) == 2
    model.save_edits(tmp_path / "none")
    assert len(model.load_edits(tmp_path / "none").edits) == 0


def test_a_file_without_a_header_is_read(model: Model, tmp_path: Path) -> None:
    edited_twice(model).save_edits(tmp_path / "edits")
    (tmp_path / "older").write_bytes((tmp_path / "edits").read_bytes()[HEADER:])
    assert len(model.load_edits(tmp_path / "older").edits) == 2


def test_a_file_that_lacks_an_edit_is_refused(model: Model, tmp_path: Path) -> None:
    edited_twice(model).save_edits(tmp_path / "edits")
    data = (tmp_path / "edits").read_bytes()
    first = struct.unpack_from("<Q", data, HEADER)[0]
    (tmp_path / "cut").write_bytes(data[: HEADER + 8 + first])
    with pytest.raises(WireError, match="cut' holds 1 of its 2 edits"):
        model.load_edits(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(b"")
    with pytest.raises(WireError, match="is empty"):
        model.load_edits(tmp_path / "cut")


def test_broken_files_are_refused_by_name(model: Model, tmp_path: Path) -> None:
    edited_twice(model).save_edits(tmp_path / "edits")
    taken = 0
    for mutated in mutations((tmp_path / "edits").read_bytes(), 300, seed=0):
        (tmp_path / "f").write_bytes(mutated)
        try:
            model.load_edits(tmp_path / "f")
            taken += 1
        except WireError as error:
            assert str(tmp_path / "f") in str(error)
    assert taken < 10  # the checksum finds all but changes that change nothing


def test_files_that_cannot_be_read_are_refused(model: Model, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("pipe", "a pipe"), ("none", "No such file"), ("", "a folder")):
        with pytest.raises(LoadError, match=said):
            model.load_edits(tmp_path / name)


def test_a_full_disk_leaves_the_old_file(model: Model, tmp_path: Path, monkeypatch) -> None:
    edited_twice(model).save_edits(tmp_path / "edits")
    before = (tmp_path / "edits").read_bytes()

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match="No space left"):
        model.save_edits(tmp_path / "edits")
    assert (tmp_path / "edits").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["edits"]


def of_second_prompt(model: Model) -> bytes:
    with model.trace() as tracer:
        with tracer.invoke(X):
            pass
        with tracer.invoke(X):
            model[1].output[:] = 0
    return edits_to_bytes([tracer.graph])


REFUSED: dict[str, tuple[Callable[[Model], bytes], str]] = {
    "a save": (lambda m: traced(m, lambda m: m[1].output.save()), "has no place in an edit"),
    "a backward pass": (lambda m: traced(m, lambda m: differentiated(m)), "no place"),
    "a gradient": (lambda m: traced(m, lambda m: grad_written(m)), "no place"),
    "another prompt": (of_second_prompt, "no place"),
}


def differentiated(model: Model) -> None:
    model[1].output.grad.sum()
    model[3].output.sum().backward()


def grad_written(model: Model) -> None:
    model[1].output.grad = model[1].output.grad * 2
    model[3].output.sum().backward()


@pytest.mark.parametrize("name", REFUSED)
def test_what_edit_refuses_is_not_loaded(name: str, model: Model, tmp_path: Path) -> None:
    make, said = REFUSED[name]
    (tmp_path / "edits").write_bytes(make(model))
    with pytest.raises(WireError, match=f"edits' holds no edits of this model: .*{said}"):
        model.load_edits(tmp_path / "edits")


def test_gradients_have_no_place_in_an_edit(model: Model) -> None:
    with pytest.raises(OperationError, match="has no place in an edit"):
        with model.edit() as edited:
            edited[1].output[:] = edited[1].output.grad


@pytest.mark.parametrize(
    "lines",
    [
        lambda m: m[1].output.__setitem__(slice(None), 0),
        lambda m: setattr(m[0], "output", m[1](m[0].output)),
    ],
)
def test_modules_that_are_not_there_are_named(
    lines: Callable[[Model], object], model: Model, tmp_path: Path
) -> None:
    with model.edit() as edited:
        lines(edited)
    edited.save_edits(tmp_path / "edits")
    other = Model(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(WireError, match=r"edits' holds no edits of this model: .*no module .*1"):
        other.load_edits(tmp_path / "edits")
    assert len(model.load_edits(tmp_path / "edits").edits) == 1


def test_errors_are_of_the_line_that_loads(model: Model, tmp_path: Path) -> None:
    (tmp_path / "edits").write_bytes(b"something else")
    with pytest.raises(InsituError) as caught:
        model.load_edits(tmp_path / "edits")
    assert caught.value.location is not None and caught.value.location.file == __file__
