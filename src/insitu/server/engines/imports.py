"""What a process of a server imports before the first job comes: no job decides when that is done.

A module that is imported while a job runs takes its time, opens files, and may fail where the
process has come to its limits.
"""

from __future__ import annotations

import pkgutil
from contextlib import suppress
from importlib import import_module

_OF_RUNS = ("graph", "engine", "batching", "tracing", "models")
"""The folders whose files a run may need; each knows those before it."""


def import_what_runs_need() -> None:
    """Imports every file of the library that takes part in checks and runs of jobs."""
    for name in _OF_RUNS:
        package = import_module(f"insitu.{name}")
        for found in pkgutil.walk_packages(package.__path__, f"insitu.{name}."):
            with suppress(ImportError):  # what is for a package that is not installed
                import_module(found.name)
