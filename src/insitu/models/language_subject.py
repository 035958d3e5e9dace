"""A language model as its procedures see it: forwards, generations and what they try out."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from insitu.batching.procedure import Subject
from insitu.models.language_traits import LanguageTraits


class LanguageSubject(Subject, Protocol):
    """A language model as its procedures see it."""

    @property
    def traits(self) -> LanguageTraits:
        """What runs need to know of its module, as that is now."""
        ...

    @property
    def module(self) -> nn.Module:
        """The wrapped module, with or without weights."""
        ...

    @property
    def config(self) -> Any:
        """Its config."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer.

        Raises:
            LoadError: if it came without one.
        """
        ...

    @property
    def is_training(self) -> bool:
        """Whether any of its modules is in training mode: dropout may be, apart from the rest."""
        ...

    def trains(self) -> bool:
        """Returns whether it is in training mode, and says once what follows from it."""
        ...

    @property
    def has_hooks(self) -> bool:
        """Whether hooks of the user's own hang on its modules."""
        ...

    def in_use(self) -> AbstractContextManager[None]:
        """Waits for the wrapped module, and has it for a run of the library's own.

        Raises:
            BlockError: if that is inside a run of the user's.
        """
        ...
