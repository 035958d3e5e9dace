"""`Job`: an experiment that travels whole, as plain data.

A job holds everything that a run needs: which model, the blocks with their procedures, options and
prompts, what was recorded in them, and the names of the values that are saved. A block of one's
own is one (`tracer.job`), and so are the blocks of a session (`session.job`). `model.run(job)`
runs it, `model.check(job)` says what that would take, and `job_wire.py` makes bytes of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from insitu.graph.context import NO_CASTS, Casts
from insitu.graph.expression import expression
from insitu.graph.location import Location, Mark
from insitu.graph.node import Graph
from insitu.runtime.fingerprint import Fingerprint

ProcedureName = Literal["trace", "generate"]


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
    """

    ids: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    seed: int | None = None
    mark: Mark | None = None

    @property
    def location(self) -> Location | None:
        """The user's line."""
        return None if self.mark is None else Location(*self.mark)


class Demanded(NamedTuple):
    """Options that a value of a block takes to be there, such as eager attention.

    Attributes:
        options: the options, which are among those of the block too.
        mark: the line that reads the value.
    """

    options: Mapping[str, Any]
    mark: Mark


@dataclass(frozen=True, slots=True, eq=False)
class JobBlock:
    """One block of a job: one run of the model, in as many passes as it takes.

    Attributes:
        procedure: how the model runs.
        options: the options of that, such as `max_new_tokens`.
        prompts: what its invocations are given.
        graph: what was recorded.
        saves: the name of each saved value, by the node that saves it. What is saved for later
            blocks only has none.
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


@dataclass(frozen=True, slots=True)
class JobModel:
    """Which model a job was made for.

    Attributes:
        name: its repo id, or the name of its folder without the folders around it; "" if it was
            made in memory.
        revision: the commit that it was loaded from, "" if that is not known.
        edits: a digest of each edit that was in force. The lines of edits are in the graphs.
        fingerprint: what it has to be like.
    """

    name: str
    revision: str
    edits: Sequence[str]
    fingerprint: Fingerprint


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Job:
    """An experiment that travels whole.

    Jobs come from blocks: `tracer.job`, `session.job`, or a block of `model.scan(...)`, which runs
    nothing and loads no weights. `model.run(job)` gives `Results`, and `model.check(job)` says
    beforehand what they will be and what they cost.

    Attributes:
        model: which model it is for.
        blocks: its blocks, in their order. Later ones may use values of earlier ones.

    Example:
        >>> from insitu import Job, LanguageModel
        >>> model = LanguageModel("insitu/eiffel")
        >>> with model.scan("The Eiffel Tower is in the city of") as tracer:
        ...     logits = model.lm_head.output[0, -1].save("logits")
        >>> data = tracer.job.to_bytes()
        >>> results = model.run(Job.from_bytes(data))
        >>> model.tokenizer.decode(results["logits"].argmax())
        ' Paris'
    """

    model: JobModel
    blocks: Sequence[JobBlock]

    @property
    def saves(self) -> Mapping[str, str]:
        """What each saved value is, by its name: the expression that it was saved of."""
        return {
            name: expression(block.graph, block.graph.rows[index][3][0])
            for block in self.blocks
            for index, name in block.saves.items()
        }

    def to_bytes(self, without: Collection[str] = ()) -> bytes:
        """Returns the job as bytes, for `from_bytes` in another process.

        Tensors are copied as they are now. The user's lines go with it, each with its text and the
        name of its file without the folders, so that errors over there name them.

        Args:
            without: the digests of tensors that the reader has already: see `tensors`.

        Raises:
            WireError: if it holds what cannot travel, such as a function or a tensor that requires
                grad, naming it and the line.
        """
        from insitu.runtime.job_wire import to_bytes

        return to_bytes(self, without)

    @classmethod
    def from_bytes(cls, data: bytes, tensors: Mapping[str, torch.Tensor] | None = None) -> Job:
        """Returns the job that `to_bytes` made bytes of.

        It is safe to read bytes from anybody: nothing in them is evaluated, imported or unpickled.

        Args:
            data: the bytes.
            tensors: tensors that are not among them, by digest.

        Raises:
            WireError: if they are no job, one of another version of Insitu, or one that takes
                tensors that are not there.
        """
        from insitu.runtime.job_wire import from_bytes

        return from_bytes(data, tensors or {})

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Every tensor that travels with it, by a digest of its dtype, shape and content.

        Images, vectors and the weights of encoders are among them. What the reader has already
        need not be sent again: `job.to_bytes(without=digests)`.

        Raises:
            WireError: if the job holds what cannot travel.
        """
        from insitu.runtime.job_wire import tensors_of

        return tensors_of(self)

    def __repr__(self) -> str:
        prompts = sum(len(block.prompts) for block in self.blocks)
        nodes = sum(len(block.graph) for block in self.blocks)
        counted = [
            (len(self.blocks), "block"),
            (prompts, "prompt"),
            (nodes, "node"),
            (len(self.saves), "saved value"),
        ]
        listed = ", ".join(f"{count} {noun}{'s' * (count != 1)}" for count, noun in counted)
        kind, name = self.model.fingerprint.kind, self.model.name
        return f"Job({kind}{f' {name!r}' if name else ''}: {listed})"
