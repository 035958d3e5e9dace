"""The models that come with Insitu: small enough to ship, real enough to learn on."""

from __future__ import annotations

from pathlib import Path

_PREFIX = "insitu/"
_HERE = Path(__file__).parent


def names() -> list[str]:
    """Returns the names of the bundled models, as `LanguageModel` takes them."""
    return sorted(f"{_PREFIX}{config.parent.name}" for config in _HERE.glob("*/config.json"))


def folder(name: str) -> str | None:
    """Returns the folder of a bundled model, or None if no bundled model has the name.

    Args:
        name: such as "insitu/eiffel". A folder of that name in the working directory goes first.
    """
    if name in names() and not Path(name).exists():
        return str(_HERE / name.removeprefix(_PREFIX))
    return None
