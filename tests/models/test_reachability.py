"""A server that does not answer is asked once; one that answers is asked as ever."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from os import environ
from pathlib import Path

import pytest

from tests.conftest import tiny_gpt2
from tests.thinning import sampled

PROGRAM = """
import time
from insitu import InsituError, LanguageModel, Model, VisionLanguageModel
start = time.monotonic()
try:
    {line}
    print("opened")
except InsituError as error:
    print("refused", time.monotonic() - start, str(error).replace(chr(10), " "))
"""


def run(line: str, endpoint: str, **more: str) -> str:
    """Runs a line in a process of its own that looks for models at an endpoint."""
    own = {
        name: value
        for name, value in environ.items()
        if not name.lower().endswith(("_offline", "_proxy"))
    }
    own |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", **more}
    command = [sys.executable, "-c", PROGRAM.format(line=line)]
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=120)
    assert "Retrying" not in done.stderr
    return done.stdout.strip() or done.stderr


@pytest.mark.parametrize(
    "line",
    sampled(
        [
            "LanguageModel('nobody/no-such-model')",
            "Model.from_pretrained('nobody/no-such-model')",
            "VisionLanguageModel('nobody/no-such-model')",
            "LanguageModel('no-such-model-without-an-owner')",
        ],
        ["LanguageModel('nobody/no-such-model')"],
    ),
)
def test_a_wrong_id_without_a_network_is_refused_at_once(line: str, tmp_path: Path) -> None:
    said = run(line, "http://127.0.0.1:1", HF_HOME=str(tmp_path))
    assert said.startswith("refused") and float(said.split()[1]) < 10
    assert "http://127.0.0.1:1 does not answer" in said


@pytest.mark.thorough
def test_an_adapter_of_a_model_elsewhere_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "nobody/no-such-model", "peft_type": "LORA"}'
    )
    line = f"LanguageModel({str(tmp_path)!r})"
    said = run(line, "http://127.0.0.1:1", HF_HOME=str(tmp_path / "home"))
    assert said.startswith("refused") and float(said.split()[1]) < 10, said


class _Answering(BaseHTTPRequestHandler):
    asked: list[str]

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_GET = do_HEAD  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A server that answers, but has no models, and what it is asked for."""
    _Answering.asked = []
    answering = HTTPServer(("127.0.0.1", 0), _Answering)
    thread = threading.Thread(target=answering.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{answering.server_port}", _Answering.asked
    answering.shutdown()
    thread.join()
    answering.server_close()


@pytest.mark.thorough
def test_a_server_that_answers_is_asked_for_the_files(
    server: tuple[str, list[str]], tmp_path: Path
) -> None:
    endpoint, asked = server
    said = run("LanguageModel('nobody/no-such-model')", endpoint, HF_HOME=str(tmp_path))
    assert said.startswith("refused") and "does not answer" not in said
    assert any(path.endswith("/config.json") for path in asked)
    assert asked.count("/") == 1  # whether it answers


@pytest.mark.thorough
def test_a_folder_needs_no_server(server: tuple[str, list[str]], tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "model")
    endpoint, asked = server
    start = time.monotonic()
    said = run(f"LanguageModel({str(tmp_path / 'model')!r}).load()", endpoint)
    assert said == "opened" and time.monotonic() - start < 60
    assert "/" not in asked
