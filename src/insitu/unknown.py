"""The error for a name that `insitu` or `insitu.methods` does not have, with the line to write."""

from __future__ import annotations

import sys
from collections.abc import Collection
from importlib import import_module
from importlib.util import find_spec

from insitu.graph.errors import PathError, UnknownNameError
from insitu.graph.location import here
from insitu.habits import OF_PACKAGE, habit


def unknown_name(package: str, name: str, there: Collection[str]) -> Exception:
    """Returns the error for a name that a package does not have.

    Args:
        package: the package, "insitu" or "insitu.methods".
        name: the name that was asked for.
        there: the names that the package has.

    Returns:
        An `UnknownNameError` where the name is imported; a `PathError` where it is an attribute;
        a plain `AttributeError` for a question of Python's own.
    """
    if name.startswith("_") or find_spec(f"{package}.{name}"):
        return AttributeError(f"module {package!r} has no attribute {name!r}")
    elsewhere = "insitu.methods" if package == "insitu" else "insitu"
    instead = habit(name, OF_PACKAGE, there)
    if name not in OF_PACKAGE and name in getattr(import_module(elsewhere), "__all__", ()):
        instead = f": write `from {elsewhere} import {name}`"
    message = f"`{package}` has no `{name}`{instead}."
    # `from insitu import name` asks by `hasattr` first, and would put an error of its own in the
    # place of an `AttributeError`.
    imported = sys._getframe(2).f_globals.get("__name__") == "importlib._bootstrap"
    return UnknownNameError(message, here()) if imported else PathError(message, here())
