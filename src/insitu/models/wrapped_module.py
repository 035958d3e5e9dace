"""A wrapped module as it is now: its tree, its names, and the library's own runs of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from insitu.batching.procedure import Procedure
from insitu.engine.counting import Counts
from insitu.engine.eager import uncompiled
from insitu.engine.exclusive import Exclusive, exclusive
from insitu.engine.foreign_hooks import users_hooks_hang_on
from insitu.engine.places import View
from insitu.engine.plan_cache import PlanCache
from insitu.engine.probe import Call, Probe, fake_call
from insitu.engine.tree import Looks, Tree
from insitu.graph.location import Mark, here
from insitu.graph.node import Graph
from insitu.graph.ordinary import ordinary_tensors
from insitu.models.blocks import CACHES, block_views, find_stacks
from insitu.models.dropout import INDIFFERENT, drops_out, say_that_it_drops_out, say_that_it_trains
from insitu.models.own_runs import OwnRuns, Passing
from insitu.models.plain import Forward, check_job
from insitu.tracing.handle import Handle, Submodule
from insitu.tracing.vocabulary import Vocabulary

if TYPE_CHECKING:
    from insitu.engine.job_parts import JobModel, ProcedureName
    from insitu.models.fingerprints import Structure
    from insitu.models.loading.opened import Opened
    from insitu.models.loading.source import Source
    from insitu.tracing.away import Away


class WrappedModule(Handle):
    """A module that is followed as its tree changes: what the layers below see of a model.

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
        away: where its blocks are run, None for here.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(self, "")
        vars(self).update(edits=(), _source=None, _base=None, _loading=Exclusive())
        vars(self).update(_said=set(), looks=Looks())
        self._adopt(module)

    snapshot: Tree
    looks: Looks
    away: Away | None = None
    exclusive: Exclusive
    edits: Sequence[Graph]
    caches: Collection[str] = CACHES
    plans: PlanCache[Any]
    views: dict[str, View]
    _module: nn.Module
    _stacks: Collection[str] = ()  # the lists of blocks that were ever found
    _weights: tuple[list[torch.dtype], list[torch.Size]]
    _own_runs: OwnRuns
    _vocabulary: Vocabulary
    _source: Source | None  # where its weights are, None once they are in memory
    _structure: tuple[Tree, Structure] | None = None  # as a job describes it
    _origin: tuple[str, str] = ("", "")  # the name that it was loaded by, and the revision
    _base: WrappedModule | None  # the model of which it is an edit
    _loading: Exclusive
    _said: set[str]  # what was said once, also of models with edits

    @property
    def origin(self) -> WrappedModule:
        """The model that its edits are of; itself if it has none."""
        return self if self._base is None else self._base.origin

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._source is None

    @property
    def knows_dtypes(self) -> bool:
        """Whether the dtypes of weights that are not loaded yet are certain."""
        return self._source is None or self._source.knows_dtypes()

    def load(self) -> nn.Module:
        """Loads the weights, if they are not there yet, and returns the module.

        Raises:
            LoadError: if the files cannot be read. The model is as before, and can try again.
        """
        if self._source is not None:
            # What loads may ask for the weights itself, and another thread may have loaded them.
            turn = nullcontext() if self._loading.is_used_here() else self._loading
            with turn, ordinary_tensors():
                source: Source | None = vars(self)["_source"]
                if source is not None and self._base is not None:
                    self._take(self._base.load())
                elif source is not None:
                    self._take(source.weights(here()))
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
            closely: as of `Subject`.
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

    @property
    def is_training(self) -> bool:
        """Whether any of its modules is in training mode: dropout may be, apart from the rest."""
        return any(type(part) not in INDIFFERENT for part in self.snapshot.in_training())

    @property
    def has_hooks(self) -> bool:
        """Whether hooks of the user's own hang on its modules."""
        return users_hooks_hang_on(self.snapshot.parts)

    def trains(self) -> bool:
        """Returns whether it is in training mode, and says once what follows from it."""
        trains = self.is_training
        if trains:
            say_that_it_trains(self._said)
        return trains

    def warn_of_noise(self) -> None:
        """Says once that its values are random, if dropout is on."""
        if "dropout" not in self._said and drops_out(self.snapshot.parts):
            say_that_it_drops_out(self._said)

    def look_at_weights(self) -> bool:
        """Takes dtypes and shapes of weights as they are now; returns whether they had changed.

        Also what else decides what a forward returns: classes, forwards and switches.
        """
        looks = self.looks
        if looks.weights:
            return False
        changed = self.snapshot.weights() != self._weights or self.snapshot.runs_otherwise()
        if changed:
            self._renew()
        looks.weights = looks.tree is not False  # once in a block
        return changed

    def probe(self, call: Call, views: Mapping[str, View], inside: str | None = None) -> Probe:
        """Returns fake values of what passes every site in a call, from a cache if it can.

        Args:
            call: arguments for the module; their shapes and dtypes matter.
            views: how outputs are shown in such a call.
            inside: the module in whose forward the calls of torch functions are wanted too.

        Raises:
            ShapeError: if the module cannot be run on fake tensors.
        """
        if not self.looks.tree:
            self.look()
        self.look_at_weights()
        return self._own_runs.probe(call, views, inside)

    def probe_inside(
        self, call: Call, views: Mapping[str, View], owners: Collection[str]
    ) -> Passing:
        """Returns fake values of what passes functions in forwards of modules: as of `Subject`.

        Raises:
            ShapeError: if the module cannot be run on fake tensors.
        """
        return self._own_runs.inside(call, views, owners)

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

    def procedure(
        self, name: ProcedureName, options: Mapping[str, Any], mark: Mark, dry: bool = False
    ) -> Procedure[Any]:
        """Returns the procedure that a job names: as of `Subject`."""
        check_job(type(self).__name__, name, options, mark)
        return Forward(self.views, self._module)

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

    def depends_on_contents(self, call: Call) -> bool:
        """Returns whether a probe of a call depends on contents: as of `Subject`."""
        return self._own_runs.depends_on_contents(call)

    def count(self, call: Call) -> Counts:
        """Returns what a call of the module takes: as of `Subject`."""
        return self._own_runs.count(call)

    def edited(self, graph: Graph) -> Self:
        """Returns the model with one more edit, over the same weights.

        Args:
            graph: what the edit has recorded.
        """
        other = copy.copy(self)
        vars(other).update(_base=self, edits=(*self.edits, graph))
        return other

    def __copy__(self) -> Self:
        """Returns another wrapper of the same module."""
        other = object.__new__(type(self))
        own = {k: v for k, v in vars(self).items() if type(v) is not Submodule}
        vars(other).update(own, _model=other, _site=(other, "", 0), _items={}, _roles={})
        vars(other).update(plans=PlanCache(), looks=Looks())
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns a wrapper of a copy of the module, with the same edits."""
        other = memo[id(self)] = copy.copy(self)
        vars(other).update(_base=None, _loading=Exclusive(), _said=set())
        other._adopt(copy.deepcopy(self._module, memo))
        return other

    def _come_from(self, opened: Opened) -> None:
        """Remembers where the module and its weights come from."""
        if opened.source is not None:
            source = None if opened.loaded else opened.source
            vars(self).update(_source=source, _origin=opened.source.origin)

    def _notice(self) -> None:
        """Takes the tree anew before a block, if its blocks or its head are others than before.

        Changes further inside are noticed when a name or a shape is asked for, or when the block
        is planned, by the parts of the tree that the block is about.
        """
        spine = self.snapshot.spine
        if spine.now != spine.then:
            self._renew()

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
        vars(self)["_vocabulary"] = self._names(module) if named else Vocabulary()

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

    def _names(self, module: nn.Module) -> Vocabulary:
        """The standard names of a Transformers model: `Model` knows some."""
        return Vocabulary()
