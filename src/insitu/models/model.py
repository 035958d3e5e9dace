"""`Model`: any `torch.nn.Module`, wrapped for experiments."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from insitu import disk
from insitu.graph.errors import OptionError, WireError
from insitu.graph.location import here
from insitu.graph.tracebacks import short_tracebacks
from insitu.habits import OF_MODULES
from insitu.models.blocks import find_stacks
from insitu.models.delegation import DELEGATED, ActsAsModule, delegated
from insitu.models.plain import Forward
from insitu.models.wrapped_module import WrappedModule
from insitu.tracing.block import Block
from insitu.tracing.block_types import ModelNames
from insitu.tracing.edit import Edit, described
from insitu.tracing.edit_files import edits_from_bytes, edits_to_bytes
from insitu.tracing.session import Session
from insitu.tracing.tracer import Tracer

if TYPE_CHECKING:
    from insitu.display.module_tree import ModuleTree
    from insitu.engine.events import Listener
    from insitu.engine.job import Job
    from insitu.engine.limits import Limits
    from insitu.engine.results import Results
    from insitu.engine.seams import Cancel
    from insitu.engine.sinks import Sink
    from insitu.models.architectures import Description
    from insitu.models.body import Body
    from insitu.models.proof.given import Proofs
    from insitu.models.vocabulary import Names
    from insitu.tracing.handle import Submodule
    from insitu.tracing.job_check import JobCheck


_USED_INSIDE = """
    away caches count depends_on_contents described edited exclusive fake_module has_hooks in_use
    is_training knows_dtypes look look_at_weights looks origin plans probe probe_inside procedure
    settle snapshot trains views vocabulary warn_of_noise without_data
"""
"""What other parts of Insitu use of a model; not in `dir`."""


OF_LANGUAGE_MODELS = frozenset(["generate", "hook", "run_with_cache", "token_id", "tokenizer"])
"""What a `LanguageModel` has and a `Model` has not."""


class Model(WrappedModule, ModelNames, ActsAsModule):
    """A module whose inside can be read while it runs.

    It is the handle of the whole module: the module's children are its attributes, and
    `model.output` is what the module returns.

    Args:
        module: any module. It is used as it is and never changed.

    Example:
        >>> import torch
        >>> from insitu import Model
        >>> model = Model(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU()))
        >>> with model.trace(torch.ones(2, 3)):
        ...     hidden = model[0].output.save()
        >>> hidden.value.shape
        torch.Size([2, 5])
    """

    @classmethod
    @short_tracebacks
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, allow_new_weights: bool = False, **kwargs: Any
    ) -> Self:
        """Returns a model of Transformers of any kind, such as of images or of speech.

        It is of the class that its weights were saved from. Its config is read at once; the
        module tree is there too, without weights, so paths, `print(model)` and shapes work.
        Weights are loaded by the first run, or by `load()`.

        Args:
            name: a repo id or a folder. It may have an adapter of PEFT in place of a model.
            allow_new_weights: whether weights that the files lack may be drawn at random, others
                at each load. Unless given, that is an error.
            kwargs: keyword arguments for `from_pretrained`: `device_map`, `dtype`, `revision` and
                all others that it takes.

        Returns:
            The model. `model.trace(...)` takes the arguments of its forward: what a processor
            or a feature extractor returns, as in `model.trace(**inputs)`.

        Raises:
            LoadError: if there is no such model. `load()` raises it if files lack weights.
        """
        from insitu.models.loading.opened import opened_files
        from insitu.models.loading.source import Source
        from insitu.models.loading.tasks import saved_class

        location = here()
        source = Source(os.fspath(name), kwargs, saved_class, location, allow_new_weights)
        opened = opened_files(source, location)
        model = cls(opened.module)
        model._come_from(opened)
        return model

    _internal = frozenset(_USED_INSIDE.split())
    _description: Description | None = None

    @property
    def config(self) -> Any:
        """The module's config, Hugging Face's own object.

        Raises:
            AttributeError: if it has none.
        """
        return self._module.config

    def trace(self, *args: Any, **kwargs: Any) -> Tracer:
        """Opens a block that runs one forward of the module when it ends.

        Args:
            args: positional arguments of the forward. With none, and no keyword arguments, each
                `tracer.invoke(...)` in the block gives its own.
            kwargs: keyword arguments of the forward.

        Returns:
            A context manager, in whose block sites can be read and written.
        """
        self._notice()
        given = (args, kwargs) if args or kwargs else None
        return Tracer(Block(self, Forward(self.views, self._module), given))

    @short_tracebacks
    def run(
        self,
        job: Job,
        *,
        limits: Limits | None = None,
        raises: bool = True,
        sink: Sink | None = None,
        events: Listener | None = None,
        cancel: Cancel | None = None,
    ) -> Results:
        """Runs a job, and returns what it saves by name.

        The job may come from anybody, as bytes: see `Job.from_bytes`. Weights are loaded if they
        are not there. An invocation that fails takes what uses something of it. The rest is run,
        and is in the `results` of the error that is raised.

        Args:
            job: the job: of a block (`tracer.job`), of a session, or read from bytes.
            limits: what it may take. None for any, as for a block of one's own.
            raises: whether what invocations raise is raised. If not, it is in `results.failed`.
            sink: takes each saved value the moment it is final, and the results have none of
                them. None to have them all in the results.
            events: is told what happens in the run: see `insitu.engine.events`.
            cancel: ends the run from outside, when `cancel.cancel()` is called.

        Raises:
            CancelledError: if it was cancelled. The model is as it was.
            LimitError: if it takes more than the limits allow, naming the limit and the line.
            JobError: if the job is for a model of another structure, saying what differs, or if
                other edits are in force than those that it was recorded with.
            InsituError: if something is wrong with the run, at the line that was recorded; an
                `ExecutionError` for what the model itself raises.

        Example:
            `results = model.run(Job.from_bytes(data))`, and then `results["logits"]`.
        """
        from insitu.engine.seams import around
        from insitu.tracing.job_check import checked_budget
        from insitu.tracing.job_running import run_job

        self._notice()
        if self.away is not None:
            from insitu.tracing.away import run_job_away  # of use only with a server

            others = {"limits": limits, "sink": sink, "events": events, "cancel": cancel}
            return run_job_away(self, job, raises, **others)
        budget = None if limits is None else checked_budget(self, job, limits)
        with around(sink, events, cancel):
            return run_job(self, job, budget, raises)

    @short_tracebacks
    def check(self, job: Job, *, limits: Limits | None = None) -> JobCheck:
        """Says what a job would give and take, and runs nothing: no weights are loaded.

        Args:
            job: the job, as of `run`.
            limits: what it may take, as of `run`.

        Returns:
            The shapes, dtypes and bytes of all results, the passes, floating-point operations and
            the peak of memory.

        Raises:
            JobError: as of `run`.
            LimitError: if it would take more than the limits allow.
            InsituError: if something is wrong with the run, as far as that is found beforehand.
        """
        from insitu.engine.budget import Budget
        from insitu.tracing.job_check import check_job

        self._notice()
        return check_job(self, job, None if limits is None else Budget(limits))

    def scan(self, *args: Any, **kwargs: Any) -> Tracer:
        """Opens a block like `trace`, which checks everything when it ends and runs nothing.

        A value saved in it is then a fake tensor: it has a shape and a dtype, and no content.
        """
        self._notice()
        given = (args, kwargs) if args or kwargs else None
        return Tracer(Block(self, Forward(self.views, self._module), given, dry=True))

    def session(self, **unknown: Any) -> Session:
        """Opens a context for several blocks, which run one after the other when it ends.

        In a block, values of the blocks before it can be used without having been saved.

        Raises:
            OptionError: if it is given an option: it has none.
        """
        if unknown:
            raise OptionError(
                f"`session` has no option `{next(iter(unknown))}`: options belong to the blocks in "
                "it, `with model.trace(prompt, ...):`.",
                here(),
            )
        return Session(self)

    def edit(self, *prompts: Any, **unknown: Any) -> Edit[Self]:
        """Opens a block whose lines hold in every later run of the model that it gives.

        `with model.edit() as edited:` leaves `model` as it was. Edits stack: `edited.edit()`.
        In a generation they hold in every step. `print(edited)` shows them.

        Raises:
            OptionError: if it is given a prompt or an option: it has none.
        """
        if prompts:
            raise OptionError(
                "An edit holds for all prompts and takes none: write `with model.edit() as "
                "edited:`, and then `edited.trace(prompt)`.",
                here(),
            )
        if unknown:
            raise OptionError(
                f"`edit` has no option `{next(iter(unknown))}`: `with model.edit() as edited:` "
                "gives a model with the edits, and leaves `model` as it is. Write "
                "`with model.edit() as model:` to go on with that one.",
                here(),
            )
        return Edit(self)

    def tree(self, depth: int | None = None) -> ModuleTree:
        """Returns the tree of modules with their contents, to be printed.

        Beside each module are its weights' shapes, how many numbers these are, and the standard
        names that stand for it or for its values: "attention.z (input)" is what it is given. Like
        neighbours are one line, and nothing is loaded.

        Args:
            depth: how deep it goes: 1 for the children of the model alone; None for all.

        Raises:
            OptionError: if `depth` is below 1.

        Example:
            `print(model.tree())`, or `rich.print(model.tree(depth=2))` with colours.
        """
        from insitu.models.checking.inventory import module_tree

        return module_tree(self, depth)

    @short_tracebacks
    def save_edits(self, path: str | os.PathLike[str]) -> None:
        """Writes the edits of the model to a file, whole or not at all.

        Args:
            path: the file. It holds data and no code, and can be read by anybody.

        Raises:
            WireError: if an edit holds something that is no data: a function, or a tensor that is
                trained.
            OptionError: if there is no such folder.
            SaveError: if the file cannot be written.
        """
        disk.write(path, edits_to_bytes(self.edits))

    @short_tracebacks
    def load_edits(self, path: str | os.PathLike[str]) -> Self:
        """Returns the model with the edits of a file, over those that it has.

        Args:
            path: a file that `save_edits` has written.

        Raises:
            LoadError: if the file cannot be read.
            WireError: if it is no such file, if it names modules that the model does not have, or
                if it holds what `edit` refuses.
        """
        edited = self
        for graph in edits_from_bytes(disk.read(path), path, self.modules):
            edited = edited.edited(graph)
        return edited

    def __getattr__(self, name: str) -> Submodule:
        own = name in DELEGATED and "_module" in vars(self) and name not in self._module._modules
        return delegated(self, name) if own else super().__getattr__(name)

    def _unknown(self, name: str) -> str:
        if self._is_for_language(name):
            return (
                f"`{type(self).__name__}` wraps any module and has no `{name}`: write "
                f"`LanguageModel(module, tokenizer=tokenizer).{name}`, with the module given here."
            )
        # What other libraries call so has a line of its own to write.
        if isinstance(name, str) and name not in OF_MODULES and hasattr(self._module, name):
            way = "module" if self.loaded else "load()"
            return (
                f"{name!r} is no module of the model, but an attribute or a method of the module "
                f"itself: write `model.{way}.{name}`."
            )
        return super()._unknown(name)

    def _is_for_language(self, name: str) -> bool:
        """Whether a language model would have a name, and the module could be wrapped as one."""
        if not hasattr(getattr(self._module, "config", None), "get_text_config"):
            return False
        return not hasattr(type(self), name) and name in OF_LANGUAGE_MODELS

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises: the module is to be pickled instead."""
        raise WireError(
            "A wrapped model cannot be pickled: pickle the module, `model.load()`, and wrap it "
            "again where it arrives; or send its name and load it there.",
            here(),
        )

    def __repr__(self) -> str:
        return "\n".join([super().__repr__(), *(f"edit: {line}" for line in described(self))])

    def _names(self, module: nn.Module) -> Names:
        """The standard names of a Transformers model, before anything is known of it."""
        from insitu.models.body import Body
        from insitu.models.vocabulary import Names

        stacks = find_stacks(module, module.config, self._stacks)
        return Names(Body(self, stacks, self._description, _proofs))

    @short_tracebacks
    def describe_blocks(self, description: Description) -> None:
        """Says what the parts of its blocks are, where the dataflow of a forward does not tell.

        Args:
            description: where values stand. Findings of the dataflow give way to it.

        Raises:
            OptionError: if it is no model of Transformers.
        """
        if not self._vocabulary.names:
            raise OptionError("Only models of Transformers have blocks to describe.", here())
        vars(self)["_description"] = description
        vars(self)["_vocabulary"] = self._names(self._module)


def _proofs(body: Body) -> Proofs:
    """The proofs of a model's parts, on small ones of its kind."""
    # Loaded here: it takes a fourth of the time that a first block without names does.
    from insitu.models.proof.given import Proofs

    return Proofs(body, Model)
