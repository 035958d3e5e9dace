"""Warnings name the line of the user's that has led to them."""

from __future__ import annotations

import ast
import inspect
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import insitu
from insitu import LanguageModel, Model
from insitu.graph.location import here
from insitu.graph.user_warnings import warn_user

ROOT = Path(insitu.__file__).parent


def lines_of(caught: list[warnings.WarningMessage]) -> list[tuple[str, str]]:
    """The file and the text of the line of each."""
    texts = Path(__file__).read_text().splitlines()
    return [(one.filename, texts[one.lineno - 1].strip()) for one in caught]


@pytest.mark.thorough
def test_no_warning_counts_frames() -> None:
    counting = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "warn")
    ]
    assert counting == []


def test_a_line_behind_calls_of_torch_is_named() -> None:
    module = nn.Identity()
    module.register_forward_hook(lambda *_: warn_user("seen"))
    with pytest.warns(UserWarning, match="seen") as caught:
        module(torch.ones(1))
    # The hook is the innermost line of this file.
    assert lines_of(caught.list) == [
        (__file__, 'module.register_forward_hook(lambda *_: warn_user("seen"))')
    ]


def test_eager_attention_is_told_of_at_the_line_that_reads_a_pattern(
    eiffel: LanguageModel,
) -> None:
    with pytest.warns(UserWarning, match="eager attention only") as caught:
        with eiffel.trace("The Louvre"):
            eiffel.blocks[1].attention.pattern.save()
    assert lines_of(caught.list) == [(__file__, "eiffel.blocks[1].attention.pattern.save()")]


def test_training_mode_is_told_of_at_the_block() -> None:
    model = Model(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train())
    with pytest.warns(UserWarning, match="training mode") as caught:
        with model.trace(torch.ones(1, 3)):
            first = here(1).line
            model.output.save()
    ((file, _),) = lines_of(caught.list)
    assert file == __file__ and first - 1 <= caught.list[0].lineno <= first + 1


def test_it_is_shown_once_for_each_line() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            warn_user("one")
        warn_user("one")
    assert len(caught) == 2 and {one.filename for one in caught} == {inspect.getfile(lines_of)}
