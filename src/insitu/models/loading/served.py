"""A model of a server: its config, tokenizer and tree are here, and its weights are not."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from insitu.graph.errors import InsituError, LoadError, OptionError
from insitu.graph.location import Location
from insitu.models.loading.opened import Opened
from insitu.models.loading.source import Source
from insitu.models.loading.tasks import language_class
from insitu.remote.away import AwayModel, Remote, away_at
from insitu.remote.skeletons import skeleton_folder


class ServedSource(Source):
    """Where a model comes from whose weights a server has.

    Args:
        away: the model on the server.
        folder: where its skeleton is.
        kwargs: keyword arguments for `from_pretrained`.
        task: as of `LanguageModel`, None for the class that the config names.
        location: the user's line.
    """

    def __init__(
        self,
        away: AwayModel,
        folder: str,
        kwargs: dict[str, Any],
        task: str | None,
        location: Location,
    ) -> None:
        choose = partial(language_class, asked=task)
        super().__init__(folder, kwargs, choose, location, asked=task is not None)
        self.name, self._away = away.model, away

    def weights(self, location: Location | None) -> nn.Module:
        """Raises: they are on the server.

        Raises:
            LoadError: always.
        """
        raise LoadError(
            f"The weights of {self.name!r} are on the server {self._away.connection.url}, which "
            "runs the lines of blocks. Lines that need them here cannot be run with `remote=`.",
            location,
        )


def opened_on_server(
    name: Any, remote: Remote, kwargs: dict[str, Any], location: Location
) -> tuple[Opened, Any, AwayModel]:
    """Returns a model of a server, its tokenizer, and where its jobs are run.

    Args:
        name: what the model is called there; None for the only one that the server has.
        remote: as of `LanguageModel`.
        kwargs: what was given to load a model with.
        location: the user's line.

    Raises:
        OptionError: if anything was, or if there is no such model.
    """
    if name is not None and not isinstance(name, str):
        raise OptionError(
            "A model of a server is given by what it is called there, and not as "
            f"{type(name).__name__}: send a block of a model of your own with "
            "`model.trace(prompt, remote=...)`.",
            location,
        )
    if kwargs:
        raise OptionError(
            f"{', '.join(map(repr, kwargs))} would be used to load a model, but the server has "
            "loaded it.",
            location,
        )
    away = away_at(remote, name)
    skeleton = away.connection.skeleton(away.model)
    folder, dtype = skeleton_folder(skeleton), getattr(torch, skeleton.dtype)
    given = {"dtype": dtype, "local_files_only": True}
    try:
        source = ServedSource(away, str(folder), given, skeleton.task or None, location)
        tree = source.tree()
    except InsituError:
        raise
    except Exception as error:  # whatever a class makes of a config that it does not know
        what = f"The tree of {away.model!r} cannot be made: {type(error).__name__}: {error}"
        raise LoadError(f"{what:.300}", location) from error
    if tree is None:
        raise LoadError(f"The tree of {away.model!r} cannot be made without its weights.", location)
    return Opened(tree, source.config, source, False), source.tokenizer(), away
