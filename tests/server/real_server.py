"""A server as it is run, in a process of its own, with a small model and tenants with keys."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from insitu import Job, LanguageModel, Results
from insitu.remote.connection import Connection
from insitu.remote.problems import Problem
from insitu.remote.protocol import JOB_TYPE, RESULTS_TYPE, JobStatus
from insitu.server.records import Key, Tenant
from insitu.server.running import run, served_model
from insitu.server.settings import Settings
from insitu.server.storage.keys import make_key
from insitu.server.storage.keys_file import write_keys

ROOT = Path(__file__).parents[2]
NAME = "small"
_SECONDS_TO_START = 180.0


def write_model(folder: Path, **config: Any) -> Path:
    """Writes the files of a small model with random weights, and returns their folder."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 4, "n_head": 4, "vocab_size": 100, "n_positions": 64}
    given = GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **config})
    GPT2LMHeadModel(given).eval().save_pretrained(folder / NAME)
    return folder / NAME


@dataclass
class Answer:
    """What a server answers to a job.

    Attributes:
        status: of HTTP.
        results: the bytes of results, if it is done.
        job: what is said of the job otherwise.
        problem: why it was refused, or has failed.
        retry_after: the header, 0 if there is none.
        seconds: how long it took.
    """

    status: int
    results: bytes | None = None
    job: JobStatus | None = None
    problem: Problem | None = None
    retry_after: float = 0.0
    seconds: float = 0.0
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return self.results is not None

    def read(self) -> Results:
        assert self.results is not None, (self.status, self.problem, self.job)
        return Results.from_bytes(self.results)


class Client:
    """Sends bytes, whatever they are, as a tenant.

    Args:
        url: the server.
        key: of the tenant.
    """

    def __init__(self, url: str, key: str) -> None:
        headers = {"Authorization": f"Bearer {key}", "Insitu-Protocol": "1"}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=300)

    def send(self, body: bytes, wait: float = 60, path: str = "/v1/jobs", **headers: str) -> Answer:
        """Sends a job, and waits for its results."""
        begun = time.monotonic()
        given = {"Content-Type": JOB_TYPE, **headers}
        if wait:
            given["Prefer"] = f"wait={wait:g}"
        answer = self.http.post(path, content=body, headers=given)
        return _answer(answer, time.monotonic() - begun)

    def job(self, id: str) -> JobStatus:
        return msgspec.json.decode(self.http.get(f"/v1/jobs/{id}").content, type=JobStatus)

    def ended(self, id: str, seconds: float = 120) -> JobStatus:
        """Waits for the end of a job."""
        until = time.monotonic() + seconds
        while (job := self.job(id)).ended is None:
            assert time.monotonic() < until, job
            time.sleep(0.02)
        return job

    def events(self, id: str) -> list[dict[str, Any]]:
        """All events of a job, until its end."""
        text = self.http.get(f"/v1/jobs/{id}/events").text
        found: list[dict[str, Any]] = []
        for part in text.split("\n\n"):
            fields = dict(line.split(": ", 1) for line in part.splitlines() if ": " in line)
            if "event" in fields:
                found.append({"kind": fields["event"], **json.loads(fields["data"])})
        return found

    def close(self) -> None:
        self.http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _answer(answer: httpx.Response, seconds: float) -> Answer:
    kind, headers = answer.headers.get("content-type", ""), dict(answer.headers)
    found = Answer(answer.status_code, seconds=seconds, headers=headers)
    found.retry_after = float(headers.get("retry-after", 0))
    if kind == RESULTS_TYPE:
        found.results = answer.content
    elif answer.status_code >= 400:
        found.problem = msgspec.json.decode(answer.content, type=Problem)
    else:
        found.job = msgspec.json.decode(answer.content, type=JobStatus)
        found.problem = found.job.problem
    return found


@dataclass
class RealServer:
    """A server that runs.

    Attributes:
        url: where it is.
        process: its front.
        data: its folder.
        keys: the key of each tenant.
        log: the file with what its processes say.
    """

    url: str
    process: subprocess.Popen[bytes]
    data: Path
    keys: Mapping[str, str]
    log: Path

    def client(self, tenant: str = "ada") -> Client:
        return Client(self.url, self.keys[tenant])

    def connection(self, tenant: str = "ada") -> Connection:
        return Connection(self.url, self.keys[tenant])

    def model(self, tenant: str = "ada") -> LanguageModel:
        """The model, whose blocks this server runs."""
        return LanguageModel(NAME, remote=self.connection(tenant))

    def pids(self, module: str) -> list[int]:
        """The processes of a kind: "engine" or "admission"."""
        found: list[int] = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (path / "cmdline").read_bytes().split(b"\0")
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if (
                    f"insitu.server.engines.{module}".encode() in words
                    and parent == self.process.pid
                ):
                    found.append(int(path.name))
        return found

    def metric(self, name: str) -> float:
        """The sum of a number in `/metrics` over its labels."""
        client = self.client("admin")
        text = client.http.get("/metrics").text
        client.close()
        lines = [line for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def await_ready(self, seconds: float = _SECONDS_TO_START) -> None:
        """Waits until its engine takes jobs."""
        until = time.monotonic() + seconds
        while httpx.get(f"{self.url}/readyz").status_code != 200:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < until, self.log.read_text()[-4000:]
            time.sleep(0.05)


def tenants_of(folder: Path, given: Mapping[str, Mapping[str, Any]]) -> tuple[Path, dict[str, str]]:
    """Writes a file with keys of tenants, and returns it and the key of each."""
    tenants: list[Tenant] = []
    keys: list[Key] = []
    texts: dict[str, str] = {}
    for name, fields in {**given, "admin": {}}.items():
        tenants.append(Tenant(name, name, **fields))
        scopes = ("jobs", "admin") if name == "admin" else ("jobs",)
        texts[name], key = make_key(name, scopes)
        keys.append(key)
    path = folder / "keys.json"
    write_keys(path, tenants, keys)
    return path, texts


@contextmanager
def real_server(
    folder: Path,
    tenants: Mapping[str, Mapping[str, Any]] | None = None,
    environment: Mapping[str, str] | None = None,
    loading: Mapping[str, Any] | None = None,
    model: Path | None = None,
    **settings: Any,
) -> Iterator[RealServer]:
    """Runs a server until the block ends.

    Args:
        folder: where everything of it is.
        tenants: fields of `Tenant` by the name of each; Ada and Bob unless given.
        environment: more variables for its processes.
        loading: how its model is loaded.
        model: the folder of its model, a small one unless given.
        settings: fields of `Settings`.
    """
    model = write_model(folder) if model is None else model
    keys, texts = tenants_of(folder, {"ada": {}, "bob": {}} if tenants is None else tenants)
    asked = {"model": str(model), "keys": str(keys), "data": str(folder / "data")}
    asked |= {"loading": dict(loading or {}), "settings": settings}
    log = folder / "log"
    path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    given = dict(environment or {})
    path = os.pathsep.join([*filter(None, [given.pop("PYTHONPATH", "")]), path])
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.server.real_server", json.dumps(asked)],
            stdout=subprocess.PIPE,
            stderr=file,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **given},
            cwd=folder,
        )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().decode().strip()
        assert url.startswith("http"), log.read_text()[-4000:]
        server = RealServer(url, process, folder / "data", texts, log)
        server.await_ready()
        yield server
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a server, and its processes with it: they notice that it is gone."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def job_bytes(job: Job) -> bytes:
    """The bytes of a job, as a client sends them."""
    return job.to_bytes()


def main() -> None:
    """Runs a server with the settings that are its argument."""
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    asked = json.loads(sys.argv[1])
    model = served_model(asked["model"], asked["loading"])
    settings = Settings([model], Path(asked["data"]), keys=Path(asked["keys"]), **asked["settings"])
    run(settings, lambda url: print(url, flush=True))


if __name__ == "__main__":
    main()
