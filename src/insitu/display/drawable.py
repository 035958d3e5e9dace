"""`Drawable`: what can be drawn can be written to a file, as a page or a picture."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from insitu.display.page import write_html, write_picture, write_png

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


class Drawable(ABC):
    """Has a picture, as a figure of plotly, that can be written to a file."""

    __slots__ = ()

    @abstractmethod
    def plot(self, *args: Any, **options: Any) -> Figure:
        """Returns a picture of it, as a figure of plotly."""

    def to_html(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Writes a picture of it as a page that can be opened without a network.

        Args:
            path: where to.
            options: those of `plot`.

        Raises:
            OptionError: as `plot`.
            MissingPackageError: if plotly is not installed.
        """
        write_html(self.plot(**options), path)

    def to_png(self, path: str | os.PathLike[str], scale: float = 2, **options: Any) -> None:
        """Writes a picture of it as a PNG. That takes Chromium.

        Of what can be chosen in the picture of a result, the first entry is drawn: `select`
        another before.

        Args:
            path: where to.
            scale: how many pixels of the file one of the picture's is wide.
            options: those of `plot`.

        Raises:
            OptionError: as `plot`.
            PictureError: if there is no Chromium.
            MissingPackageError: if plotly is not installed, or Kaleido, which speaks to Chromium.
        """
        write_png(self.plot(**options), path, scale)

    def to_picture(self, path: str | os.PathLike[str], scale: float = 2, **options: Any) -> None:
        """Writes a picture of it, in the form that the file's name ends in. That takes Chromium.

        Args:
            path: where to: ".png", or ".svg" or ".pdf" for papers.
            scale: how many pixels of a PNG one of the picture's is wide.
            options: those of `plot`.

        Raises:
            OptionError: as `plot`, or if the name ends in something else.
            PictureError: if there is no Chromium.
            MissingPackageError: if plotly is not installed, or Kaleido, which speaks to Chromium.
        """
        write_picture(self.plot(**options), path, scale)
