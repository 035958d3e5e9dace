"""The command line, run as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from typer.testing import CliRunner

from insitu.cli import app
from tests.conftest import tiny_gpt2, tiny_llama

pytestmark = pytest.mark.no_wire


def run(*args: str) -> Any:
    return CliRunner().invoke(app, list(args), env={"COLUMNS": "120"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path)
    return tmp_path


def test_the_bundled_model_is_checked() -> None:
    result = run("check", "insitu/eiffel")
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == "insitu/eiffel: GPT2LMHeadModel"
    assert "transformer.h[0-5]" in lines
    assert (
        "attention.pattern (2, 8, 7, 7) attn.ops.softmax[0].output, with eager attention" in lines
    )
    assert "final_norm transformer.ln_f: LayerNorm" in lines
    holds = lines[lines.index("In a run of the model") + 1 :]
    assert len(holds) == 7 and all(" OK " in line for line in holds)


def test_a_folder_is_checked_and_written_as_json(folder: Path) -> None:
    result = run("check", str(folder), "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["ok"] is True
    assert report["architecture"] == "LlamaForCausalLM"
    assert report["sizes"]["n_layers"] == 3
    names = {one["name"]: one for one in report["parts"][1]["names"]}
    assert names["attention.k"]["shape"] == [2, 2, 7, 4]
    assert names["attention.k"]["stands_for"].startswith("model.layers[0].self_attn")
    assert {one["outcome"] for one in report["checks"]} == {"ok"}


def test_other_dtypes_are_loaded(folder: Path) -> None:
    result = run("check", str(folder), "--dtype", "bfloat16", "--json")
    assert result.exit_code == 0
    allowed = {one["allowed"] for one in json.loads(result.stdout)["checks"] if one["allowed"]}
    assert max(allowed) > torch.finfo(torch.bfloat16).eps


def test_a_block_that_is_not_the_sum_of_its_parts_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    forward = GPT2Block.forward

    def lying(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if not isinstance(hidden, FakeTensor):
            with torch.no_grad():
                hidden.mul_(1.01)
        return output

    monkeypatch.setattr(GPT2Block, "forward", lying)
    result = run("check", str(tmp_path))
    assert result.exit_code == 1
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    differing = [line for line in lines if "DIFFERS" in line]
    assert differing[0].startswith("residuals add up DIFFERS transformer.h[0]: largest difference")
    assert run("check", str(tmp_path), "--json").exit_code == 1


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "it is no folder with a model"),
        ({"config.json": "{"}, "it is no folder with a model"),
        ({"config.json": '{"model_type": "no-such-model"}'}, "it is no folder with a model"),
        ({"config.json": '{"model_type": "gpt2", "n_layer": 1}'}, "The weights of"),
    ],
)
def test_a_folder_without_a_model_is_said_in_a_line(
    tmp_path: Path, files: dict[str, str], said: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    result = run("check", str(tmp_path))
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = [
        line for line in result.stderr.splitlines() if str(tmp_path) in line and said in line
    ]
    assert "Traceback" not in result.stderr


def test_a_repository_that_cannot_be_reached_is_said_in_a_line() -> None:
    result = run("check", "nobody/no-such-model")
    assert result.exit_code == 2
    assert "'nobody/no-such-model' cannot be loaded" in result.stderr


def test_models_of_all_kinds_are_opened(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        image_size=8, patch_size=4,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path)
    result = run("check", str(tmp_path))
    assert result.exit_code == 0
    assert "residual_mid" in result.stdout


def test_a_model_that_cannot_be_opened_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": "many"}')
    result = run("check", str(tmp_path))
    assert result.exit_code == 2
    assert "cannot be loaded" in result.stderr and "Traceback" not in result.stderr


def test_help_has_an_example() -> None:
    result = run("check", "--help")
    assert result.exit_code == 0
    assert "insitu check insitu/eiffel" in result.stdout
    assert "--json" in result.stdout
    assert "check" in run("--help").stdout
