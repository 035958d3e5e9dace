"""Blocks whose model is somewhere else: they are sent as a job, and its results are theirs.

A fault of the run is found there, and raised here, at the line that was recorded here.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from insitu.engine.failures import error_of
from insitu.engine.seams import seams
from insitu.graph.autograd_history import computed_of
from insitu.graph.cells import Missing
from insitu.graph.errors import InsituError, OptionError
from insitu.graph.location import here
from insitu.graph.user_warnings import warn_user
from insitu.tracing.absent_weights import check_weights
from insitu.tracing.job_running import NAMED
from insitu.tracing.jobs import job_of

if TYPE_CHECKING:
    from insitu.batching.procedure import Subject
    from insitu.engine.job import Job
    from insitu.engine.job_outcome import Outputs
    from insitu.engine.results import Results
    from insitu.tracing.run import RecordedBlock


LARGE_BYTES = 100 * 10**6
"""How many bytes of a result take so long to come that somebody is told before."""

_NUMBER_BYTES = 4


class Away(Protocol):
    """Where the jobs of a model are run, if not here."""

    def run(self, job: Job) -> Results:
        """Runs a job, and returns its results.

        What its invocations raise is in the results. All errors are about lines of the job as it
        was recorded here.

        Raises:
            InsituError: if something is wrong with all of it.
        """
        ...

    def send(self, job: Job) -> Any:
        """Sends a job, and returns what its results can be had from later."""
        ...


class Came(NamedTuple):
    """What has come of blocks that were run somewhere else.

    Attributes:
        outputs: what the generation of each returned, None for a trace.
        failed: what the first invocation that failed has raised, None if none has.
    """

    outputs: Sequence[Outputs | None]
    failed: InsituError | None


def run_away(model: Subject, blocks: Sequence[RecordedBlock], away: Away) -> Came:
    """Runs blocks somewhere else, and fills their saved values.

    Args:
        model: their model, which need not have its weights here.
        blocks: the blocks of one job.
        away: where they are run.

    Raises:
        InsituError: if something is wrong with all of it, at the line that was recorded here.
    """
    around = seams.get()
    if around is not None and around.sink is not None:
        raise OptionError(
            "`saving_to` takes what runs of this process save: what a server gives comes all at "
            "once, when its run has ended.",
            here(),
        )
    job = job_of(model, blocks, renames=True)
    check_sent(model, job)
    results = away.run(job)
    _warn_of_another_model(results.differences)
    for block, sent in zip(blocks, job.blocks, strict=True):
        saves = block.recording.saves
        for index, name in sent.saves.items():
            saves[index]._put(results[name] if name in results else _missing(name, results))
    return Came(results.outputs, error_of(results.failed) if results.failed else None)


def _warn_of_another_model(differences: Sequence[str]) -> None:
    """Warns of what makes the values of a server's model others than those of the one here."""
    found = [what for what in differences if not what.startswith((*NAMED.values(),))]
    if found:
        warn_user(
            f"The model of the server is not as the one here: {'; '.join(found)}. The server has "
            "run its own. Defaults of generations can be given to the block, such as "
            "`eos_token_id=...`.",
        )


def check_sent(model: Subject, job: Job) -> None:
    """Looks at a job before it is sent, for what would be wrong here, or take long to come.

    Args:
        model: the model, as it is here.
        job: the job.

    Raises:
        OptionError: if the job would give the model's weights here gradients.
        LoadError: if it takes values of weights from here, and they are on the server.
    """
    if not model.loaded:
        check_weights(model.snapshot.root, job)
    else:
        own = {id(one) for one in model.snapshot.root.parameters() if one.requires_grad}
        trained = job.trained if own else ()
        if not own.isdisjoint({*map(id, trained), *computed_of(*trained)}):
            raise OptionError(
                "The block uses weights of the model itself as tensors that are trained, and a run "
                "leaves no gradients on these: write `weight.detach()`.",
                here(),
            )
    if model.has_hooks:
        warn_user(
            "Hooks of yours hang on modules of this model. The server runs its own modules, which "
            "have none: write what they do as lines of the block.",
        )
    if model.loaded and model.is_training:
        warn_user(
            "This model is in training mode, and the server's is not: it has no dropout. Call "
            "`model.eval()` for the same values here.",
        )
    if _most_bytes(model, job) > LARGE_BYTES:
        _warn_of_large_results(model, job)


def _most_bytes(model: Subject, job: Job) -> int:
    """About how many bytes a value of the model has at most: a smaller one is not looked at."""
    root = model.snapshot.root
    # The vocabulary, mostly: a bound that takes no look at the graph.
    widest = max((max(one.shape, default=1) for one in root.parameters()), default=1)
    most = 0
    for block in job.blocks:
        steps = block.options.get("max_new_tokens")
        for prompt in block.prompts:
            if prompt.ids is not None:
                rows, length = prompt.ids.shape
                length += prompt.steps or (steps if isinstance(steps, int) else 0)
                most = max(most, rows * length * max(widest, length) * _NUMBER_BYTES)
    return most


def _warn_of_large_results(model: Subject, job: Job) -> None:
    """Warns of values that take long to come, at the lines that save them."""
    from insitu.tracing.job_check import check_job  # of use only where something is large

    try:
        results = check_job(model, job).results
    except InsituError:  # the server says what is wrong
        return
    places = {
        name: block.graph[index].location
        for block in job.blocks
        for index, name in block.saves.items()
    }
    for name, one in results.items():
        if one.bytes is not None and one.bytes > LARGE_BYTES:
            warn_user(
                f"{one.bytes:,} bytes are saved at\n{places[name]}\nand have to come from the "
                "server: save less of it, such as `x[:, -1]` in place of `x`.",
            )


def run_job_away(model: Subject, job: Job, raises: bool, **others: Any) -> Results:
    """Runs a job somewhere else.

    Args:
        model: the model, which is there.
        job: the job.
        raises: whether what invocations raise is raised.
        others: what only a run of this process can be given.

    Raises:
        OptionError: if there is any of these.
        InsituError: if something is wrong with the run, with what there is as its `results`.
    """
    for name, given in others.items():
        if given is not None:
            raise OptionError(
                f"`{name}=` is for a model whose weights are here: this one is on a server, whose "
                "own limits hold, and whose `RemoteJob` has events and can be cancelled.",
                here(),
            )
    check_weights(model.snapshot.root, job)
    results: Results = model.away.run(job)
    if results.failed and raises:
        error = error_of(results.failed)
        error.results = results
        raise error
    return results


def _missing(name: str, results: Results) -> Any:
    for one in results.failed:
        if name in one.names:
            return Missing(f"its run raised {type(one.error).__name__}.")
    return Missing("its run failed.")
