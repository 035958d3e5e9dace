"""What kind of block a block is: two of one kind have their values in the same places.

A kind is told by the classes of a block's modules, by the functions that their forwards call and
by the places of the values that were found. How wide it is does not count.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import nn

from insitu.engine.dataflow import Dataflow
from insitu.models.parts import Block, Spot

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_DIGEST = 16


def signatures(
    blocks: Mapping[str, Block], flow: Dataflow, modules: Mapping[str, nn.Module]
) -> dict[str, str]:
    """Returns the kind of each block, by path.

    Args:
        blocks: what was found of the blocks.
        flow: the dataflow that it was found in.
        modules: the model's tree, by path.
    """
    traits: dict[str, set[str]] = {path: set() for path in blocks}
    for index, event in enumerate(flow.events):
        path = _block_around(event.path, blocks)
        if index in flow.casts:  # what runs in 16 bits is of the kind that it is of in 32
            continue
        if path is not None and not (event.function == "to" and event.call < 0):
            traits[path].add(f"{_within(event.path, path)}>{event.function}")
    for place, module in modules.items():
        path = _block_around(place, blocks)
        if path is not None:
            kind = type(module)
            traits[path].add(f"{_within(place, path)}:{kind.__module__}.{kind.__qualname__}")
    return {
        path: _digest([*sorted(traits[path]), _places(block, path)])
        for path, block in blocks.items()
    }


def tree_signature(modules: Mapping[str, nn.Module]) -> str:
    """Returns what kind of tree a model's modules are, however deep it is.

    Args:
        modules: the tree, by path.
    """
    kinds = {
        f"{_NUMBER.sub('.#', f'.{path}')}:{type(module).__module__}.{type(module).__qualname__}"
        for path, module in modules.items()
    }
    return _digest(sorted(kinds))


def _block_around(path: str, blocks: Mapping[str, Block]) -> str | None:
    if path in blocks:
        return path
    parts = path.split(".")
    for count in range(len(parts) - 1, 0, -1):
        block = ".".join(parts[:count])
        if block in blocks:
            return block
    return None


def _within(path: str, block: str) -> str:
    return _NUMBER.sub(".#", path.removeprefix(block))


def _places(part: Any, block: str) -> str:
    """What was found of a block, without sizes."""
    if isinstance(part, Spot):
        inside = part.path.removeprefix(block)
        # What several blocks share stands in the first of them: which call it is depends on depth.
        shared = inside == part.path
        place = f"{_NUMBER.sub('.#', inside)}:*" if shared else f"{inside}:{part.call}"
        return f"{place}:{part.kind}:{part.item}:{len(part.shape)}"
    if is_dataclass(part):
        return "|".join(
            f"{field.name}={_places(getattr(part, field.name), block)}"
            for field in fields(part)
            if field.name not in ("width", "count", "size", "refused")
        )
    if isinstance(part, Mapping):
        items = sorted((str(key), _places(value, block)) for key, value in part.items())
        return ",".join(f"{key}:{value}" for key, value in items)
    if isinstance(part, frozenset):
        return ",".join(sorted(map(str, part)))
    if isinstance(part, list | tuple):
        return ",".join(_places(value, block) for value in part)
    inside = str(part).removeprefix(block)
    return inside if inside != str(part) else _NUMBER.sub(".#", inside)


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:_DIGEST]
