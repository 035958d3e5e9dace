"""Sends what a test traces to a server as well, and compares: `make test-served`.

The server has the same weights, saved to a folder. Tests that run the same model share one.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import tempfile
from collections import OrderedDict
from typing import Any

import torch

from insitu import InsituError, LanguageModel, RemoteError
from insitu.engine.fingerprint import other_structure
from insitu.engine.results import Results
from insitu.remote import Connection
from insitu.server.running import Running
from insitu.tracing.session import Session
from tests.round_trip import contents, parts, plainly, sent

_MOST_SERVERS = 3
_SERVERS: OrderedDict[str, Running] = OrderedDict()


class AgainstServer:
    """Sends the job of each block and session to a server, and compares its results."""

    def __init__(self) -> None:
        self.jobs: dict[int, tuple[Any, list[dict[int, Any]]]] = {}
        self.within = False

    def begins(self, running: Any) -> None:
        own = isinstance(running, Session) or not self.within
        self.within = self.within or isinstance(running, Session)
        blocks = parts(running)
        away = running.away or running.model.away
        if own and blocks and away is None and not any(block.is_dry for block in blocks):
            job = running.job
            if sent(job) is not None and can_be_served(running.model):
                self.jobs[id(running)] = job, [dict(block.recording.saves) for block in blocks]

    def ended(self, running: Any, failure: BaseException | None) -> None:
        self.within = self.within and not isinstance(running, Session)
        job, holders = self.jobs.pop(id(running), (None, []))
        if job is None or not (failure is None or isinstance(failure, InsituError)):
            return
        url = served(running.model)
        if url is None:
            return
        found: Results | None = None
        raised: InsituError | None = None
        try:
            found = Connection(url).run(job)
        except InsituError as error:
            raised = error
        if isinstance(raised, RemoteError):
            raise raised
        if failure is None and "a job saves tensors and plain data only" in str(raised):
            return  # a block of one's own saves an object too, such as a cache
        assert type(raised) is type(failure), (raised, failure)
        if found is not None:
            assert_close(dict(found), plainly(contents(job, holders)))


def can_be_served(model: Any) -> bool:
    """Whether a server can have the model as it is: its weights are all there is to it."""
    module = model.module
    return (
        isinstance(model, LanguageModel)
        and type(model).__name__ == "LanguageModel"
        and type(module).__module__.startswith("transformers.models.")
        and not module.training
        and not model.has_hooks
        # Neither is in a file: which weights are frozen, and a function that this process knows.
        and all(weight.requires_grad for weight in module.parameters())
        and getattr(module.config, "_attn_implementation", None) in (None, "eager", "sdpa")
        and not any(type(part).__module__.startswith("tests") for part in module.modules())
        and next(module.parameters()).dtype in (torch.float32, torch.float64)
    )


def served(model: Any) -> str | None:
    """The URL of a server with the model; None if it cannot be saved."""
    module = model.load()
    attention = module.config._attn_implementation
    what = f"{type(module)} {attention} {module.config.to_json_string()}"
    found = hashlib.sha256(what.encode())
    for name, tensor in module.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    key = found.hexdigest()
    if key not in _SERVERS:
        folder = tempfile.mkdtemp(prefix="insitu-served-")
        try:
            module.save_pretrained(folder)
            if model._tokenizer is not None and hasattr(model._tokenizer, "save_pretrained"):
                model._tokenizer.save_pretrained(folder)
        except Exception:  # whatever a class cannot save
            return None
        dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
        loading = {"dtype": dtype, "attn_implementation": attention}
        again = LanguageModel(folder, **loading).described.fingerprint
        if other_structure(model.described.fingerprint, again):  # parts of it were exchanged
            return None
        while len(_SERVERS) >= _MOST_SERVERS:
            _SERVERS.popitem(last=False)[1].stop()
        _SERVERS[key] = Running(folder, loading=loading).start()
    _SERVERS.move_to_end(key)
    return _SERVERS[key].url


@atexit.register
def _stop() -> None:
    for server in _SERVERS.values():
        with contextlib.suppress(Exception):
            server.stop()


def assert_close(one: Any, other: Any) -> None:
    """Whether two values agree in structure and, within rounding, in numbers."""
    if isinstance(one, torch.Tensor):
        assert one.shape == other.shape and one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_close(one[key], other[key])
    elif isinstance(one, tuple | list):
        assert len(one) == len(other)
        for item, same in zip(one, other, strict=True):
            assert_close(item, same)
    elif isinstance(one, float):
        assert one == other or one != one or abs(one - other) <= 1e-5 * max(1.0, abs(one))
    else:
        assert one == other
