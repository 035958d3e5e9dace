"""A model whose jobs are run by a server: what `remote=` means where a model or a block is made."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from insitu.engine.events import Event, Listener, PassEnded, TokensChosen, ValueSaved
from insitu.engine.seams import seams
from insitu.engine.sinks import SaveKey
from insitu.graph.errors import OptionError, nearest
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
        model: the id of the model there.
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


def away_at(remote: Remote, name: str | None) -> AwayModel:
    """Returns a model of a server.

    Args:
        remote: what was given as `remote=`.
        name: what it is called there; None for the only one that the server has.

    Raises:
        OptionError: if `remote` is no server, or the server has no such model.
    """
    connection = connected(remote)
    there = [model.id for model in connection.models().models]
    if name is None and len(there) == 1:
        return AwayModel(connection, there[0])
    if name not in there:
        raise OptionError(_no_model(name or "", there), here())
    return AwayModel(connection, name)


def away_for(remote: Remote, name: str, differs: Callable[[str], bool] | None) -> AwayModel:
    """Returns the model of a server that is the one that is here.

    Args:
        remote: what was given as `remote=`.
        name: the name of the model here, "" for one that was made in memory.
        differs: whether a digest is of other weights than its own; None if these are not in
            memory.

    Raises:
        OptionError: if `remote` is no server, if the server has no such model, or if its weights
            have other values.
        RemoteError: if the server does not load its weights in time.
    """
    connection = connected(remote)
    models = connection.models().models
    there = [model.id for model in models]
    if name not in there and differs is None:
        raise OptionError(
            f"{_no_model(name, there)} Without a name the weights tell: call `model.load()` first.",
            here(),
        )
    if differs is None:
        return AwayModel(connection, name)
    asked = [name] if name in there else there
    alike = [one for one in asked if not differs(connection.weights_of(one))]
    if len(alike) == 1:
        return AwayModel(connection, alike[0])
    if alike or len(asked) != 1:
        raise OptionError(_no_model(name, there), here())
    raise OptionError(
        f"The weights of this model have other values than those of {asked[0]!r:.100} on the "
        "server, which would run its own. Run the block here, without `remote=`, or take the "
        f"server's model: `LanguageModel({asked[0]!r:.100}, remote={connection.url!r})`.",
        here(),
    )


def _no_model(name: str, there: Sequence[str]) -> str:
    """Says that a server has no model of a name."""
    listed = ", ".join(map(repr, there[:20])) or "none"
    what = f"no model {name!r:.100}{nearest(name, there)}" if name else "several models"
    return f"The server has {what}. Its models: {listed}."
