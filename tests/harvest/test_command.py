"""`insitu harvest`, and a harvest of a model that a server runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from insitu import LanguageModel, serve
from insitu.cli import app
from insitu.command_harvest import count_in
from insitu.harvest import harvest
from tests.harvest.folders import digests, manifest, whole

pytestmark = pytest.mark.no_wire

TEXTS = [f"The Louvre number {number} is in the city of Paris" for number in range(40)]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(TEXTS))
    return path


def run(*args: object) -> Any:
    return CliRunner().invoke(app, ["harvest", "insitu/eiffel", *map(str, args)])


def test_it_writes_what_the_function_writes(prompts: Path, tmp_path: Path) -> None:
    sites = "residual_out:2-3,mlp.post:1,z:0"
    given = ("--sites", sites, "--dtype", "bfloat16", "--context", 8, "--tokens", "0.2K")
    done = run(prompts, *given, "--to", tmp_path / "a", "--pack", "--json", "--quiet")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert (found["tokens"], found["skipped"], found["ran_out"]) == (200, [], False)
    harvest(
        LanguageModel("insitu/eiffel"), prompts, sites.split(","), to=tmp_path / "b",
        dtype="bfloat16", context=8, tokens=200, pack=True,
    )  # fmt: skip
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    again = run(prompts, *given, "--to", tmp_path / "a", "--pack")
    assert again.exit_code == 0 and "200 tokens" in " ".join(again.stdout.split())


@pytest.mark.thorough
def test_what_is_kept_and_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"words": "Paris is"}\n{"words": ""}\n{"words": 5}\n{"words": "Moscow is"}\n')
    given = (path, "--sites", "residual_out:1", "--to", tmp_path / "a", "--column", "words")
    refused = run(*given, "--reduce", "last")
    assert refused.exit_code == 2 and "cannot be used" in refused.stderr
    done = run(*given, "--reduce", "last", "--max-skipped", "0.5")
    assert done.exit_code == 0
    assert "skipped row 1: it is empty" in done.stdout
    assert whole(tmp_path / "a")["document"].tolist() == [0, 3]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--sites", "residual_out:1"), "--to FOLDER"),
        (("--sites", "residual_out:99", "--to", "x"), "99"),
        (("--sites", "residual_out:1", "--to", "x", "--tokens", "many"), "no number of tokens"),
        (("--sites", "residual_out:1", "--to", "x", "--reduce", "first"), "not `last`"),
        (("--to", "x"), "--sites"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(prompts: Path, args: tuple[str, ...], said: str) -> None:
    done = run(prompts, *args)
    assert done.exit_code == 2 and said in done.stderr
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("text", "number"), [("4096", 4096), ("10M", 10**7), ("1.5k", 1500), ("2B", 2 * 10**9)]
)
def test_numbers_of_tokens(text: str, number: int) -> None:
    assert count_in(text) == number


@pytest.mark.thorough
def test_an_interrupt_says_how_to_go_on(prompts: Path, tmp_path: Path) -> None:
    prompts.write_text("\n".join(TEXTS * 20_000))
    folder = tmp_path / "a"
    args = ["harvest", "insitu/eiffel", str(prompts), "--sites", "residual_out:3"]
    args += ["--to", str(folder), "--shard-tokens", "500", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # Tests that a shell has put into the background ignore interrupts, and so do their children.
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    child = subprocess.Popen(
        [sys.executable, "-c", f"{listening}; from insitu.cli import app; app()", *args],
        env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    path = folder / "manifest.jsonl"
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    try:
        _, said = child.communicate(timeout=120)
    finally:
        child.kill()
    assert "the same command goes on behind it" in said and child.returncode == 130
    lines = manifest(folder)
    assert lines and not lines[-1]["last"]


@pytest.mark.thorough
def test_a_model_on_a_server(prompts: Path, tmp_path: Path) -> None:
    options = {"context": 8, "batch_tokens": 64}
    sites = ["residual_out:2", "z:1", "grad.residual_out:2"]
    with serve("insitu/eiffel") as server:
        there = LanguageModel("insitu/eiffel", remote=server.url)
        found = harvest(there, TEXTS[:6], sites, to=tmp_path / "there", metric="loss", **options)
    assert found.specification.device == "remote"
    here = LanguageModel("insitu/eiffel")
    harvest(here, TEXTS[:6], sites, to=tmp_path / "here", metric="loss", **options)
    one, other = (whole(tmp_path / name, *sites) for name in ("there", "here"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-5)
