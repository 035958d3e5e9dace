"""The names of saved values, by which `Results` of a job give them."""

from __future__ import annotations

from insitu.graph.errors import OptionError
from insitu.graph.location import here
from insitu.graph.node import table_of
from insitu.graph.recording import Recording

LONGEST_NAME = 200
"""How many characters a name may have."""


def add_name(recording: Recording, index: int, name: object) -> None:
    """Names a saved value.

    Args:
        recording: where it is saved.
        index: the node that saves the value.
        name: its name.

    Raises:
        OptionError: if it is no name, or if another value has it.
    """
    if not isinstance(name, str):
        instead = f": write `save(optional={name})`" if isinstance(name, bool) else ""
        raise OptionError(
            f"A saved value is named by a string, and not by {name!r:.40}{instead}.", here(3)
        )
    if why := unfit(name):
        raise OptionError(f"A value cannot be saved as {name!r:.40}: {why}.", here(3))
    if name in recording.taken:
        raise OptionError(
            f"Another value of this block is saved as {name!r}: give each its own name, such as "
            f'`save(f"{name}.{{number}}")` in a loop.',
            here(3),
        )
    table_of(recording, "names")[index] = name
    table_of(recording, "taken")[name] = index


def unfit(name: str) -> str:
    """Returns why a name cannot be given, "" if it can be."""
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        return f"a name has 1 to {LONGEST_NAME} characters that can be printed"
    if name.isdigit():
        return "numbers are the names of values that are saved without one"
    return ""
