"""How jobs travel to a server: the protocol's types, errors as data, and the client."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from insitu.remote.connection import Connection
    from insitu.remote.remote_job import RemoteJob

_LATER = {"Connection": "insitu.remote.connection", "RemoteJob": "insitu.remote.remote_job"}

__all__ = ["Connection", "RemoteJob"]


if not TYPE_CHECKING:  # a checker takes any name of a module that has this

    def __getattr__(name: str) -> Any:
        if name in _LATER:
            return getattr(import_module(_LATER[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
