"""`insitu serve` and `insitu keys`, run as a user runs them."""

from __future__ import annotations

import importlib.util
import json
import logging
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from insitu.cli import app
from insitu.command_server import default_data_folder
from insitu.server.settings import ServedModel, Settings
from insitu.server.storage.keys import authenticate
from insitu.server.storage.keys_file import load_keys
from insitu.server.storage.sqlite_store import SqliteStore

pytestmark = pytest.mark.no_wire


def run(*args: str, **environment: str) -> Any:
    return CliRunner().invoke(app, list(args), env={"COLUMNS": "120", **environment})


def said(result: Any) -> str:
    assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.stderr
    (line,) = result.stderr.strip().splitlines()
    return line


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Settings]]:
    """What servers were started with, which did not start."""
    found: list[Settings] = []

    def run(settings: Settings, ready: Any) -> None:
        found.append(settings)
        ready("http://127.0.0.1:1")

    monkeypatch.setattr("insitu.server.running.run", run)
    kept = {name: logging.getLogger(name) for name in ("insitu", "uvicorn")}
    levels = {name: (logger.level, [*logger.handlers]) for name, logger in kept.items()}
    yield found
    for name, logger in kept.items():
        logger.setLevel(levels[name][0])
        logger.handlers[:] = levels[name][1]


# `insitu serve`.


def test_a_model_is_served(started: list[Settings]) -> None:
    result = run("serve", "insitu/eiffel")
    assert result.exit_code == 0, result.output
    assert result.stdout == "Insitu serves insitu/eiffel at http://127.0.0.1:1\n"
    (settings,) = started
    assert settings == Settings(
        [ServedModel("insitu/eiffel", "insitu/eiffel", {})], default_data_folder(), port=8765
    )


def test_every_option_arrives(started: list[Settings], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    cert, key, keys = (str(tmp_path / name) for name in ("cert", "key", "keys"))
    options = ["--port", "0", "--host", "0.0.0.0", "--name", "gpu.lab", "--name", "gpu"]
    options += ["--data", str(tmp_path / "data"), "--keys", keys, "--cert", cert, "--tls-key", key]
    options += ["--device", "cuda", "--dtype", "bfloat16", "--behind-proxy", "--durable"]
    result = run("serve", "gpt2", str(folder), *options, "--no-join", "--no-source", "--no-weights")
    assert result.exit_code == 0, result.output
    loading = {"device_map": "cuda", "dtype": "bfloat16"}
    models = [ServedModel("gpt2", "gpt2", loading), ServedModel("model", str(folder), loading)]
    (settings,) = started
    assert settings == Settings(
        models, tmp_path / "data", "0.0.0.0", 0, Path(keys), Path(cert), Path(key), True,
        ("gpu.lab", "gpu"), True, joins=False, keeps_source=False, weights_readable=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--host", "0.0.0.0"], ["--keys", "--cert", "--tls-key", "--behind-proxy"]),
        (["--host", "0.0.0.0", "--keys", "k"], ["--cert", "--tls-key", "--behind-proxy"]),
        (["--host", "192.168.0.1", "--behind-proxy"], ["--keys"]),
        (["--cert", "c"], ["--cert", "--tls-key"]),
    ],
)
def test_what_is_missing_for_others_is_named(
    options: list[str], named: list[str], started: list[Settings]
) -> None:
    line = said(run("serve", "gpt2", *options))
    assert all(one in line for one in named) and started == []


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["gpt2", "--dtype", "float99"], "'float99'"),
        (["gpt2", "gpt2"], "Two models would be called 'gpt2'"),
    ],
)
def test_mistakes_are_said_before_anything_is_loaded(
    args: list[str], text: str, started: list[Settings]
) -> None:
    assert text in said(run("serve", *args)) and started == []


def test_no_model_is_a_mistake(started: list[Settings]) -> None:
    result = run("serve")
    assert result.exit_code == 2 and "MODEL" in result.stderr and started == []


def test_what_fails_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise OSError("The port is taken.\nAnd more.")

    monkeypatch.setattr("insitu.server.running.run", fails)
    monkeypatch.setattr("insitu.command_server._log_to_stderr", lambda: None)
    assert said(run("serve", "gpt2")) == "The port is taken."


def test_a_package_that_is_missing_is_named(
    started: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    for missing in (["uvicorn"], ["starlette", "uvicorn"]):

        def find(name: str, *args: Any, hidden: list[str] = missing) -> Any:
            return None if name in hidden else found(name, *args)

        monkeypatch.setattr("insitu.server.packages.find_spec", find)
        line = said(run("serve", "gpt2"))
        assert "pip install 'insitu[serve]'" in line and " and ".join(missing) in line
    assert started == []


def test_the_data_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_data_folder() == tmp_path / "insitu" / "server"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert default_data_folder() == Path.home() / ".local/share/insitu/server"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "Application Support" in str(default_data_folder())


@pytest.mark.thorough
def test_a_server_is_imported_by_its_commands_alone() -> None:
    code = (
        "import sys, insitu.cli, insitu\n"
        "found = [name for name in sys.modules if name.split('.')[0] in "
        "('starlette', 'uvicorn', 'httpx') or name.startswith('insitu.server')]\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("args", [["serve"], ["keys", "add"], ["keys", "list"], ["keys", "revoke"]])
def test_help_has_an_example(args: list[str]) -> None:
    text = " ".join(run(*args, "--help").stdout.split())
    assert f"Example: insitu {' '.join(args)}" in text
    assert "serve" in run("--help").stdout and "keys" in run("--help").stdout


# `insitu keys`.


def test_a_key_is_made_used_listed_and_revoked(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    result = run("keys", "add", "ada", "--keys", str(path))
    assert result.exit_code == 0, result.output
    (secret,) = result.stdout.splitlines()
    assert secret.startswith("insitu_") and secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    more = ["--scope", "jobs", "--scope", "admin", "--days", "30"]
    admin = run("keys", "add", "ada", "--keys", str(path), *more).stdout.strip()
    other = run("keys", "add", "bob", "--keys", str(path)).stdout.strip()

    store = SqliteStore(tmp_path / "store.db")
    try:
        load_keys(store, path)
        assert authenticate(store, secret).name == "ada"
        assert authenticate(store, admin, "admin") == authenticate(store, secret)
        assert authenticate(store, other).name == "bob"

        rows = json.loads(run("keys", "list", "--keys", str(path), "--json").stdout)
        assert [row["tenant"] for row in rows] == ["ada", "ada", "bob"]
        assert [row["state"] for row in rows] == ["good"] * 3
        assert rows[1]["scopes"] == ["admin", "jobs"] and rows[1]["expires"] is not None
        assert secret.startswith(rows[0]["key"]) and rows[0]["expires"] is None
        table = run("keys", "list", "--keys", str(path)).stdout
        assert rows[0]["key"] in table and "never" in table and secret not in table

        for given in (rows[0]["key"], other):  # by its beginning, and as a whole
            result = run("keys", "revoke", given, "--keys", str(path))
            assert result.exit_code == 0 and other not in result.output
        load_keys(store, path)
        for revoked in (secret, other):
            with pytest.raises(Exception, match="revoked"):
                authenticate(store, revoked)
        assert authenticate(store, admin).name == "ada"
        rows = json.loads(run("keys", "list", "--keys", str(path), "--json").stdout)
        assert [row["state"] for row in rows] == ["revoked", "good", "revoked"]
    finally:
        store.close()


def test_a_key_that_has_ended_is_listed_as_such(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    run("keys", "add", "ada", "--keys", str(path), "--days", "1")
    data = msgspec.json.decode(path.read_bytes())
    data["tenants"][0]["keys"][0]["expires"] = "2020-01-31T00:00:00Z"
    path.write_bytes(msgspec.json.encode(data))
    (row,) = json.loads(run("keys", "list", "--keys", str(path), "--json").stdout)
    assert row["state"] == "ended" and row["expires"] == "2020-01-31"


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["list"], "keys.json"),
        (["revoke", "insitu_abcdefgh"], "keys.json"),
        (["add", "ada", "--scope", "job"], "nearest: 'jobs'"),
        (["add", "ada", "--days", "0"], "--days"),
        (["add", "ada", "--days", "nan"], "--days"),
        (["add", "ada", "--days", "1e9"], "--days"),
        (["add", ""], "name"),
    ],
)
def test_mistakes_with_keys_are_said_in_a_line(args: list[str], text: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    assert text in said(run("keys", *args, "--keys", str(path)))
    assert not path.exists()


def test_a_key_that_is_none_names_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret = run("keys", "add", "ada", "--keys", str(path)).stdout
    prefix = secret[:15]
    other = "y" if prefix[-1] == "x" else "x"
    line = said(run("keys", "revoke", prefix[:-1] + other, "--keys", str(path)))
    assert prefix in line


@pytest.mark.parametrize("content", ["", "{}x", '{"tenants": 3}'])
def test_a_file_that_is_none_of_keys_is_left_alone(content: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)
    assert "keys.json" in said(run("keys", "add", "ada", "--keys", str(path)))
    assert path.read_text() == content
