"""A server as a process of its own that tests can kill: `python -m tests.server.front_process`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from insitu.server.running import run, served_model
from insitu.server.settings import Settings

MODEL = "model"
LIMITS = {"queued_jobs": float("inf"), "lengths_a_minute": float("inf")}


def main() -> None:
    """Runs a server on a folder, with the model in another one, at a port, until it is told."""
    logging.basicConfig(level=logging.WARNING)
    data, model, port = sys.argv[1:]
    settings = Settings([served_model(model, {})], Path(data), port=int(port), tenant_limits=LIMITS)
    run(settings, lambda url: print(url, flush=True))


if __name__ == "__main__":
    main()
