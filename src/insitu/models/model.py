"""`Model`: any `torch.nn.Module`, wrapped for experiments."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from insitu.batching.procedure import Procedure
from insitu.engine.counts import Counts
from insitu.engine.eager import uncompiled
from insitu.engine.exclusive import Exclusive, exclusive
from insitu.engine.places import View
from insitu.engine.plan_cache import PlanCache
from insitu.engine.probe import Call, Probe, fake_call
from insitu.engine.tree import Looks, Tree
from insitu.graph import disk
from insitu.graph.errors import OptionError, WireError
from insitu.graph.habits import OF_MODULES
from insitu.graph.location import Location, Mark, here
from insitu.graph.node import Graph
from insitu.graph.ordinary import ordinary_tensors
from insitu.graph.tracebacks import short_tracebacks
from insitu.models.blocks import CACHES, block_views, find_stacks
from insitu.models.delegation import DELEGATED, delegated
from insitu.models.dropout import drops_out
from insitu.models.own_runs import OwnRuns
from insitu.models.plain import Forward
from insitu.tracing.block import Block
from insitu.tracing.edit import Edit, described
from insitu.tracing.edit_files import edits_from_bytes, edits_to_bytes
from insitu.tracing.handle import Handle
from insitu.tracing.session import Session
from insitu.tracing.tracer import Tracer
from insitu.tracing.vocabulary import NoVocabulary, Vocabulary

if TYPE_CHECKING:
    from insitu.display.module_tree import ModuleTree
    from insitu.engine.events import Listener
    from insitu.engine.job import Job
    from insitu.engine.job_parts import JobModel, ProcedureName
    from insitu.engine.limits import Limits
    from insitu.engine.results import Results
    from insitu.engine.seams import Cancel
    from insitu.engine.sinks import Sink
    from insitu.models.architectures import Description
    from insitu.models.fingerprints import Structure
    from insitu.models.loading import Source
    from insitu.models.vocabulary import Names
    from insitu.tracing.job_check import JobCheck


_USED_INSIDE = """
    caches count described edited exclusive fake_module has_hooks in_use knows_dtypes look
    look_at_weights looks plans probe procedure settle snapshot views vocabulary warn_of_noise
    without_data
"""
"""What other parts of Insitu use of a model; not in `dir`."""


class Model(Handle):
    """A module whose inside can be read while it runs.

    It is the handle of the whole module: the module's children are its attributes, and
    `model.output` is what the module returns.

    Args:
        module: any module. It is used as it is and never changed.

    Attributes:
        snapshot: all modules, as they were when they were last looked at.
        looks: what a block of it that is open has looked at.
        exclusive: who may use the module: runs of it wait for each other.
        edits: what holds in every run.
        views: how the outputs of transformer blocks are shown, by path, if there are any.
        caches: the Python modules of Transformers' caches of keys and values.
        plans: how blocks were run before.

    Example:
        >>> import torch
        >>> from insitu import Model
        >>> model = Model(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU()))
        >>> with model.trace(torch.ones(2, 3)):
        ...     hidden = model[0].output.save()
        >>> hidden.value.shape
        torch.Size([2, 5])
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(self, "")
        vars(self).update(edits=(), _source=None, _base=None, _loading=Exclusive())
        vars(self).update(_said=set(), looks=Looks())
        self._adopt(module)

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
            kwargs: keyword arguments for `from_pretrained`: `device_map`, `dtype`, `revision`
                and whatever else it takes.

        Returns:
            The model. `model.trace(...)` takes the arguments of its forward: what a processor
            or a feature extractor returns, as in `model.trace(**inputs)`.

        Raises:
            LoadError: if there is no such model. `load()` raises it if files lack weights.
        """
        from insitu.models.loading import Source
        from insitu.models.tasks import saved_class

        location = here()
        source = Source(os.fspath(name), kwargs, saved_class, location, allow_new_weights)
        tree = source.tree()
        model = cls(source.weights(location) if tree is None else tree)
        if tree is not None:
            vars(model)["_source"] = source
        vars(model)["_origin"] = source.origin
        return model

    snapshot: Tree
    looks: Looks
    exclusive: Exclusive
    edits: Sequence[Graph]
    caches: Collection[str] = CACHES
    plans: PlanCache[Any]
    views: dict[str, View]
    _vocabulary: Vocabulary
    _internal = frozenset(_USED_INSIDE.split())
    _description: Description | None = None
    _module: nn.Module
    _stacks: Collection[str] = ()  # the lists of blocks that were ever found
    _weights: tuple[list[torch.dtype], list[torch.Size]]
    _own_runs: OwnRuns
    _structure: tuple[Tree, Structure] | None = None  # as a job describes it
    _source: Source | None
    _origin: tuple[str, str] = ("", "")  # the name that it was loaded by, and the revision
    _base: Model | None
    _loading: Exclusive
    _said: set[str]  # what was said once, also of models with edits

    @property
    def config(self) -> Any:
        """The module's config, Hugging Face's own object.

        Raises:
            AttributeError: if it has none.
        """
        return self._module.config

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._source is None

    @property
    def knows_dtypes(self) -> bool:
        """Whether the dtypes of weights that are not loaded yet are certain."""
        return self._source is None or self._source.knows_dtypes(self._module)

    def load(self) -> nn.Module:
        """Loads the weights, if they are not there yet, and returns the module.

        Raises:
            LoadError: if the files cannot be read. The model is as before, and can try again.
        """
        if self._source is not None:
            # What loads may ask for the weights itself.
            turn = nullcontext() if self._loading.is_used_here() else self._loading
            with turn, ordinary_tensors():
                if self._source is not None and self._base is not None:
                    self._take(self._base.load())
                elif self._source is not None:
                    self._take(self._source.weights(here()))
        return self._module

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """All modules by path, as they are now; shared ones under each of their paths."""
        if not self.looks.tree:
            self.look()
        return self.snapshot.modules

    @property
    def vocabulary(self) -> Vocabulary:
        """The standard names of its values."""
        if not self.looks.tree:
            self.look()
        return self._vocabulary

    def look(self, closely: bool = False) -> bool:
        """Takes the module's tree as it is now; returns whether it had changed.

        Modules may have been added, replaced, moved or taken out since the model was wrapped, or
        last used. What was known of the tree is then forgotten.

        Args:
            closely: whether to look also in an open block in which that was done before, and
                for what is seldom done to a module.
        """
        looks = self.looks
        if looks.tree and not closely:
            return False
        changed = self.snapshot.differs() if closely else self.snapshot.has_changed()
        if changed:
            self._renew()
        if looks.tree is None:
            looks.tree = True
        return changed

    def warn_of_noise(self) -> None:
        """Says once that its values are random, if dropout is on."""
        if "dropout" not in self._said and drops_out(self.snapshot.parts):
            self._said.update(("dropout", "training"))
            warnings.warn(
                "The model is in training mode, so dropout makes its values random: each run "
                "gives others, and invocations run one by one. `model.module.eval()` turns it off.",
                stacklevel=2,
            )

    def look_at_weights(self) -> bool:
        """Takes dtypes and shapes of weights as they are now; returns whether they had changed."""
        looks = self.looks
        if looks.weights:
            return False
        changed = self.snapshot.weights() != self._weights
        if changed:
            self._renew()
        looks.weights = looks.tree is not False  # once in a block
        return changed

    def probe(self, call: Call, views: Mapping[str, View], inside: str | None = None) -> Probe:
        """Returns fake values of what passes every site in a call, from a cache if it can.

        Args:
            call: arguments for the module, of which shapes and dtypes matter.
            views: how outputs are shown in such a call.
            inside: the module in whose forward the calls of torch functions are wanted too.

        Raises:
            ShapeError: if the module cannot be run on fake tensors.
        """
        if not self.looks.tree:
            self.look()
        self.look_at_weights()
        return self._own_runs.probe(call, views, inside)

    @property
    def without_data(self) -> tuple[nn.Module, Mapping[str, nn.Module]]:
        """The module that runs on tensors without data, of the same shapes, and its tree."""
        return self._own_runs.without_data

    def fake_module(self, path: str) -> Callable[..., Any]:
        """Returns a module as a function on fake tensors."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.in_use():
                return fake_call(self.modules[path], args, kwargs)

        return call

    def in_use(self) -> AbstractContextManager[None]:
        """Waits for the wrapped module, and has it for a run of the library's own.

        The user's hooks on it sit that out, and if the module changes its tree in it, it is set
        back. One such run may lead to another: a proof of names asks for weights.

        Raises:
            BlockError: if that is inside a run of the user's.
        """
        return self._own_runs.in_use()

    def settle(self, call: Call) -> bool:
        """Lets the module change its own tree, as a call of it does; returns whether it did.

        Args:
            call: the call, which any run of the user's may make.
        """
        self._own_runs.settle(call, self.loaded)
        return self.look(closely=True)

    def _notice(self) -> None:
        """Takes the tree anew before a block, if its blocks or its head are others than before.

        Changes further inside are noticed when a name or a shape is asked for, or when the block
        is planned, by the parts of the tree that the block is about.
        """
        spine = self.snapshot.spine
        if spine.now != spine.then:
            self._renew()

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

    def procedure(
        self, name: ProcedureName, options: Mapping[str, Any], mark: Mark, dry: bool = False
    ) -> Procedure[Any]:
        """Returns the procedure that a job names: as of `Subject`."""
        if name != "trace":
            raise OptionError(
                f"The job generates, and a {type(self).__name__} does not: run it on a "
                "`LanguageModel`.",
                Location(*mark),
            )
        for option in options:
            raise OptionError(
                f"The job has an option `{option}`, and a {type(self).__name__} takes none: run it "
                "on a `LanguageModel`.",
                Location(*mark),
            )
        return Forward(self.views, self._module)

    def count(self, call: Call) -> Counts:
        """Returns what a call of the module takes: as of `Subject`."""
        return self._own_runs.count(call)

    @property
    def described(self) -> JobModel:
        """What a job says of the model that it is for."""
        from insitu.models.fingerprints import described, structure_of

        self.look(closely=True)
        self.look_at_weights()
        if self._structure is None or self._structure[0] is not self.snapshot:
            vars(self)["_structure"] = self.snapshot, structure_of(self)
        assert self._structure is not None
        return described(self, self._origin, self._structure[1])

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
            InsituError: for what is wrong with the run, at the line that was recorded; an
                `ExecutionError` for what the model itself raises.

        Example:
            `results = model.run(Job.from_bytes(data))`, and then `results["logits"]`.
        """
        from insitu.engine.seams import around
        from insitu.tracing.job_checking import checked_budget
        from insitu.tracing.job_running import run_job

        self._notice()
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
            InsituError: for what is wrong with the run, as far as that is found beforehand.
        """
        from insitu.engine.budget import Budget
        from insitu.tracing.job_checking import check_job

        self._notice()
        return check_job(self, job, None if limits is None else Budget(limits))

    def scan(self, *args: Any, **kwargs: Any) -> Tracer:
        """Opens a block like `trace`, which checks everything when it ends and runs nothing.

        What is saved in it is then a fake tensor: it has a shape and a dtype, and no content.
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

    def edit(self, **unknown: Any) -> Edit[Self]:
        """Opens a block whose lines hold in every later run of the model that it gives.

        `with model.edit() as edited:` leaves `model` as it was. Edits stack: `edited.edit()`.
        In a generation they hold in every step. `print(edited)` shows them.

        Raises:
            OptionError: if it is given an option: it has none.
        """
        if unknown:
            raise OptionError(
                f"`edit` has no option `{next(iter(unknown))}`: `with model.edit() as edited:` "
                "gives a model with the edits, and leaves `model` as it is. Write "
                "`with model.edit() as model:` to go on with that one.",
                here(),
            )
        return Edit(self)

    def edited(self, graph: Graph) -> Self:
        """Returns the model with one more edit, over the same weights.

        Args:
            graph: what the edit has recorded.
        """
        other = object.__new__(type(self))
        own = {k: v for k, v in vars(self).items() if type(v) is not Handle}
        vars(other).update(own, _model=other, _site=(other, "", 0), _items={}, _roles={})
        vars(other).update(plans=PlanCache(), looks=Looks())
        vars(other).update(_base=self, edits=(*self.edits, graph))
        return other

    def tree(self, depth: int | None = None) -> ModuleTree:
        """Returns the tree of modules with what is in them, to be printed.

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
        from insitu.display.module_tree import ModuleTree, branches
        from insitu.models.checking.inventory import names_by_module

        if depth is not None and (type(depth) is not int or depth < 1):
            raise OptionError(f"A tree is at least 1 deep, and not {depth!r}.", here())
        found = branches(self._module, depth)
        with self.vocabulary.quiet():
            names = names_by_module(self, [branch.path for branch in found])
        return ModuleTree(found, names)

    @short_tracebacks
    def save_edits(self, path: str | os.PathLike[str]) -> None:
        """Writes the edits of the model to a file, whole or not at all.

        Args:
            path: the file. It holds data and no code, and can be read by anybody.

        Raises:
            WireError: if an edit holds what is no data: a function, or a tensor that is trained.
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

    def __getattr__(self, name: str) -> Any:
        own = name in DELEGATED and "_module" in vars(self) and name not in self._module._modules
        return delegated(self, name) if own else super().__getattr__(name)

    def _unknown(self, name: str) -> str:
        # What other libraries call so has a line of its own to write.
        if isinstance(name, str) and name not in OF_MODULES and hasattr(self._module, name):
            way = "module" if self.loaded else "load()"
            return (
                f"{name!r} is no module of the model, but an attribute or a method of the module "
                f"itself: write `model.{way}.{name}`."
            )
        return super()._unknown(name)

    def __copy__(self) -> Self:
        """Returns another wrapper of the same module."""
        other = object.__new__(type(self))
        own = {k: v for k, v in vars(self).items() if type(v) is not Handle}
        vars(other).update(own, _model=other, _site=(other, "", 0), _items={}, _roles={})
        vars(other).update(plans=PlanCache(), looks=Looks())
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns a wrapper of a copy of the module, with the same edits."""
        other = memo[id(self)] = copy.copy(self)
        vars(other).update(_base=None, _loading=Exclusive(), _said=set())
        other._adopt(copy.deepcopy(self._module, memo))
        return other

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises: what is pickled is the module."""
        raise WireError(
            "A wrapped model cannot be pickled: pickle the module, `model.load()`, and wrap it "
            "again where it arrives; or send its name and load it there.",
            here(),
        )

    def __repr__(self) -> str:
        return "\n".join([super().__repr__(), *(f"edit: {line}" for line in described(self))])

    def _take(self, module: nn.Module) -> None:
        """Takes a loaded module in the place of the tree without weights."""
        tree, paths = self._module, self.snapshot.modules.keys()
        self._adopt(module)
        quantised = getattr(module, "is_quantized", False) and self.snapshot.modules.keys() == paths
        vars(self)["_source"] = None
        if quantised:
            self._own_runs.substitute = tree

    def _adopt(self, module: nn.Module) -> None:
        """Takes a module as the wrapped one."""
        module = uncompiled(module)
        tree = Tree(module)
        config = getattr(module, "config", None)
        named = hasattr(config, "get_text_config")  # a Transformers model
        if named:
            known = find_stacks(module, config, self._stacks)
            vars(self)["_stacks"] = frozenset([*self._stacks, *known])
        views = block_views(module, config, True, self._stacks) if named else {}
        vars(self).update(_module=module, snapshot=tree, exclusive=exclusive(module))
        vars(self).update(plans=PlanCache(), views=views)
        self._forget_runs()
        vars(self)["_weights"] = tree.weights()
        vars(self)["_vocabulary"] = self._names(module) if named else NoVocabulary()

    def _forget_runs(self, substitute: nn.Module | None = None) -> None:
        """Forgets what the library's own runs have told."""
        runs = OwnRuns(self.snapshot, self.exclusive, self.caches, substitute)
        vars(self)["_own_runs"] = runs

    def _renew(self) -> None:
        """Takes the wrapped module again, whose tree has changed."""
        views, paths = self.views, self.snapshot.modules.keys()
        substitute = self._own_runs.substitute
        self._adopt(self._module)
        views.clear()  # blocks that are open have these
        views.update(self.views)
        vars(self)["views"] = views
        if self.snapshot.modules.keys() == paths:
            self._own_runs.substitute = substitute

    def _names(self, module: nn.Module) -> Names:
        """The standard names of a Transformers model, of which nothing is found out yet."""
        from insitu.models.body import Body
        from insitu.models.vocabulary import Names

        return Names(
            Body(self, find_stacks(module, module.config, self._stacks), self._description)
        )

    @short_tracebacks
    def describe_blocks(self, description: Description) -> None:
        """Says what the parts of its blocks are, where the dataflow of a forward does not tell.

        Args:
            description: where values stand. What is found in the dataflow gives way to it.

        Raises:
            OptionError: if it is no model of Transformers.
        """
        if isinstance(self._vocabulary, NoVocabulary):
            raise OptionError("Only models of Transformers have blocks to describe.", here())
        vars(self)["_description"] = description
        vars(self)["_vocabulary"] = self._names(self._module)
