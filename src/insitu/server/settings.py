"""What a server is told when it starts: `insitu serve` and `insitu.serve(...)` make these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that a server has.

    Attributes:
        id: what it is called: a repo id, the name of a bundled model, or of a folder.
        place: what `LanguageModel` is given: the same, or a folder.
        loading: keyword arguments for `LanguageModel`, such as `dtype` and `device_map`: numbers
            and words.
    """

    id: str
    place: str
    loading: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Settings:
    """What a server is told when it starts.

    Attributes:
        models: what it serves.
        data: the folder in which it keeps everything.
        host: the address that it binds to.
        port: the port; 0 for any that is free.
        keys: a file with keys, None for the key file in the data folder.
        cert: the certificate for TLS.
        tls_key: the key of the certificate.
        behind_proxy: whether something before it does TLS.
        hosts: the names that requests may be for, beside the address itself.
        durable: whether what was accepted survives a power failure too.
        joins: whether jobs share passes.
        keeps_source: whether the text of users' lines is kept and sent back.
        weights_readable: whether jobs may read weights and call modules as functions.
        shares_between_tenants: whether the prefixes of prompts are shared between tenants.
        longest_body: the bytes of a job's body, without blobs.
        longest_blob: the bytes of one blob.
        stored_seconds: how long results are kept.
        pass_seconds: after how long a pass without an end means that its engine hangs.
        job_limits: what one job may take, by the names of `Limits`, where that is not the default;
            see `job_limits.py`. Infinity is no limit.
        tenant_limits: what a tenant may take, by the names of `TenantLimits`.
        admission_workers: how many jobs are checked at once.
        admission_seconds: how many seconds of a processor the check of a job may take.
        admission_bytes: the memory that a check may take, beside what the worker has.
    """

    models: Sequence[ServedModel]
    data: Path
    host: str = "127.0.0.1"
    port: int = 0
    keys: Path | None = None
    cert: Path | None = None
    tls_key: Path | None = None
    behind_proxy: bool = False
    hosts: Sequence[str] = ()
    durable: bool = False
    joins: bool = True
    keeps_source: bool = True
    weights_readable: bool = True
    shares_between_tenants: bool = False
    longest_body: int = 16 * 2**20
    longest_blob: int = 4 * 2**30
    stored_seconds: float = 24 * 3600.0
    pass_seconds: float = 120.0
    job_limits: Mapping[str, float] = field(default_factory=dict[str, float])
    tenant_limits: Mapping[str, float] = field(default_factory=dict[str, float])
    admission_workers: int = 1
    admission_seconds: float = 10.0
    admission_bytes: int = 2 * 2**30
