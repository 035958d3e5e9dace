"""Sites by standard name, as methods speak of them: in every layer, with named axes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from insitu.graph.errors import OptionError, nearest
from insitu.graph.location import here
from insitu.models.keys import OF_BLOCK, entry_of, spelled
from insitu.models.language_model import LanguageModel
from insitu.tracing.named import Missing

_STREAM = ("position", "d_model")
_HEADS = ("head", "position", "d_head")
_AXES = {
    "residual_in": _STREAM,
    "residual_mid": _STREAM,
    "residual_out": _STREAM,
    "attention_out": _STREAM,
    "cross_attention_out": _STREAM,
    "mixer_out": _STREAM,
    "mlp_out": _STREAM,
    "q": _HEADS,
    "k": _HEADS,
    "v": _HEADS,
    "z": _HEADS,
    "result": ("head", "position", "d_model"),
    "scores": ("head", "query", "key"),
    "pattern": ("head", "query", "key"),
    "pre": ("position", "neuron"),
    "post": ("position", "neuron"),
    "router": ("position", "expert"),
    "weights": ("position", "expert"),
}
"""The axes of each name's value, behind that of the rows of the prompt."""


@dataclass(frozen=True, slots=True)
class Site:
    """A value that every block has, by its standard name.

    Attributes:
        key: its place in a block, such as "attention.z".
        axes: its axes behind that of the rows: ("head", "position", "d_head").
    """

    key: str
    axes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The last word of its key, such as "z"."""
        return self.key.rpartition(".")[2]

    def read(self, model: LanguageModel, layer: int) -> Any:
        """Returns the proxy of its value in a block, `(1, *axes)`, in an open invocation."""
        value: Any = model.blocks[layer]
        for name in self.key.split("."):
            value = getattr(value, name)
        return value

    def write(self, model: LanguageModel, layer: int, value: Any) -> None:
        """Assigns to it in a block, in an open invocation."""
        *parts, name = self.key.split(".")
        owner: Any = model.blocks[layer]
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, name, value)

    def index(self, **chosen: Any) -> tuple[Any, ...]:
        """Returns what indexes a part of its value: `site.index(head=3, position=-1)`.

        Args:
            chosen: an index by the name of an axis; axes that are not named are taken whole.
        """
        return (slice(None), *(chosen.get(axis, slice(None)) for axis in self.axes))


def site_of(name: str) -> Site:
    """Returns the site of a standard name.

    Args:
        name: such as "residual_out", "z" or "attention.z".

    Raises:
        OptionError: if there is none of that name.
    """
    key = spelled(name)
    axes = _AXES.get(key.rpartition(".")[2]) if key is not None else None
    if key is None or axes is None:
        raise OptionError(
            f"No value of a block is called {name!r}{nearest(name, [*_AXES, *OF_BLOCK])}.", here()
        )
    return Site(key, axes)


def layers_with(
    model: LanguageModel, site: Site, given: int | Iterable[int] | None, stack: str = "blocks"
) -> list[int]:
    """Returns which of some layers have a site: of all, those that do; named ones have to.

    Args:
        model: the model.
        site: the site.
        given: one layer or several, from the end if negative; None for all.
        stack: the list of blocks, by its standard name.

    Raises:
        OptionError: if there is no layer of a number, or it has no such site, or none has.
    """
    found, why = [], ""
    for layer in chosen("layer", given, len(getattr(model, stack))):
        entry = entry_of(model.vocabulary, f"{stack}.{layer}.{site.key}")
        if entry is not None and not isinstance(entry, Missing):
            found.append(layer)
            continue
        reason = "there is none." if entry is None else entry.reason
        why = why or f"Layer {layer} has no `{site.key}`: {reason}"
        if given is not None:
            raise OptionError(why, here())
    if not found:
        raise OptionError(f"No layer has `{site.key}`. {why}", here())
    return found


def chosen(name: str, given: int | Iterable[int] | None, count: int) -> list[int]:
    """Returns which of some layers, heads or positions were meant, counted from 0.

    Args:
        name: what they are, such as "layer".
        given: one or several, from the end if negative; None for all.
        count: how many there are.

    Raises:
        OptionError: if there is none of a number.
    """
    if given is None:
        return list(range(count))
    numbers: Sequence[int] = [given] if isinstance(given, int) else list(given)
    for number in numbers:
        if not -count <= number < count:
            raise OptionError(f"There is no {name} {number}: there are {count}.", here())
    return [number % count for number in numbers]
