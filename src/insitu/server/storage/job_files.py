"""Jobs and tensors of a server, read from their files by the processes that look at them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch

from insitu.engine.job import Job
from insitu.engine.limits import Limits
from insitu.graph.errors import WireError
from insitu.remote.protocol import BLOB_NAME


def job_in(
    body: str,
    blobs: Mapping[str, str],
    limits: Limits | None = None,
    device: torch.device | None = None,
) -> Job:
    """Returns the job in a file.

    Args:
        body: the path of its bytes.
        blobs: the paths of tensors that are not among them, by digest.
        limits: as of `Job.from_bytes`.
        device: what its tensors are put on. Where they were on the client's machine says nothing
            of this one.

    Raises:
        LimitError: if it has more than the limits allow.
        WireError: if it cannot be read.
        OSError: if a file is not there.
    """
    tensors = {digest: blob_in(path) for digest, path in blobs.items()}
    return Job.from_bytes(Path(body).read_bytes(), tensors, limits=limits, device=device)


def blob_in(path: str) -> torch.Tensor:
    """Returns the tensor of a blob.

    Args:
        path: its file.

    Raises:
        WireError: if the file holds none.
    """
    try:
        return safetensors.torch.load_file(path)[BLOB_NAME]
    except (KeyError, safetensors.SafetensorError) as error:
        raise WireError(f"a blob cannot be read: {error}") from None
