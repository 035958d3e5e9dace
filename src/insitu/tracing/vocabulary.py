"""The vocabulary of a model: which standard names there are at a module, and what each stands for.

Which names a model has is found in `models/`. How the value of a name is read and written is in
`named.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from insitu.tracing.named import Named


@dataclass(frozen=True, slots=True)
class Missing:
    """A standard name that a module has no value for.

    Attributes:
        reason: why, as a sentence.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Role:
    """A standard name for a module.

    Attributes:
        path: the module's path; of a part that is no module, that of what it is a part of.
        part: the name under which its values are found; "" if it has none of its own.
        is_module: whether it is a module.
    """

    path: str
    part: str = ""
    is_module: bool = True


@dataclass(frozen=True, slots=True)
class Given:
    """A standard name for something that is there without a run, such as weights.

    Attributes:
        value: what it is.
    """

    value: Any


@dataclass(frozen=True, slots=True)
class Roles:
    """A standard name for a list of modules.

    Attributes:
        paths: their paths.
    """

    paths: tuple[str, ...]


Entry = Named | Missing | Role | Roles | Given
"""What a standard name stands for."""


class Vocabulary:
    """The standard names of a model. This one has none; Transformers models have their own."""

    names: frozenset[str] = frozenset()
    """All standard names that there are, of any module."""

    def entry(self, path: str, part: str, name: str) -> Entry | None:
        """Returns what a name stands for at a module, None if it is none of its names.

        Args:
            path: the module's path.
            part: the part that a handle stands for, "" if just for the module.
            name: the name.
        """
        return None

    def listed(self, path: str, part: str) -> Mapping[str, Any]:
        """Returns what there is by its name at a module: see `entry`."""
        return {}

    def line_instead(self, path: str, name: str) -> str:
        """Returns the line to write for another library's word, as the end of a message.

        Args:
            path: the module that was asked for it.
            name: the word.
        """
        return ""

    def whereabouts(self) -> str:
        """Returns where the model's blocks are, as the end of a message."""
        return ""

    def unfused(self) -> Mapping[str, Any]:
        """Returns how the model has to run for its attention to be no one fused function."""
        return {}

    def verify(self, options: Mapping[str, Any]) -> bool:
        """Returns whether a model with its weights computes the same with some options.

        Args:
            options: such as `unfused` gives.
        """
        return True

    def quiet(self) -> AbstractContextManager[None]:
        """Returns a context in which names are only looked up, and nothing is said of runs."""
        return contextlib.nullcontext()
