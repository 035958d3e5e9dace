"""nnsight behind a small HTTP server, one request at a time, and a client of it.

It is in an environment of its own, and imports nothing of Insitu. A request is what nnsight sends
to NDIF: `RequestModel.serialize`, which is cloudpickle packed with zstd. An answer is what comes
back from there, `torch.save` packed with zstd. Run by `serving.py`.
"""

from __future__ import annotations

import io
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import nnsight
import torch
import zstandard
from nnsight.schema.request import RequestModel
from nnsight.tracing import tracer as tracing
from nnsight.tracing.backend import Backend
from serving_load import (
    ABLATED,
    HEAD,
    HEADLESS,
    NORMED,
    SAVED,
    STEERED,
    TOP,
    Answer,
    Request,
    listen,
)
from subjects import HEADS, gpt2
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

WIDTH_OF_HEAD = 768 // HEADS


def wrapped(module: Any) -> Any:
    """Returns a model of nnsight's. It wants a tokenizer, although it is given tokens."""
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a")
    return nnsight.TransformersModel(module, tokenizer=tokenizer, task="text-generation")


def run(model: Any, blob: bytes) -> bytes:
    """Runs a request, and returns what it saves."""
    persistent = model._remoteable_persistent_objects()
    tracer = RequestModel.deserialize(blob, persistent, compress=True)
    tracing.inc()
    try:
        with torch.no_grad():
            tracer.execute(tracer.info.code)
        kept, found = tracing._saves(), tracer.info.frame.f_locals
        saved = {name: value for name, value in found.items() if id(value) in kept}
    finally:
        tracing.dec()
    answer = io.BytesIO()
    torch.save(saved, answer)
    return zstandard.ZstdCompressor(level=6).compress(answer.getvalue())


def serve() -> None:
    """Serves a model until the standard input ends."""
    model, turn = wrapped(gpt2()), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def do_POST(self) -> None:
            blob = self.rfile.read(int(self.headers["Content-Length"]))
            with turn:
                body = run(model, blob)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(json.dumps({"url": f"http://127.0.0.1:{server.server_port}"}), flush=True)
    sys.stdin.read()


class Kept(Backend):
    """Writes a trace as it is sent, and runs nothing."""

    def __call__(self, tracer: Any) -> None:
        self.blob = RequestModel.serialize(tracer, compress=True)


class NnsightClient:
    """Users of the server.

    Args:
        url: where it is.
        users: how many.
        module: a model like its, which writes traces.
    """

    def __init__(self, url: str, users: int, module: Any) -> None:
        self._url, self._model = url, wrapped(module)
        self._clients = [httpx.Client(timeout=600, trust_env=False) for _ in range(users)]

    def prepare(self, request: Request) -> bytes:
        model, ids, vector, kept = self._model, request.ids, request.vector, Kept()
        blocks, head = model.transformer.h, model.lm_head
        match request.kind:
            case "saves":
                with model.trace(ids, use_cache=False, backend=kept):
                    values = nnsight.save([])
                    for number in SAVED:
                        values.append(blocks[number].output[:, -1].clone())
                    values.append(head.output[0, -1].clone())
            case "ablation":
                with model.trace(ids, use_cache=False, backend=kept):
                    blocks[ABLATED].mlp.output[:] = 0
                    values = nnsight.save([head.output[0, -1].topk(TOP).values])
            case "steering":
                with model.trace(ids, use_cache=False, backend=kept):
                    blocks[STEERED].output[:] += vector
                    values = nnsight.save([head.output[0, -1].topk(TOP).values])
            case _:
                start, end = HEAD * WIDTH_OF_HEAD, (HEAD + 1) * WIDTH_OF_HEAD
                with model.trace(ids, use_cache=False, backend=kept):
                    blocks[HEADLESS].attn.c_proj.input[..., start:end] = 0
                    values = nnsight.save([])
                    for number in NORMED:
                        values.append(blocks[number].output.norm(dim=-1))
        return kept.blob

    def send(self, user: int, prepared: bytes) -> Answer:
        answer = self._clients[user].post(self._url, content=prepared)
        answer.raise_for_status()
        body = zstandard.ZstdDecompressor().decompress(answer.content)
        (values,) = torch.load(io.BytesIO(body), weights_only=False).values()
        return Answer(values, len(prepared), len(answer.content))

    def sweep(self, user: int) -> float:
        raise NotImplementedError


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    if "url" in asked:
        module = gpt2()
        listen(NnsightClient(asked["url"], len(asked["keys"]), module), module)
    else:
        serve()
