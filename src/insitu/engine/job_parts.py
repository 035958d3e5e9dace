"""What a job is made of, as plain data: its model, its blocks and their prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import torch

from insitu.engine.fingerprint import Digest, Fingerprint, Text
from insitu.graph.context import NO_CASTS, Casts
from insitu.graph.location import Location, Mark
from insitu.graph.node import Earlier, Graph, Row
from insitu.graph.save_names import LONGEST_NAME
from insitu.graph.structure import map_structure
from insitu.graph.wire_message import Index

MOST_BLOCKS = 10_000
"""How many blocks a job that is read may have."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=LONGEST_NAME)]
"""The name of a saved value, an option or an argument."""

ProcedureName = Literal["trace", "generate"]
"""What the ways to run a model are called in a job."""


@dataclass(frozen=True, slots=True, eq=False)
class JobPrompt:
    """What one invocation of a job is given.

    Attributes:
        ids: token ids `(rows, position)`, int64; None for a module that takes no prompts, and for
            a prompt that was given as embeddings.
        mask: 1 for tokens and 0 for padding, of the same shape; None if there is no padding.
        args: positional arguments of the forward, of a module that takes no prompts.
        kwargs: what goes with the prompt by keyword, such as what a processor made of an image;
            of a module that takes no prompts, keyword arguments of the forward.
        seed: where the sampling of this invocation starts, or None.
        mark: the user's line, None where it is not known.
        steps: how many tokens this invocation is to get at most, where it has a number of its own.
        padded: on which side shorter prompts of a list were padded when it was recorded, None if
            they were not, or by the user. The model that runs it has to pad on the same side.
    """

    ids: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    seed: int | None = None
    mark: Mark | None = None
    steps: int | None = None
    padded: Literal["left", "right"] | None = None

    @property
    def location(self) -> Location | None:
        """The user's line."""
        return None if self.mark is None else Location(*self.mark)


class Demanded(NamedTuple):
    """Options that a value of a block takes to be there, such as eager attention.

    Attributes:
        options: the options.
        mark: the line that reads the value.
        prompts: the numbers of the prompts that are processed with them.
    """

    options: Mapping[str, Any]
    mark: Mark
    prompts: Sequence[int]


@dataclass(frozen=True, slots=True, eq=False)
class JobBlock:
    """One block of a job: one run of the model, in as many passes as it takes.

    Attributes:
        procedure: how the model runs.
        options: the options of that, such as `max_new_tokens`.
        prompts: what its invocations are given.
        graph: what was recorded.
        saves: the name of each saved value, by the node that saves it. A value that is saved for
            later blocks only has none.
        demanded: options that its values take, None if there are none.
        casts: the dtype of autocast on each kind of device on which the block began with it.
        dtype: the default dtype that it began with.
    """

    procedure: ProcedureName
    options: Mapping[str, Any]
    prompts: Sequence[JobPrompt]
    graph: Graph
    saves: Mapping[int, str]
    demanded: Demanded | None = None
    casts: Casts = field(default_factory=lambda: NO_CASTS)
    dtype: torch.dtype = torch.float32


class JobModel(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """Which model a job was made for, in the form in which it travels.

    Attributes:
        name: its repo id, or the name of its folder without the folders around it; "" if it was
            made in memory.
        revision: the commit that it was loaded from, "" if that is not known.
        edits: a digest of each edit that was in force. The lines of edits are in the graphs.
        fingerprint: what it has to be like.
    """

    name: Text
    revision: Text
    edits: Sequence[Digest]
    fingerprint: Fingerprint


class Share(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """What of a block of a joined job is of one of the jobs, in the form in which it travels.

    Attributes:
        block: the number of the block in the joined job.
        first: its first invocation there.
        count: how many invocations it has.
        start: its first node there.
        size: how many nodes it has.
    """

    block: Index
    first: Index
    count: Index
    start: Index
    size: Index


class JobPart(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True, eq=False):
    """One of the jobs that a joined job is made of, in the form in which it travels.

    Attributes:
        shares: where each of its blocks is.
        names: the name that each of its saved values has in it, by the name in the joined job.
    """

    shares: Annotated[Sequence[Share], msgspec.Meta(max_length=MOST_BLOCKS)]
    names: Mapping[Name, Name]


def earlier_of(row: Row) -> list[Earlier]:
    """Returns the values of earlier blocks among the arguments of a node.

    Args:
        row: the node.
    """
    found: list[Earlier] = []

    def leaf(item: Any) -> None:
        if type(item) is Earlier:
            found.append(item)

    if row[4]:
        map_structure(leaf, (row[1], dict(row[2])))
    return found
