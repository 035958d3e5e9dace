"""`ActivationCache`: values of one run, by the keys of their names.

It holds tensors and nothing of the model. Which values there are is chosen in
`insitu.models.selection`.
"""

from __future__ import annotations

import dis
import re
import sys
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch

from insitu.graph.errors import NotCachedError, OperationError, PathError, ShapeError
from insitu.graph.location import here
from insitu.habits import OF_CACHES, habit
from insitu.models.keys import HOOK_PLACES, spelled

if TYPE_CHECKING:
    from insitu.models.transformer_lens import TransformerLens

_UNPACKING = ("UNPACK_SEQUENCE", "UNPACK_EX")  # what Python does in `logits, cache = ...`
_PARTS = {"a": "attn", "m": "mlp"}  # TransformerLens's short forms


class ActivationCache(Mapping[str, torch.Tensor]):
    """What `model.run_with_cache(prompt)` gives: a mapping from keys to tensors.

    Keys are standard names with their place: `cache["blocks.3.attention.z"]`. In short, the name
    and the number of the block: `cache["z", 3]`, also from the end: `cache["z", -1]`. With heads,
    values are `(batch, head, position, d_head)`. By TransformerLens's name,
    `cache["blocks.3.attn.hook_z"]`, they have its order of axes, `(batch, position, head,
    d_head)`.

    Args:
        values: the values by key.
        ids: the token ids of the prompt, `(batch, position)`, None if it was given as embeddings.
        mask: 1 where these hold tokens and 0 where padding, of the same shape; None like `ids`.
        layers: how many blocks the model has.
        aliases: what else the keys are called, with whether the axes of heads and positions are
            the other way round.
        hooks: the names of the model, for errors that say how to keep more. The cache does not
            keep them alive.

    Attributes:
        ids: the token ids of the prompt, `(batch, position)`, None if it was given as embeddings.
        mask: 1 where these hold tokens and 0 where padding, of the same shape; None like `ids`.
            There is padding only where prompts of different length were given together.

    Example:
        >>> from insitu import LanguageModel
        >>> model = LanguageModel("insitu/eiffel")
        >>> cache = model.run_with_cache("The Louvre is in", ["blocks.*.residual_out"])
        >>> cache["residual_out", -1].shape
        torch.Size([1, 4, 128])
        >>> cache.stack("residual_out").shape
        torch.Size([6, 1, 4, 128])
    """

    def __init__(
        self,
        values: Mapping[str, torch.Tensor],
        ids: torch.Tensor | None,
        mask: torch.Tensor,
        layers: int,
        aliases: Mapping[str, tuple[str, bool]],
        hooks: TransformerLens | None = None,
    ) -> None:
        self._values = dict(values)
        self._layers = layers
        self._aliases = aliases
        # Standard names of what was asked for by another name only.
        self._standard = {
            aliases[key][0]: (key, aliases[key][1]) for key in self._values if key in aliases
        }
        self._hooks = None if hooks is None else weakref.ref(hooks)
        self.ids = ids
        self.mask = mask

    @property
    def logits(self) -> torch.Tensor:
        """What the model returned, `(batch, position, vocabulary)`.

        Raises:
            NotCachedError: if they were not asked for: with `names`, "logits" is one of them.
        """
        return self["logits"]

    def stack(self, name: str) -> torch.Tensor:
        """Returns the values of all blocks that have one, from the first to the last.

        Args:
            name: such as "residual_out", or "attention.z" or just "z".

        Returns:
            `(layer, batch, position, d_model)`, or any shape that the values have behind `layer`.

        Raises:
            NotCachedError: if there is none.
            ShapeError: if they are not of one shape.
        """
        keys = [self._found(name, layer) for layer in range(self._layers)]
        values = [self[key] for key in keys if key is not None]
        if not values:
            raise self._lacking(f"blocks.0.{spelled(name) or name}", name)
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1:
            raise ShapeError(
                f"{name!r} has not the same shape in all blocks, but {sorted(shapes)}: take them "
                f"one by one, as in `cache[{name!r}, 0]`.",
                here(),
            )
        return torch.stack(values)

    def __getitem__(self, key: str | tuple[str, int] | tuple[str, int, str]) -> torch.Tensor:
        if isinstance(key, tuple):
            key = self._key(key)
        # The second is for TransformerLens's short name of a value of the model: "embed".
        for one in (key, f"hook_{key}"):
            value = self._values.get(one)
            if value is not None:
                return value
            other, heads_third = self._other(one)
            value = self._values.get(other)
            if value is not None:
                return value.transpose(1, 2) if heads_third else value
        raise self._lacking(key)

    def __contains__(self, key: object) -> bool:
        if isinstance(key, tuple):
            try:
                key = self._key(cast("tuple[Any, ...]", key))
            except NotCachedError:
                return False
        if not isinstance(key, str):
            return False
        names = (key, f"hook_{key}")  # as in `__getitem__`
        return any(one in self._values or self._other(one)[0] in self._values for one in names)

    def __iter__(self) -> Iterator[str]:
        frame = sys._getframe(1)
        if dis.opname[frame.f_code.co_code[frame.f_lasti]] in _UNPACKING:  # else two keys would do
            raise OperationError(
                "A cache is one value, and not the logits and a cache: write "
                "`cache = model.run_with_cache(prompt)`, and `logits = cache.logits`.",
                here(),
            )
        return iter(self._values)

    if not TYPE_CHECKING:  # to checkers, what is not declared is not there

        def __getattr__(self, name: str) -> NoReturn:
            if name.startswith("_"):  # a question of Python's, not of the user's
                raise AttributeError(name)
            own = [each for each in dir(type(self)) if not each.startswith("_")]
            raise PathError(f"A cache has no `{name}`{habit(name, OF_CACHES, own)}.", here())

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_hooks": None}

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        rows, length = self.mask.shape
        size = sum(value.nbytes for value in self._values.values())
        lines = [f"ActivationCache of {rows} x {length} tokens: {len(self)} values, {_bytes(size)}"]
        groups: dict[tuple[str, str], list[int]] = {}
        for key, value in self._values.items():
            layer = re.search(r"\.(\d+)\.", key)
            place = key if layer is None else re.sub(r"\.\d+\.", ".{}.", key, count=1)
            what = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
            groups.setdefault((place, what), []).append(int(layer.group(1)) if layer else -1)
        names = [place.format(_ranges(layers)) for (place, _), layers in groups.items()]
        width = max(map(len, names), default=0)
        for name, (_, what) in zip(names, groups, strict=True):
            lines.append(f"  {name:<{width}}  {what}")
        return "\n".join(lines)

    def _key(self, key: tuple[Any, ...]) -> str:
        """The key that a name and the number of a block are short for.

        As in TransformerLens, the part of the block may follow: `("scale", 0, "ln1")`.
        """
        if len(key) == 1 and key[0] in ("embed", "pos_embed"):  # TransformerLens's, of no block
            return f"hook_{key[0]}"
        name, layer, *part = (*key, None, None)[: max(2, len(key))]
        if not isinstance(name, str) or type(layer) is not int or len(part) > 1:
            raise NotCachedError(
                f"{key!r} is no name with the number of a block, as in `cache['z', 3]`.", here(3)
            )
        if not -self._layers <= layer < self._layers:
            raise NotCachedError(
                f"There is no block {layer}: the model has {self._layers}, 0 to "
                f"{self._layers - 1}.",
                here(3),
            )
        layer %= self._layers
        if part:
            return f"blocks.{layer}.{_PARTS.get(str(part[0]), part[0])}.hook_{name}"
        found = self._found(name, layer)
        if found is None:
            raise self._lacking(f"blocks.{layer}.{spelled(name) or name}", name)
        return found

    def _other(self, key: str) -> tuple[str, bool]:
        """What else a key is called, and whether heads and positions are the other way round."""
        return self._aliases.get(key) or self._standard.get(key, ("", False))

    def _found(self, name: str, layer: int) -> str | None:
        """The key of a value of a block, by its name in short.

        A standard name means its own value and axes, also where another name has asked for it.
        """
        standard = spelled(name)
        if standard is not None:
            key = f"blocks.{layer}.{standard}"
            return key if key in self else None
        keys = [f"blocks.{layer}.{place}{name}" for place in HOOK_PLACES]
        return next((key for key in keys if key in self), None)

    def _lacking(self, key: str, name: str | None = None) -> NotCachedError:
        from insitu.models.lacking import why_lacking

        there = [*self._values, *(one for one, (of, _) in self._aliases.items() if of in self)]
        hooks = None if self._hooks is None else self._hooks()
        why = why_lacking(key, name, there, self._aliases, self._layers, hooks)
        return NotCachedError(f"{why} `print(cache)` lists the values that it holds.", here(3))


def _bytes(size: int) -> str:
    power = 0
    while power < 4 and size >= 1000 ** (power + 1):
        power += 1
    return f"{size / 1000**power:.3g} {('bytes', 'KB', 'MB', 'GB', 'TB')[power]}"


def _ranges(numbers: list[int]) -> str:
    """Such as "0-5" or "0-2,4"."""
    parts: list[list[Any]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
