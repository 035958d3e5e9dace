"""`join` and `split`: one job made of several, and the results of each.

Blocks that run alike become one, with the prompts and the lines of all of them, so that they share
passes. Other blocks stay what they are. No job sees anything of another: each has its own
invocations, its own names and its own failures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, cast

import torch

from insitu.engine.fingerprint import other_habits, other_structure, other_weights
from insitu.engine.job import Job
from insitu.engine.job_outcome import Failure, Outputs
from insitu.engine.job_parts import (
    Demanded,
    JobBlock,
    JobModel,
    JobPart,
    JobPrompt,
    Share,
    earlier_of,
)
from insitu.engine.partial_blocks import with_earlier
from insitu.engine.results import Results
from insitu.graph.errors import JobError
from insitu.graph.location import here
from insitu.graph.node import Address, Graph
from insitu.graph.operations import KEEP, READ, SAVE
from insitu.graph.renumbering import add_nodes
from insitu.graph.save_names import LONGEST_NAME


def join(jobs: Sequence[Job]) -> Job:
    """Makes one job of several, for the same model. `split` gives each its own results.

    Blocks of different jobs that run alike (traces, or generations, with the same options) become
    one block, whose prompts share passes. How many tokens a prompt may get is its own.

    Args:
        jobs: the jobs. One that fails, fails alone.

    Raises:
        JobError: if two are for different models, saying what differs; if one is made of several
            jobs itself; or if the lines of one name invocations that it does not have.

    Example:
        `first, second = split(joined, model.run(joined, raises=False))`, with
        `joined = join([one, two])`.
    """
    if not jobs:
        raise JobError("There is no job to join.", here())
    model = _model_of(jobs)
    blocks: list[_Joined] = []
    parts: list[JobPart] = []
    for number, job in enumerate(jobs):
        # Results are split by one level of jobs: jobs in jobs would come back as one.
        if job.parts:
            raise JobError(
                f"Job {number} is made of several jobs: join all of them at once.", here()
            )
        _check(number, job)
        shares: list[Share] = []
        moved: list[Mapping[int, int]] = []
        names: dict[str, str] = {}
        at = -1
        for block in job.blocks:
            like = (n for n in range(at + 1, len(blocks)) if blocks[n].is_like(block))
            at = next(like, len(blocks))
            if at == len(blocks):
                blocks.append(_Joined(block))
            own = _named(number, block, names)
            share, nodes = blocks[at].add(at, block, own, shares, moved)
            shares.append(share)
            moved.append(nodes)
        parts.append(JobPart(shares, names))
    return Job(model, [block.made() for block in blocks], parts)


def split(job: Job, results: Results) -> list[Results]:
    """Returns the results of each of the jobs that a job is made of.

    Args:
        job: what `join` gave.
        results: what running it gave: `model.run(job, raises=False)`.

    Raises:
        JobError: if the job is not made of several, or the results are of another.
    """
    if not job.parts:
        raise JobError("This job is not made of several: `join` makes one that is.", here())
    if len(results.outputs) != len(job.blocks):
        raise JobError("These are not the results of this job.", here())
    return [_results_of(number, part, results) for number, part in enumerate(job.parts)]


@dataclass(slots=True, eq=False)
class _Joined:
    """A block that is made of blocks of several jobs.

    Attributes:
        first: the first of them.
        prompts: the prompts of all.
        graph: the lines of all.
        saves: the name of each saved value, by the node that saves it.
        demanded: options that values take, with the prompts that have them.
        steps: how many tokens a prompt may get at most, where all of them say so.
    """

    first: JobBlock
    prompts: list[JobPrompt] = field(default_factory=list[JobPrompt])
    graph: Graph = field(default_factory=lambda: Graph([]))
    saves: dict[int, str] = field(default_factory=dict[int, str])
    demanded: Demanded | None = None
    steps: int = 0

    def is_like(self, block: JobBlock) -> bool:
        """Whether a block of another job can be a part of this one."""
        first = self.first
        demanded, wanted = self.demanded, block.demanded
        return (
            block.procedure == first.procedure
            and block.casts == first.casts
            and block.dtype == first.dtype
            and not block.options.get("return_dict_in_generate")  # which has one prompt a block
            and _alike(_common(block), _common(first))
            and (demanded is None or wanted is None or demanded.options == wanted.options)
        )

    def add(
        self,
        at: int,
        block: JobBlock,
        names: Mapping[int, str],
        shares: Sequence[Share],
        moved: Sequence[Mapping[int, int]],
    ) -> tuple[Share, Mapping[int, int]]:
        """Adds a block of a job, and returns its share and the new index of each of its nodes."""
        first, start = len(self.prompts), len(self.graph)
        count = len(block.prompts)
        numbers = {number: first + number for number in range(count)}
        blocks = [share.block for share in shares]
        graph = with_earlier(block.graph, blocks, moved)
        nodes = add_nodes(self.graph, graph, range(len(graph)), numbers)
        if not graph.scopes and count == 1 and len(graph):  # a failing line is of its prompt
            self.graph.scopes = [*self.graph.scopes, (first, start, start + len(graph))]
        steps = _steps(block)
        self.steps = max(self.steps, steps or 0)
        for prompt in block.prompts:
            self.prompts.append(
                # The block runs as long as its longest prompt, so each keeps how many tokens it may
                # get itself.
                prompt if steps is None else replace(prompt, steps=prompt.steps or steps)
            )
        self.saves |= {nodes[index]: name for index, name in names.items()}
        if block.demanded is not None:
            options, mark, prompts = block.demanded
            before = [] if self.demanded is None else [*self.demanded.prompts]
            mark = mark if self.demanded is None else self.demanded.mark
            self.demanded = Demanded(options, mark, before + [numbers[one] for one in prompts])
        return Share(at, first, count, start, len(graph)), nodes

    def made(self) -> JobBlock:
        """Returns the block."""
        options = dict(self.first.options)
        if self.steps:
            options["max_new_tokens"] = self.steps
        return replace(
            self.first,
            options=options,
            prompts=self.prompts,
            graph=self.graph,
            saves=self.saves,
            demanded=self.demanded,
        )


def _steps(block: JobBlock) -> int | None:
    """How many tokens each prompt of a block may get, where that is its own option."""
    steps = block.options.get("max_new_tokens")
    own = block.procedure == "generate" and isinstance(steps, int)
    return steps if own and not isinstance(steps, bool) else None


def _common(block: JobBlock) -> Mapping[str, Any]:
    """The options that have to be the same for all prompts of a block."""
    steps = _steps(block)
    if steps is None:
        return block.options
    return {name: one for name, one in block.options.items() if name != "max_new_tokens"} | {
        "max_new_tokens": None
    }


def _alike(one: Any, other: Any) -> bool:
    """Whether two options are the same."""
    same_kind: bool = type(one) is type(other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        first, second = cast("Mapping[Any, Any]", one), cast("Mapping[Any, Any]", other)
        return first.keys() == second.keys() and all(_alike(first[k], second[k]) for k in first)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        items = cast("Sequence[Any]", one), cast("Sequence[Any]", other)
        return len(items[0]) == len(items[1]) and all(map(_alike, *items))
    if one is other:
        return True
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return False
    return same_kind and bool(one == other)


def _model_of(jobs: Sequence[Job]) -> JobModel:
    """The model of some jobs, as the one says that knows the most of it."""
    first = jobs[0].model
    for number, job in enumerate(jobs[1:], 1):
        model = job.model
        different = other_structure(first.fingerprint, model.fingerprint)
        different += other_weights(first.fingerprint, model.fingerprint)
        different += other_habits(first.fingerprint, model.fingerprint, ())
        if [*first.edits] != [*model.edits]:
            different.append("it has other edits")
        for what in ("name", "revision"):
            one, other = getattr(first, what), getattr(model, what)
            if one and other and one != other:
                different.append(f"its {what} is {other!r:.200}, and not {one!r:.200}")
        if different:
            raise JobError(
                f"Jobs 0 and {number} are for different models, so that they cannot be joined. "
                f"Of the model of job {number}: {'; '.join(different)}.",
                here(),
            )
        known = bool(model.fingerprint.dtypes) + (model.fingerprint.generation is not None)
        least = bool(first.fingerprint.dtypes) + (first.fingerprint.generation is not None)
        if known > least or (known == least and model.revision and not first.revision):
            first = model
    return first


def _check(number: int, job: Job) -> None:
    """Raises if the lines of a job name invocations that are not its own."""
    for at, block in enumerate(job.blocks):
        count = len(block.prompts)
        reads = [cast(Address, row[1])[0] for row in block.graph.rows if row[0] is READ]
        demanded = [] if block.demanded is None else [*block.demanded.prompts]
        named = [*reads, *(scope[0] for scope in block.graph.scopes), *demanded]
        wrong = next((one for one in named if not 0 <= one < count), None)
        if wrong is not None:
            raise JobError(
                f"Job {number} names invocation {wrong} of its block {at}, which has {count}.",
                here(),
            )
        for row in block.graph.rows:
            for item in earlier_of(row):
                kept = job.blocks[item.block].graph.rows if 0 <= item.block < at else []
                if not 0 <= item.node < len(kept) or kept[item.node][0] not in (SAVE, KEEP):
                    raise JobError(
                        f"Job {number} uses a value in its block {at} that no block before it "
                        "saves.",
                        here(),
                    )


def _named(number: int, block: JobBlock, names: dict[str, str]) -> dict[int, str]:
    """The names of a block's saved values among those of other jobs, by the node.

    Args:
        number: the number of the job.
        block: the block.
        names: the name that each has in its own job, by its name here; they are added.
    """
    found: dict[int, str] = {}
    for index, name in block.saves.items():
        joined, more = f"{number}/{name}"[:LONGEST_NAME], count(len(names))
        while joined in names:  # longer ones may begin alike, or be named like this
            joined = f"{joined[: LONGEST_NAME - 8]}{next(more):08}"
        names[joined] = name
        found[index] = joined
    return found


def without_sharing(job: Job) -> Job:
    """Returns a job whose prompts share no prefixes with others.

    Args:
        job: the job.
    """
    blocks: list[JobBlock] = []
    for block in job.blocks:
        shares = block.procedure == "trace" and any(
            prompt.ids is not None for prompt in block.prompts
        )
        options = {**block.options, "share_prefixes": False} if shares else block.options
        blocks.append(replace(block, options=options))
    return replace(job, blocks=blocks)


def _results_of(number: int, part: JobPart, results: Results) -> Results:
    """The results of one of several jobs."""
    values = {own: results[name] for name, own in part.names.items() if name in results}
    about = {own: results.about[name] for name, own in part.names.items()}
    outputs = [_outputs_of(number, share, results.outputs[share.block]) for share in part.shares]
    failed = [_failure_of(one, part) for one in results.failed if one.part == number]
    return Results(values, about, outputs, results.differences, failed)


def _outputs_of(number: int, share: Share, outputs: Outputs | None) -> Outputs | None:
    """What the generation of a block of one of several jobs returned."""
    if outputs is None:
        return None
    each = outputs.each[share.first : share.first + share.count]
    return Outputs(outputs.parts.get(number), each)


def _failure_of(failure: Failure, part: JobPart) -> Failure:
    """A failure with the numbers and names of its own job."""
    at = next(at for at, share in enumerate(part.shares) if share.block == failure.block)
    first = part.shares[at].first
    invocations = [one - first for one in failure.invocations]
    return Failure(at, invocations, [part.names[name] for name in failure.names], failure.error)
