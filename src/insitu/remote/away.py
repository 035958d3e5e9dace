"""A model whose jobs are run by a server: what `remote=` means where a model or a block is made."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from insitu.engine.events import Event, Listener, PassEnded, TokensChosen, ValueSaved
from insitu.engine.seams import seams
from insitu.engine.sinks import SaveKey
from insitu.graph.errors import OptionError
from insitu.graph.location import here
from insitu.remote.connection import Connection
from insitu.remote.protocol import JobEvent

if TYPE_CHECKING:
    from insitu.engine.job import Job
    from insitu.engine.results import Results
    from insitu.remote.remote_job import RemoteJob

Remote = str | bool | Connection
"""What may be given as `remote=`: a URL, a connection, or True for the URL in `INSITU_REMOTE`."""


class AwayModel:
    """A model of a server.

    Args:
        connection: the server.
        model: the id of the model there, "" if the server has one only.
    """

    def __init__(self, connection: Connection, model: str) -> None:
        self.connection, self.model = connection, model

    def run(self, job: Job) -> Results:
        """Runs a job on the server, and returns its results.

        Args:
            job: the job.

        Raises:
            InsituError: if something is wrong with all of it, or with the server.
        """
        around = seams.get()
        if around is None:
            return self.connection.run(job, model=self.model, raises=False)
        on_event = _Telling(around.listeners) if around.listeners else None
        cancel = around.cancels or None
        return self.connection.run(job, on_event, cancel, model=self.model, raises=False)

    def send(self, job: Job) -> RemoteJob:
        """Sends a job to the server, and returns it as it is there.

        Args:
            job: the job.

        Raises:
            InsituError: if something is wrong with it, as far as that is found before it runs.
        """
        return self.connection.submit(job, model=self.model)


class _Telling:
    """Tells those who listen to runs here of what a server tells of one.

    Args:
        listeners: who listens.
    """

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = listeners

    def __call__(self, event: JobEvent) -> None:
        """Takes an event of a job."""
        found = _event_of(event)
        if found is not None:
            for listener in self._listeners:
                listener(found)


def _event_of(event: JobEvent) -> Event | None:
    """What a run here would tell, None if it would tell nothing."""
    data = event.data
    try:
        match event.kind:
            case "progress":
                passes = data["number"], data["passes"]
                return PassEnded(data["block"], *passes, (), data["done"])
            case "token":
                return TokensChosen(data["block"], data["invocation"], data["step"], data["ids"])
            case "value":
                key = SaveKey(data["name"], data["block"], step=data["step"])
                return ValueSaved(key, data["bytes"])
            case _:
                return None
    except KeyError:  # of a server that tells less
        return None


def connected(remote: Remote) -> Connection:
    """Returns the server that is meant.

    Args:
        remote: what was given as `remote=`.

    Raises:
        OptionError: if that is no server.
    """
    if isinstance(remote, Connection):
        return remote
    url: Any = os.environ.get("INSITU_REMOTE") if remote is True else remote
    if not isinstance(url, str) or not url:
        told = ", and INSITU_REMOTE is not set" if remote is True else ""
        raise OptionError(
            f"`remote` is the URL of a server, such as 'http://127.0.0.1:8765', and not "
            f"{remote!r:.80}{told}.",
            here(),
        )
    return _connection(url)


@lru_cache(maxsize=16)
def _connection(url: str) -> Connection:
    """A connection to a server, which knows what it has sent there before."""
    return Connection(url)


def away_at(remote: Remote, name: str) -> AwayModel:
    """Returns a model of a server.

    Args:
        remote: what was given as `remote=`.
        name: the name of the model here. Unless the server has a model of that name, it is the
            only one that it has.

    Raises:
        OptionError: if `remote` is no server, or it has several models and none of this name.
    """
    connection = connected(remote)
    there = [model.id for model in connection.models().models]
    if name not in there and len(there) != 1:
        raise OptionError(
            f"The server has no model {name!r:.100}: there are {', '.join(there)}.", here()
        )
    return AwayModel(connection, name if name in there else there[0])
