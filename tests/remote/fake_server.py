"""A server of the protocol for tests of the client: a model in this process, and faults."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, ClassVar

import httpx
import msgspec
import safetensors.torch
import torch

from insitu import InsituError, Job, LanguageModel
from insitu.remote.connection import Connection
from insitu.remote.problems import Problem, problem_of
from insitu.remote.protocol import (
    JOB_TYPE,
    PROBLEM_TYPE,
    RESULTS_TYPE,
    SKELETON_TYPE,
    JobPlan,
    JobStatus,
    ModelList,
    ModelStatus,
    Usage,
)
from insitu.remote.skeletons import skeleton_of, skeleton_to_bytes

URL = "http://127.0.0.1:9"
KEY = "secret-key"
Fault = Callable[[httpx.Request], httpx.Response | None]


@dataclass
class Kept:
    """A job that the server has."""

    status: JobStatus
    body: bytes
    results: bytes = b""
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


class FakeServer:
    """A server with one model and one tenant.

    Attributes:
        holds: whether jobs stay queued until `finish`.
        fault: what it does in place of an answer, if it returns or raises anything.
        asked: the requests, as "POST /v1/jobs".
        chunk: how many bytes of events come at once.
    """

    def __init__(self, model: LanguageModel | None = None, holds: bool = False) -> None:
        self.model, self.holds = model, holds
        self.fault: Fault | None = None
        self.asked: list[str] = []
        self.requests: list[httpx.Request] = []
        self.jobs: dict[str, Kept] = {}
        self.keys: dict[str, str] = {}
        self.blobs: dict[str, torch.Tensor] = {}
        self.chunk = 7

    def connection(self, **kwargs: Any) -> Connection:
        return Connection(URL, KEY, transport=self.transport(), **kwargs)

    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(lambda request: streamed(self.handle(request)))

    def handle(self, request: httpx.Request) -> httpx.Response:
        request.read()
        path = request.url.path
        self.asked.append(f"{request.method} {path}")
        self.requests.append(request)
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return problem("unauthorised", 401, "The key is wrong.")
        if self.fault is not None:
            found = self.fault(request)
            if found is not None:
                return found
        for pattern, answer in self._routes.items():
            match = re.fullmatch(pattern, f"{request.method} {path}")
            if match:
                return answer(self, request, *match.groups())
        return problem("not_found", 404, "There is no such thing.")

    def submit(self, request: httpx.Request) -> httpx.Response:
        assert request.headers["Content-Type"] == JOB_TYPE
        assert request.headers["Insitu-Protocol"] == "1"
        key = request.headers["Idempotency-Key"]
        if key not in self.keys:
            missing = self.missing(request.content)
            if missing:
                return problem("missing_blobs", 409, "Send them.", digests=tuple(missing))
            number = f"{len(self.jobs) + 1:032x}"
            self.keys[key] = number
            status = JobStatus(number, "queued", "tiny")
            self.jobs[number] = Kept(status, request.content, events=[("state", _state("queued"))])
            if not self.holds:
                self.finish(number)
        kept = self.jobs[self.keys[key]]
        if "wait" in request.headers.get("Prefer", "") and kept.status.state == "done":
            headers = {"Insitu-Job": kept.status.id, "ETag": f'"{kept.status.digest}"'}
            headers["Content-Type"] = RESULTS_TYPE
            return httpx.Response(200, headers=headers, content=kept.results)
        return record(kept.status, 202 if kept.status.state == "queued" else 200)

    def missing(self, body: bytes) -> list[str]:
        from insitu.engine.unread_jobs import absent_from

        return [digest for digest in absent_from(body) if digest not in self.blobs]

    def finish(self, id: str) -> None:
        """Runs a job."""
        kept = self.jobs[id]
        assert self.model is not None
        try:
            job = Job.from_bytes(kept.body, self.blobs)
            results = self.model.run(job, raises=False)
        except InsituError as error:
            self.end(id, "failed", problem=problem_of(error))
            return
        kept.results = results.to_bytes()
        digest = hashlib.sha256(kept.results).hexdigest()
        kept.events.append(("progress", {"done": 0.5}))
        self.end(id, "done", digest=digest, result_bytes=len(kept.results))

    def end(self, id: str, state: Any, **changes: Any) -> None:
        kept = self.jobs[id]
        kept.status = msgspec.structs.replace(kept.status, state=state, **changes)
        kept.events.append(("state", _state(state)))

    def status(self, request: httpx.Request, id: str) -> httpx.Response:
        if id not in self.jobs:
            return problem("not_found", 404, "There is no such job.")
        return record(self.jobs[id].status)

    def cancel(self, request: httpx.Request, id: str) -> httpx.Response:
        if self.jobs[id].status.state == "queued":
            self.end(id, "cancelled")
        return record(self.jobs[id].status)

    def events(self, request: httpx.Request, id: str) -> httpx.Response:
        after = int(request.headers.get("Last-Event-ID", 0))
        data = sent(self.jobs[id].events, after)
        return httpx.Response(
            200, headers={"Content-Type": "text/event-stream"}, stream=Pieces(data, self.chunk)
        )

    def result(self, request: httpx.Request, id: str) -> httpx.Response:
        kept = self.jobs[id]
        headers = {"Content-Type": RESULTS_TYPE, "ETag": f'"{kept.status.digest}"'}
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if not asked:
            return httpx.Response(200, headers=headers, content=kept.results)
        start = int(asked[1])
        assert request.headers["If-Range"] == headers["ETag"]
        last = len(kept.results) - 1
        headers["Content-Range"] = f"bytes {start}-{last}/{last + 1}"
        return httpx.Response(206, headers=headers, content=kept.results[start:])

    def plan(self, request: httpx.Request) -> httpx.Response:
        assert self.model is not None
        try:
            check = self.model.check(Job.from_bytes(request.content, self.blobs))
        except InsituError as error:
            return answer_of(problem_of(error))
        return record(JobPlan("tiny", check.passes, 1.0, 2.0, 3, []))

    def has_blob(self, request: httpx.Request, digest: str) -> httpx.Response:
        return httpx.Response(204 if digest in self.blobs else 404)

    def put_blob(self, request: httpx.Request, digest: str) -> httpx.Response:
        self.blobs[digest] = safetensors.torch.load(request.content)["tensor"]
        return httpx.Response(204)

    def skeleton_bytes(self) -> bytes:
        assert self.model is not None
        return skeleton_to_bytes(skeleton_of(self.model, "tiny"))

    def models(self, request: httpx.Request) -> httpx.Response:
        digest = hashlib.sha256(self.skeleton_bytes()).hexdigest()
        there = ModelStatus("tiny", "GPT2LMHeadModel", "float32", "ready", digest)
        return record(ModelList([there], "0.1.0"))

    def skeleton(self, request: httpx.Request) -> httpx.Response:
        data = self.skeleton_bytes()
        headers = {"Content-Type": SKELETON_TYPE, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        return httpx.Response(200, headers=headers, content=data)

    def usage(self, request: httpx.Request) -> httpx.Response:
        return record(Usage(1.0, 2.0, 3, 4, 5, 6, {"queued": 100}))

    _routes: ClassVar[dict[str, Callable[..., httpx.Response]]] = {
        "POST /v1/jobs": submit,
        "POST /v1/plan": plan,
        "GET /v1/jobs/([0-9a-f]+)": status,
        "DELETE /v1/jobs/([0-9a-f]+)": cancel,
        "GET /v1/jobs/([0-9a-f]+)/events": events,
        "GET /v1/jobs/([0-9a-f]+)/result": result,
        "HEAD /v1/blobs/([0-9a-f]+)": has_blob,
        "PUT /v1/blobs/([0-9a-f]+)": put_blob,
        "GET /v1/models": models,
        "GET /v1/models/tiny/skeleton": skeleton,
        "GET /v1/usage": usage,
    }


class Pieces(httpx.SyncByteStream):
    """A body in pieces, which may break off."""

    def __init__(self, data: bytes, size: int, breaks: bool = False) -> None:
        self.data, self.size, self.breaks = data, size, breaks

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self.data), self.size):
            yield self.data[start : start + self.size]
        if self.breaks:
            raise httpx.ReadError("the connection is gone")


def streamed(found: httpx.Response) -> httpx.Response:
    """An answer that is read as it comes, as all are that come over a network."""
    if not found.is_stream_consumed:
        return found
    stream = Pieces(found.content, 2**16)
    return httpx.Response(found.status_code, headers=found.headers, stream=stream)


def _state(state: str) -> dict[str, Any]:
    return {"state": state, "attempt": 1}


def sent(events: list[tuple[str, dict[str, Any]]], after: int = 0) -> bytes:
    """Events as they are sent, with a sign of life before each."""
    lines = [
        f": here\n\nid: {number}\nevent: {kind}\ndata: {json.dumps(data)}\n\n"
        for number, (kind, data) in enumerate(events, 1)
        if number > after
    ]
    return "".join(lines).encode()


def record(found: Any, status: int = 200) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return httpx.Response(status, headers=headers, content=msgspec.json.encode(found))


def answer_of(found: Problem, **headers: str) -> httpx.Response:
    headers = {"Content-Type": PROBLEM_TYPE, **headers}
    return httpx.Response(found.status, headers=headers, content=msgspec.json.encode(found))


def problem(code: str, status: int, detail: str, **fields: Any) -> httpx.Response:
    return answer_of(Problem(code, code, status, detail, **fields))


@contextmanager
def listening(server: FakeServer, cut: Callable[[str], int | None]) -> Iterator[str]:
    """Serves over a socket, and closes connections after so many bytes of a body.

    Args:
        server: what answers.
        cut: after how many bytes, for a request such as "GET /v1/models"; None to send all.
    """

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            content = self.rfile.read(length)
            url = f"http://{self.headers['Host']}{self.path}"
            found = server.handle(
                httpx.Request(self.command, url, headers=dict(self.headers), content=content)
            )
            body = streamed(found).read()
            self.send_response(found.status_code)
            for name in ("Content-Type", "ETag", "Content-Range", "Insitu-Job"):
                if name in found.headers:
                    self.send_header(name, found.headers[name])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            most = cut(f"{self.command} {self.path}")
            self.wfile.write(body[:most])
            self.close_connection = most is not None

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = answer  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    serving = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=serving.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{serving.server_address[1]}"
    finally:
        serving.shutdown()
        serving.server_close()
        thread.join()
