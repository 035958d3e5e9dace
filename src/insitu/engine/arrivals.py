"""What happens at the sites of a pass that is more than reads and writes of one forward.

Steps and later calls, functions inside of forwards, tokens, writes in place, modules that are
skipped, and the end of a run at a line of the user's.
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import nn

from insitu.engine.clock import Clock
from insitu.engine.execution import Execution
from insitu.engine.functions import called_at_its_places
from insitu.engine.interpose import Hooks, Own, Taps, put_hook, put_last, remove_hook, take_last
from insitu.engine.places import Moment, Stop, View, handed_over, passing_value
from insitu.engine.plan import Readers
from insitu.engine.probe import fake_result
from insitu.engine.written_value import changed_value, check_tokens
from insitu.graph.changes import Changes, set_grad_enabled
from insitu.graph.node import NO_KWARGS, SEPARATOR, Kind, Place, Site
from insitu.graph.structure import clone, map_structure, tensors_of
from insitu.graph.writing import fitted

if TYPE_CHECKING:
    from insitu.engine.model_call import Pass
    from insitu.engine.observed_passes import ObservedPasses

_OF_MODULES = frozenset(["output", "input", "inputs"])

Of = ParamSpec("Of")
Result = TypeVar("Result")


def _of_lines(
    method: Callable[Concatenate[Arrivals, Of], Result],
) -> Callable[Concatenate[Arrivals, Of], Result]:
    """Lets the pass raise what a method raises, even if the model catches it."""

    @wraps(method)
    def noting(self: Arrivals, *args: Of.args, **kwargs: Of.kwargs) -> Result:
        try:
            return method(self, *args, **kwargs)
        # A model may catch what a line raises, and go on with other numbers. The pass raises it
        # when the model has ended.
        except Exception as error:
            self._execution.fail(error)
            raise

    return noting


class Arrivals:
    """Gives an execution what arrives at the sites of a pass.

    Args:
        execution: takes the values.
        single: the pass.
        readers: who waits for what, by moment. What has come is taken out.
        hooks: the hooks that the pass has put on modules, by the first moment of their place.
        modules: the wrapped module's tree, by path.
        views: how outputs are shown, by path.
        caches: the Python modules of caches, which forwards leave to themselves.
        changes: notes all that is changed for the time of the pass.
        is_own: whether a call of a module is one of the pass.

    Attributes:
        clock: tells calls and steps apart.
        stopped: whether the experiment ended the pass.
    """

    def __init__(
        self,
        execution: Execution,
        single: Pass,
        readers: Readers,
        hooks: Hooks,
        modules: Mapping[str, nn.Module],
        views: Mapping[str, View],
        caches: Collection[str],
        changes: Changes,
        is_own: Own,
    ) -> None:
        self._execution = execution
        self._plan = execution.plan
        self._single = single
        self._readers = readers
        self._hooks = hooks
        self._modules = modules
        self._views = views
        self._caches = caches
        self._changes, self._is_own = changes, is_own
        self._taps = Taps(changes, is_own)
        self._end_step_hook = self._end_step  # one object: a method is a new one each time
        # Where, and for whom: the nodes that read the arguments, each with its invocation.
        self._skipping: dict[nn.Module, tuple[Place, list[tuple[int, int]]]] = {}
        ended: Mapping[int, int] = {} if single.steps is None else single.steps.ended
        execution.ended = ended
        self.clock = Clock(readers, ended)
        self.stopped = False

    def begin(self) -> None:
        """Puts hooks on the modules, and all else that is needed to see what passes the sites."""
        # A module that is skipped keeps its hooks: readers of its inputs and outputs are called as
        # in any run. Only its forward is another.
        for (_, path, *_), index in self._plan.reads.items():
            if index in self._plan.skips:
                module = self._modules[path]
                self._taps.forward(module, partial(self._stand_in, path, module))
        if self._single.steps is not None:
            root = self._modules[""]
            # Each call of the root is a step: the loop itself is Hugging Face's own.
            self._taps.before(root, self._begin_step)
            self._changes.afterwards(partial(take_last, root, self._end_step_hook))
            if self._differentiates:  # so that lines at the output stand among hooks, before it
                put_last(root, self._end_step_hook)
        owners: set[str] = set()
        for path, kind, _, _ in self._readers:
            first = (path, kind, 0, 0)
            # Functions have no hooks of their own: their owner's forward is watched instead.
            if SEPARATOR in path:
                owners.add(path.partition(SEPARATOR)[0])
            # One hook serves all calls and steps of a place: the clock knows which one comes.
            elif first not in self._hooks and kind in _OF_MODULES:
                view = self._views.get(path)
                put_hook(self._hooks, self._modules[path], first, view, self._arrived)
        for owner in owners:
            self._taps.functions(self._modules[owner], partial(self._visit, owner), self._caches)

    def end(self) -> None:
        """Takes back what `begin` did, but for the hooks. It may be called again."""
        self._changes.undo()
        vars(self).pop("_end_step_hook", None)  # it refers to this

    def missing(self) -> list[int]:
        """Returns the nodes that read what never came."""
        return self.clock.missing()

    @_of_lines
    def pass_on(self, kind: Kind, value: Any, path: str = "", vocabulary: int | None = None) -> Any:
        """Takes the value that passes a place without a hook, and returns the one to stand there.

        Args:
            kind: which value it is.
            value: what passes.
            path: of what.
            vocabulary: of the choice of tokens, how many there are.

        Raises:
            IndexOutOfRangeError: for a token that is not among them.
        """
        execution = self._execution
        # The pass has failed, and the model has swallowed it: what comes now is of no run.
        if execution.raised is not None:
            return value
        if kind == "tokens" and execution.observed is not None:
            self._tell_chosen(execution.observed, value)
        first: Moment = (path, kind, 0, 0)
        found = self.clock.take(first)
        if not found:
            return value
        place = self.clock.place(first)
        value = execution.made_new(found, value)
        self._hand_out(found, place, value)
        # Nothing more is read: the rest of the model would only take time.
        if self._single.may_stop and not self._readers:
            raise Stop
        cuts = self._single.cuts
        changed = changed_value(execution, place, value, found, cuts, self.clock.step)
        # A token outside of the vocabulary would be an error deep inside of the model, at no line
        # of the user's.
        if vocabulary is not None and changed is not value:
            written = next(self._plan.writes[n] for n, _ in found if n in self._plan.writes)
            check_tokens(changed[changed != value], vocabulary, execution.graph[written].location)
        return changed

    @property
    def _differentiates(self) -> bool:
        """Whether autograd records the steps."""
        return self._single.differentiates and self._execution.differentiates

    def _going_on(self) -> list[int]:
        """The invocations of the pass that have not ended."""
        return [number for number in self._single.cuts if number not in self._execution.ended]

    def _tell_chosen(self, observed: ObservedPasses, tokens: Any) -> None:
        """Tells which tokens a step has chosen."""
        step = self.clock.step
        # A row that has ended is filled up with padding by `generate`: these tokens are nobody's
        # choice.
        for number in self._going_on():
            cut = self._single.cuts[number]
            own = tokens if cut is None else cut.take(Site(number, "", "tokens", 0, step), tokens)
            observed.chosen(number, step, own)

    @_of_lines
    def _arrived(
        self, first: Moment, view: View | None, module: nn.Module, args: tuple[Any, ...], *rest: Any
    ) -> Any:
        execution, plan, cuts = self._execution, self._plan, self._single.cuts
        if not self._is_own():
            return None  # somebody else's call of the module, beside ours or in an operation
        found = self.clock.take(first)
        may_stop = self._single.may_stop
        if not found:
            if may_stop and not self._readers:  # the pass had to come this far
                raise Stop
            return None
        # A hook costs each further forward time, and nobody waits for it any more.
        if not may_stop and self.clock.is_done(first):  # there are more forwards to come
            remove_hook(self._hooks[first])
            del self._hooks[first]
        place = self.clock.place(first)
        arriving = passing_value(place[1], view, module, args, rest)
        value = execution.made_new(found, arriving)
        self._hand_out(found, place, value)
        skips = [pair for pair in found if pair[0] in plan.skips]
        if may_stop and not self._readers and not skips:
            raise Stop
        # After the readers of this place have had their value, which is part of the run.
        if any(index in plan.stops for index, _ in found):
            raise Stop
        if skips:
            self._skipping[module] = place, skips
        value = changed_value(execution, place, value, found, cuts, self.clock.step)
        if value is arriving:
            return None
        return handed_over(place[1], view, module, args, rest, value)

    def _hand_out(self, found: Sequence[tuple[int, int]], place: Place, value: Any) -> None:
        """Gives each invocation its part of what arrived."""
        execution, cuts, step = self._execution, self._single.cuts, self.clock.step
        for index, invocation in found:
            cut = cuts[invocation]
            # Inputs that are asked for only because the module is skipped are never looked at, so
            # they need not be cut.
            if cut is None or self._plan.only_skips(index):
                own = value
            else:
                site = Site(invocation, *place, step)
                own = cut.take(site, value)
                # Autograd knows the batch's value only: the part's gradient is cut out of that
                # one's.
                if execution.tape is not None and index in execution.renewed:
                    execution.tape.parts.note(own, value, partial(cut.take, site))
            # It reads what was written there in every step, which runs before it.
            if index in self._plan.after:
                own = execution.standing(self._plan.after[index])
            execution.arrive(index, own)

    def _stand_in(
        self,
        path: str,
        module: nn.Module,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Is the forward of a module whose calls may be skipped."""
        # The hook that sees the arguments has not asked for this call to be skipped: it is another
        # call of the module.
        if module not in self._skipping:
            return forward(*args, **kwargs)
        return self._skip(path, module, forward, args, kwargs)

    @_of_lines
    def _skip(
        self,
        path: str,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """What stands for the output of a module that is skipped."""
        execution = self._execution
        (*_, call), skips = self._skipping.pop(module)
        view = self._views.get(path)
        # Hooks on modules inside would take these calls for the run's own.
        execution.busy = True  # what it calls inside is no part of the run
        try:
            index, invocation = skips[0]
            alone = self._single.cuts[invocation] is None
            plain = _is_plain((args, kwargs))  # a cache is not, which later steps read
            returned = self._plan.returned[index]
            if plain and (self.clock.step or not alone):  # sizes are not those that are known
                returned = fake_result(module, forward, args, kwargs)
            # Later layers and steps need the rest of what it returns, such as its keys and values,
            # so it runs all the same.
            if not plain or (view is not None and view.returns_more(returned)):
                returned = forward(*args, **kwargs)
        finally:
            execution.busy = False
        if alone:
            value = map_structure(clone, execution.skipped(index))
            made = execution.checked(index, lambda: _standing_in(view, returned, value))
        else:
            shown = returned
            if view is not None:
                shown = view(returned, args, kwargs if view.takes_arguments else NO_KWARGS)
            whole = self._joined((path, "output", call), skips, shown)
            made = _standing_in(view, returned, whole)
        if self._single.may_stop and not self._readers:
            raise Stop
        return made

    def _joined(self, place: Place, skips: Sequence[tuple[int, int]], shown: Any) -> Any:
        """What stands for the output of a module for several invocations, as one batch.

        Args:
            place: that output.
            skips: the nodes that read its arguments, each with its invocation.
            shown: what it would return, shown, perhaps as fake tensors.
        """
        execution, view = self._execution, self._views.get(place[0])
        own: dict[int, Any] = {}
        for index, invocation in skips:
            value, returned = execution.skipped(index), self._plan.returned[index]
            execution.checked(index, partial(_standing_in, view, returned, value))
            own[invocation] = value
        device = next(tensor.device for value in own.values() for tensor in tensors_of(value))
        whole = map_structure(partial(_blank, device), shown)
        for invocation, value in own.items():
            cut, site = self._single.cuts[invocation], Site(invocation, *place)
            assert cut is not None
            # The rest is what the module itself has returned for the batch.
            if isinstance(value, tuple) and len(cast("tuple[Any, ...]", value)) < len(shown):
                rest = cut.take(site, shown)[len(cast("tuple[Any, ...]", value)) :]
                value = (*cast("tuple[Any, ...]", value), *rest)  # hidden states alone will do
            cut.put(site, whole, value)
        return whole

    def _visit(
        self,
        owner: str,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Makes a call of a torch function in the forward of a module."""
        path = f"{owner}{SEPARATOR}{name}"
        return called_at_its_places(function, args, kwargs, partial(self.pass_on, path=path))

    @_of_lines
    def _begin_step(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        if self.clock.next_step():
            self._execution.next_step()
        if self._execution.observed is not None:
            self._execution.observed.step_begins(self.clock.step, self._going_on())
        if self._differentiates:  # `generate` ends it
            set_grad_enabled(True)
            take_last(module, self._end_step_hook)
            put_last(module, self._end_step_hook)

    def _end_step(self, *_: Any) -> None:
        """Lets `generate` have autograd off between two steps, as it wants."""
        take_last(self._modules[""], self._end_step_hook)
        set_grad_enabled(False)


def _is_plain(arguments: Any) -> bool:
    """Whether arguments are tensors and constants alone: nothing in which a module leaves more."""
    found: list[Any] = []
    map_structure(found.append, arguments)
    return all(item is None or isinstance(item, _PLAIN) for item in found)


_PLAIN = (torch.Tensor, bool, int, float, str, torch.dtype, torch.device)


def _blank(device: torch.device, item: Any) -> Any:
    """A tensor of zeros like another, which may have no data; anything else as it is."""
    if not isinstance(item, torch.Tensor):
        return item
    return torch.zeros(item.shape, dtype=item.dtype, device=device)


def _standing_in(view: View | None, returned: Any, value: Any) -> Any:
    """What a module that is skipped returns, checked against what it would have returned."""
    if view is not None:
        return view.stand_in(returned, value)
    return fitted(returned, value, block=False, move=False)
