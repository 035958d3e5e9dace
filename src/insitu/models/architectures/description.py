"""Descriptions of architectures where the dataflow of a forward does not tell.

Most need nothing. A description names places in a block as one would write them behind the block's
handle: `mlp.down.output`, `attn.output[0]`, `ops.add[1].output`, `attn.ops.softmax[0].input`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast

from insitu.engine.dataflow import Dataflow
from insitu.graph.node import SEPARATOR, Kind
from insitu.models.parts import Block, Spot

_ADDED = ("attention_out", "cross_attention_out", "mlp_out", "mixer_out", "extra_out")
_STREAM = ("residual_in", "residual_mid", "residual_out")
_PLACE = re.compile(
    r"(?P<path>[\w.]*?)\.?(?:ops\.(?P<function>\w+)\[(?P<call>\d+)\]\.)?"
    r"(?P<kind>output|input)(?:\[(?P<item>\d+)\])?"
)


@dataclass(frozen=True, slots=True)
class Description:
    """A description of the blocks of an architecture.

    Attributes:
        begins: the module in a block whose output is where the residual stream begins, in those
            blocks that have it; None where it begins with what a block is given.
        names: where values stand, by the standard names of a block: of the residual stream, and of
            the values added to it. Findings of the dataflow give way to this.

    Raises:
        ValueError: if a name is none of these, or a place cannot be read.

    Example:
        >>> from insitu.models.architectures import Description
        >>> Description(names={"attention_out": "mixer.output[0]"})
        Description(begins=None, names={'attention_out': 'mixer.output[0]'})
    """

    begins: str | None = None
    names: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        for name, place in self.names.items():
            if name not in (*_STREAM, *_ADDED):
                known = ", ".join((*_STREAM, *_ADDED))
                raise ValueError(f"{name!r} is no value of a block that can be described: {known}.")
            if _PLACE.fullmatch(place) is None:
                raise ValueError(
                    f"{place!r} is no place in a block: write 'path.output', 'path.input', or "
                    "'path.ops.function[0].output', with an index behind it for a part of a tuple."
                )

    def applied(self, block: Block, flow: Dataflow) -> Block:
        """Returns what a block consists of, by its description.

        Args:
            block: what was found of it.
            flow: the dataflow of a forward.
        """
        spots = {name: _spot(block.path, place, flow) for name, place in self.names.items()}
        found = {name: spot for name, spot in spots.items() if spot is not None}
        stream = {**block.stream, **{name: found[name] for name in _STREAM if name in found}}
        added = {**block.added, **{name: found[name] for name in _ADDED if name in found}}
        ordered = {name: stream[name] for name in _STREAM if name in stream}
        return replace(block, stream=ordered, added=added)


def _spot(block: str, place: str, flow: Dataflow) -> Spot | None:
    """The site at a place in a block, None if nothing came there."""
    match = _PLACE.fullmatch(place)
    assert match is not None
    path = f"{block}.{match['path']}".removesuffix(".")
    function, call = match["function"] or "", int(match["call"] or 0)
    item = () if match["item"] is None else (int(match["item"]),)
    for event in flow.events:
        if (event.path, event.function, event.call) == (path, function, call):
            values = event.outputs if match["kind"] == "output" else event.inputs
            site = f"{path}{SEPARATOR}{function}" if function else path
            shape = flow.shapes[values[item[0] if item else 0]]
            return Spot(site, cast("Kind", match["kind"]), call, item, shape)
    return None
