"""What traces without options use of a model, for as long as that is as it was.

It is kept in an object of its own, because Python takes several times as long to find an attribute
of a model, which answers for the names of its modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from insitu.models.attention import SETTING
from insitu.models.forward import LanguageForward

if TYPE_CHECKING:
    from insitu.models.language_subject import LanguageSubject


class Usual:
    """The forward that a model usually makes.

    Args:
        model: the model.

    Attributes:
        forward: the forward.
    """

    __slots__ = ("_attention", "_settings", "_spine", "forward")

    def __init__(self, model: LanguageSubject) -> None:
        self.forward = LanguageForward(model, {})
        self._spine = model.snapshot.spine
        # A config looks up its attributes in Python, `__dict__` too.
        self._settings = vars(model.config)
        self._attention = self._settings.get(SETTING)

    def still_holds(self) -> bool:
        """Returns whether its blocks, its head and its attention are those that they were."""
        spine = self._spine
        return spine.now == spine.then and self._settings.get(SETTING) == self._attention
