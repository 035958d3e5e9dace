"""Sites by standard name, as methods speak of them: in every layer, with named axes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import torch

from insitu.graph.errors import OptionError, nearest
from insitu.graph.location import here
from insitu.models.keys import OF_BLOCK, entry_of, spelled
from insitu.models.language_model import LanguageModel
from insitu.tracing.vocabulary import Missing

_STREAM = ("position", "d_model")
_HEADS = ("head", "position", "d_head")
_AXES = {
    "residual_in": _STREAM,
    "residual_mid": _STREAM,
    "residual_out": _STREAM,
    "block_out": _STREAM,
    "attention_out": _STREAM,
    "cross_attention_out": _STREAM,
    "mixer_out": _STREAM,
    "mlp_out": _STREAM,
    "extra_out": _STREAM,
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


_NORMS = ("norm_1.output", "norm_2.output")


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
        """The last word of its key, such as "z"; of the output of a norm, all of it."""
        return self.key if self.key in _NORMS else self.key.rpartition(".")[2]

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
    axes = None if key is None else _STREAM if key in _NORMS else _AXES.get(key.split(".")[-1])
    if key is None or axes is None:
        from insitu.models.spellings import word_instead  # only errors ask for it

        near = word_instead(name) or nearest(name, [*_AXES, *OF_BLOCK])
        raise OptionError(f"No value of a block is called {name!r}{near}.", here())
    return Site(key, axes)


def stream_of(model: LanguageModel) -> str:
    """Returns the standard name of what leaves a block, as methods take it if no site is named.

    That is "residual_out"; where a block normalises the sum, so that nothing in it is the residual
    stream, it is "block_out", the hidden states that a block returns.

    Args:
        model: the model.
    """
    names = ("residual_out", "block_out")
    found: dict[str, int] = {}
    for name in names:
        keys = (f"blocks.{layer}.{name}" for layer in range(len(model.blocks)))
        entries = (entry_of(model.vocabulary, key) for key in keys)
        found[name] = sum(entry is not None and not isinstance(entry, Missing) for entry in entries)
    return "block_out" if found["block_out"] > found["residual_out"] else "residual_out"


def check_positions(model: LanguageModel) -> None:
    """Raises an `OptionError` if positions of a model's blocks are not those of its prompt.

    In a decoder that an encoder's states are given to, they are those of the generated tokens.
    """
    if model.traits.is_encoder_decoder:
        raise OptionError(
            "This is for models whose blocks process the prompt itself: in this one they process "
            "what follows a prompt that an encoder has read, so positions of the prompt are none "
            "of theirs.",
            here(),
        )


def layers_with(
    model: LanguageModel,
    sites: Site | Sequence[Site],
    given: int | Iterable[int] | None,
    stack: str = "blocks",
) -> list[int]:
    """Returns which of some layers have a site: of all, those that do; named ones have to.

    Args:
        model: the model.
        sites: the site; or several: then a layer has to have all of them.
        given: one layer or several, from the end if negative; None for all.
        stack: the list of blocks, by its standard name.

    Raises:
        OptionError: if there is no layer of a number, or it has no such site, or none has.
    """
    keys = [site.key for site in ([sites] if isinstance(sites, Site) else sites)]
    found, why = [], ""
    for layer in chosen("layer", given, len(getattr(model, stack))):
        for key in keys:
            entry = entry_of(model.vocabulary, f"{stack}.{layer}.{key}")
            if entry is None or isinstance(entry, Missing):
                reason = "there is none." if entry is None else entry.reason
                missing = f"Layer {layer} has no `{key}`: {reason}"
                if given is not None:
                    raise OptionError(missing, here())
                why = why or missing
                break
        else:
            found.append(layer)
    if not found:
        raise OptionError(f"No layer has `{'` and `'.join(keys)}`. {why}", here())
    return found


def sites_along(
    names: str | Sequence[str], by: str | Sequence[str], units: Mapping[str, Any]
) -> tuple[tuple[Site, ...], tuple[str, ...]]:
    """Returns some sites, and along which axes there are numbers for each.

    Args:
        names: their standard names.
        by: the axes: "layer", and those that all of the sites have.
        units: what was chosen of other axes, by their names; None if nothing was.

    Raises:
        OptionError: if there is no such site or axis.
    """
    listed = [names] if isinstance(names, str) else list(names)
    if not listed:
        raise OptionError("`sites` is empty: name the values that are to be patched.", here())
    found = tuple(site_of(name) for name in listed)
    along = (by,) if isinstance(by, str) else tuple(by)
    for site in found:
        known = ("layer", *site.axes)
        for name in along:
            if name not in known or along.count(name) > 1:
                what = "twice" if name in known else f"no axis{nearest(name, known)}"
                raise OptionError(
                    f"`by` has {name!r}, which is {what} of {site.name!r}: it has "
                    f"{', '.join(map(repr, known))}.",
                    here(),
                )
    for name, choice in units.items():
        if choice is not None and not all(name in site.axes for site in found):
            raise OptionError(f"`{name}s` are chosen, and {listed} do not all have them.", here())
    return found, along


def chosen(name: str, given: int | Iterable[int] | None, count: int) -> list[int]:
    """Returns which of some layers, heads or positions were meant, counted from 0.

    Args:
        name: what they are, such as "layer".
        given: one or several, from the end if negative; None for all.
        count: how many there are.

    Raises:
        OptionError: if there is none of a number, or none was given.
    """
    numbers = numbers_of(name, given)
    if numbers is None:
        return list(range(count))
    for number in numbers:
        if not -count <= number < count:
            raise OptionError(f"There is no {name} {number}: there are {count}.", here())
    return [number % count for number in numbers]


def numbers_of(name: str, given: int | Iterable[int] | None) -> list[int] | None:
    """Returns the numbers that were given of layers, heads or positions; None if none were.

    They may be numbers of NumPy or torch, or come from something that gives them but once.

    Args:
        name: what they are, such as "layer".
        given: one or several; None for all.

    Raises:
        OptionError: if they are no numbers, or an empty list.
    """
    if given is None:
        return None
    items: Any = given
    if hasattr(items, "tolist"):
        items = items.tolist()
    if isinstance(items, str | bytes | bool) or not isinstance(items, int | Iterable):
        items = [None]  # is refused below
    try:
        numbers = [whole(item) for item in ([items] if isinstance(items, int) else items)]
    except TypeError:
        raise OptionError(
            f"A {name} is given as a number, or several as a list such as `[0, 2]` or "
            f"`range(3)`, not as {given!r}.",
            here(),
        ) from None
    if not numbers:
        raise OptionError(f"No {name} was chosen: name at least one.", here())
    return numbers


def whole(given: Any) -> int:
    """Returns a whole number, also one of NumPy or torch.

    Args:
        given: the number.

    Raises:
        TypeError: if it is none. A truth value is none either: in a list of them it would be of a
            mask, and `index` would make positions 0 and 1 of it.
    """
    if isinstance(given, bool) or getattr(given, "dtype", None) is torch.bool:
        raise TypeError(given)
    return index(given)


def check_count(name: str, given: Any, least: int = 1) -> None:
    """Refuses all but whole numbers from some least one on; `True` is none, though Python's 1.

    Args:
        name: the name of the parameter, such as "batch_size".
        given: what was given.
        least: the least that it may be.

    Raises:
        OptionError: if it is none.
    """
    if type(given) is not int or given < least:
        raise OptionError(f"`{name}` is a whole number from {least} on, not {given!r}.", here())
