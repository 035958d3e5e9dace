"""A job as it is sent: large tensors go apart, once, by their digests."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from urllib.parse import quote

import safetensors.torch
import torch

from insitu.engine.job import Job
from insitu.engine.job_wire import tensors_of as tensors_by_digest
from insitu.engine.limits import rows_of
from insitu.graph.structure import tensors_of
from insitu.remote.answers import Asking
from insitu.remote.http_client import HttpClient
from insitu.remote.protocol import BLOB_NAME, INLINE_BYTES

_TYPE = "application/octet-stream"
_STORABLE = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
}
"""Dtypes that every version of safetensors has. Other tensors go with the job, however large."""


class JobBytes:
    """The bytes of a job for one server.

    Args:
        http: sends requests to it.
        job: the job.
        sent: the digests of tensors that the server has. Those that are sent are added.

    Attributes:
        body: the bytes of the job, without the tensors that go apart.
    """

    def __init__(self, http: HttpClient, job: Job, sent: set[str]) -> None:
        self._http, self._job, self._sent = http, job, sent
        self._large: Mapping[str, torch.Tensor] = {}
        self.body = b""
        if _may_be_large(job):
            self._large = {
                digest: tensor
                for digest, tensor in tensors_by_digest(job.blocks, trains=True)[0].items()
                if _size(tensor) > INLINE_BYTES and tensor.dtype in _STORABLE
            }
        for digest in self._large:
            if digest not in sent:
                self._put(digest)
        self.body = job.to_bytes(without=self._large.keys(), trains=True)

    def put_missing(self, digests: Collection[str]) -> bool:
        """Sends the tensors that a server has no longer, and returns whether there were any.

        Args:
            digests: what the server names, which may be anything.
        """
        missing = [digest for digest in self._large if digest in digests]
        for digest in missing:
            self._sent.discard(digest)
            self._put(digest)
        return bool(missing)

    def _put(self, digest: str) -> None:
        """Sends a tensor, unless the server has it."""
        path = f"/v1/blobs/{quote(digest, safe='')}"
        found = self._http.ask(Asking("HEAD", path))
        if found.status == 404:
            tensor = self._large[digest].detach().resolve_conj().resolve_neg().cpu().contiguous()
            content = safetensors.torch.save({BLOB_NAME: tensor})
            found = self._http.ask(
                Asking("PUT", path, headers={"Content-Type": _TYPE}, content=content)
            )
        if not found.is_good:
            raise self._http.error(found)
        self._sent.add(digest)


def _may_be_large(job: Job) -> bool:
    """Whether a tensor of a job is large. To find out its digest, all of them are copied."""
    return any(_size(tensor) > INLINE_BYTES for tensor in _tensors(job))


def _tensors(job: Job) -> Iterator[torch.Tensor]:
    for block in job.blocks:
        yield from tensors_of(dict(block.options))
        for prompt in block.prompts:
            yield from tensors_of((prompt.ids, prompt.mask, prompt.args, dict(prompt.kwargs)))
        for row in rows_of(block.graph):
            yield from tensors_of(row[1])
            if row[2]:
                yield from tensors_of(dict(row[2]))


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
