"""Which Insitu this is."""

from __future__ import annotations


def installed_version() -> str:
    """Returns the version that is installed; "0+unknown" if its source alone is on the path."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("insitu")
    except PackageNotFoundError:
        return "0+unknown"
