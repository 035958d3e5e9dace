"""`Job`: an experiment that travels whole, as plain data.

A job holds everything that a run needs: which model, the blocks with their procedures, options and
prompts, what was recorded in them, and the names of the values that are saved. A block of one's
own is one (`tracer.job`), and so are the blocks of a session (`session.job`). `model.run(job)`
runs it, `model.check(job)` says what that would take, and `job_wire.py` makes bytes of it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from insitu import disk
from insitu.engine.job_parts import JobBlock, JobModel, JobPart
from insitu.engine.limits import Limits
from insitu.graph.expression import expression


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Job:
    """An experiment that travels whole.

    Jobs come from blocks: `tracer.job`, `session.job`, or a block of `model.scan(...)`, which runs
    nothing and loads no weights. `model.run(job)` gives `Results`, and `model.check(job)` says
    beforehand what they will be and what they cost.

    Attributes:
        model: which model it is for.
        blocks: its blocks, in their order. Later ones may use values of earlier ones.
        parts: the jobs that it is made of, if `join` has made it.
        leaves: of a job that was read, the tensors that are trained where it was recorded. What a
            run adds to their `.grad` is for there: see `to_bytes`.

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
    parts: Sequence[JobPart] = ()
    leaves: Sequence[torch.Tensor] = ()

    @property
    def saves(self) -> Mapping[str, str]:
        """What each saved value is, by its name: the expression that it was saved of."""
        return {
            name: expression(block.graph, block.graph.rows[index][3][0])
            for block in self.blocks
            for index, name in block.saves.items()
        }

    def to_bytes(self, without: Collection[str] = (), *, trains: bool = False) -> bytes:
        """Returns the job as bytes, for `from_bytes` in another process.

        Tensors are copied as they are now. The user's lines go with it, each with its text and the
        name of its file without the folders, so that errors over there name them.

        Args:
            without: the digests of tensors that the reader has already: see `tensors`.
            trains: whether tensors that require grad may travel. They are leaves over there,
                `job.leaves`, in the order in which `trained` has them here.

        Raises:
            WireError: if it holds what cannot travel, such as a function or, unless it `trains`, a
                tensor that requires grad, naming it and the line.
        """
        from insitu.engine.job_wire import to_bytes

        return to_bytes(self.model, self.blocks, without, self.parts, trains)

    @classmethod
    def from_bytes(
        cls,
        data: bytes,
        tensors: Mapping[str, torch.Tensor] | None = None,
        *,
        limits: Limits | None = None,
        device: torch.device | None = None,
    ) -> Job:
        """Returns the job that `to_bytes` made bytes of.

        It is safe to read bytes from anybody: nothing in them is evaluated, imported or unpickled.

        Args:
            data: the bytes.
            tensors: tensors that are not among them, by digest.
            limits: how many bytes, nodes and sites it may have. Rows that are too many are not
                even read. Its other limits are those of `model.check` and `model.run`.
            device: the device that its tensors are put on; None for those that they were on, as
                far as this machine has them.

        Raises:
            LimitError: if it has more.
            WireError: if they are no job, one of another version of Insitu, or one that takes
                tensors that are not there.
        """
        from insitu.engine.job_wire import from_bytes

        return cls(*from_bytes(data, tensors or {}, limits or Limits(), device))

    def save(self, path: str | os.PathLike[str], without: Collection[str] = ()) -> None:
        """Writes the job to a file, whole or not at all.

        Args:
            path: the file.
            without: as of `to_bytes`.

        Raises:
            WireError: if it holds what cannot travel.
            OptionError: if there is no such folder.
            SaveError: if the file cannot be written.
        """
        disk.write(path, self.to_bytes(without))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        tensors: Mapping[str, torch.Tensor] | None = None,
        *,
        limits: Limits | None = None,
    ) -> Job:
        """Returns the job in a file. Files from anybody can be read.

        Args:
            path: a file that `save` has written.
            tensors: as of `from_bytes`.
            limits: as of `from_bytes`.

        Raises:
            LoadError: if the file cannot be read.
            WireError: if it holds no job that can be read.
        """
        return cls.from_bytes(disk.read(path), tensors, limits=limits)

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Every tensor that travels with it, by a digest of its dtype, shape and content.

        Images, vectors and the weights of encoders are among them. What the reader has already
        need not be sent again: `job.to_bytes(without=digests)`.

        Raises:
            WireError: if the job holds what cannot travel.
        """
        from insitu.engine.job_wire import tensors_of

        return tensors_of(self.blocks)[0]

    @property
    def trained(self) -> Sequence[torch.Tensor]:
        """The tensors in it that require grad, in the order in which `leaves` has them elsewhere.

        Raises:
            WireError: if the job holds what cannot travel.
        """
        from insitu.engine.job_wire import tensors_of

        return tensors_of(self.blocks, trains=True)[1]

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
