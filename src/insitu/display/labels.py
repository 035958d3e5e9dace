"""Labels as one can read them: tokens with their spaces, long ones shortened.

A token may be anything: a space, a control character, something that looks like HTML, or a
hundred characters. Labels made here can be put into a picture or on a terminal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from unicodedata import category, east_asian_width

from insitu.display.axis import Axis

POSITIONS = ("position", "query", "key")
"""Axes whose labels are tokens, unless they are numbers."""
TOKENS = (*POSITIONS, "token")

_SHOWN = {" ": "·", "\n": "↵", "\r": "←", "\t": "→"}


def visible(token: str) -> str:
    """Returns a token in which spaces, ends of lines and control characters can be seen."""
    return "".join(_SHOWN.get(char) or _printed(char) for char in token) or "''"


def labels_of(axis: Axis, longest: int = 16) -> list[str]:
    """Returns the labels of an axis, to be shown.

    Args:
        axis: the axis.
        longest: how wide they may be, in characters.
    """
    labels = map(visible, axis.labels) if axis.name in TOKENS else map(_line, axis.labels)
    return [shortened(label, longest) for label in labels]


def shortened(text: str, longest: int) -> str:
    """Returns a text that is no wider than a number of characters, "…" at its end if it was.

    Args:
        text: the text.
        longest: the number; it counts wide characters, such as of Chinese, twice.
    """
    if width(text) <= longest:
        return text
    kept, used = "", 1
    for char in text:
        used += width(char)
        if used > longest:
            break
        kept += char
    return kept + "…"


def width(text: str) -> int:
    """Returns how wide a text is, in characters of a terminal."""
    wide = sum(east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(category(char) in ("Mn", "Me", "Cf") for char in text)


def numbered(labels: Sequence[str]) -> bool:
    """Returns whether labels are numbers, as of layers."""
    return all(label.isdecimal() for label in labels)


def number(value: float) -> str:
    """Returns a number with the digits that can be read at a glance."""
    if value != value:
        return ""
    text = f"{value:.3g}" if abs(value) < 1e4 else f"{value:.2e}"
    return text.replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def alike(values: Iterable[float]) -> Callable[[float], str]:
    """Returns what writes some numbers with as many decimals each, so that they can be compared.

    Args:
        values: the numbers.
    """
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    places = 2 - math.floor(math.log10(largest)) if largest else 2
    if not -4 <= places <= 6:
        return number
    places = min(max(places, 0), 2) if not 0 < largest < 0.1 else places - 1

    def written(value: float) -> str:
        text = f"{value:.{places}f}"
        return "" if value != value else text.replace("-", "") if float(text) == 0 else text

    return written


def wrapped(text: str, longest: int) -> list[str]:
    """Returns a text as lines, broken at spaces.

    Args:
        text: the text.
        longest: how wide a line may be, in characters.
    """
    lines = [""]
    for word in text.split():
        if lines[-1] and width(lines[-1]) + 1 + width(word) > longest:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return [shortened(line, longest) for line in lines]


def html(text: str) -> str:
    """Returns a text that plotly, which knows some HTML and TeX, shows as it is."""
    for char, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("$", "&#36;")):
        text = text.replace(char, entity)
    return text


def _line(text: str) -> str:
    """A text without what would break a line or a terminal."""
    return "".join(" " if char.isspace() else _printed(char) for char in text)


def _printed(char: str) -> str:
    """A character as it is, or its number if it is none that can be seen."""
    return char if char.isprintable() else char.encode("unicode_escape").decode()
