"""The packages that a server takes, and that not everybody has."""

from __future__ import annotations

from importlib.util import find_spec

from insitu.graph.errors import MissingPackageError
from insitu.graph.location import here


def check_packages() -> None:
    """Raises if a package is not installed that a server takes.

    Raises:
        MissingPackageError: in that case, with what to install.
    """
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"A server takes {' and '.join(missing)}, which {'are' if missing[1:] else 'is'} not "
            "installed: `pip install 'insitu[serve]'`.",
            here(),
        )
