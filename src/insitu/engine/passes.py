"""One pass: a call of the wrapped module with an experiment's hooks in it.

Hooks are put on the modules whose values are wanted and on no others. Each is removed when it
has fired, and all are removed when the pass ends, however it ends.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from functools import partial
from threading import get_ident
from typing import Any

from torch import nn

from insitu.engine.arrivals import Arrivals
from insitu.engine.execution import Execution
from insitu.engine.interpose import Hooks, put_hook, remove_hook, remove_hooks
from insitu.engine.model_call import Pass
from insitu.engine.places import Moment, Stop, View, handed_over, passing_value
from insitu.engine.plan import Plan, Readers
from insitu.engine.written_value import changed_value
from insitu.graph.changes import Changes, set_grad_enabled
from insitu.graph.context import is_grad_enabled
from insitu.graph.node import NO_KWARGS, SEPARATOR, Kind, Site


def _readers(plan: Plan, single: Pass) -> tuple[Readers, bool]:
    """Who reads what in a pass, and whether any of it is of a later call or inside of a forward."""
    own = plan.reads if single.reads is None else {at: plan.reads[at] for at in single.reads}
    readers: dict[Moment, list[tuple[int, int]]] = {}
    special = False
    for (invocation, path, kind, call, step), index in own.items():
        if invocation in single.cuts:
            readers.setdefault((path, kind, call, step), []).append((index, invocation))
            special = special or call > 0 or SEPARATOR in path
    found: tuple[Readers, bool] = ({**readers}, special)
    # A pass of all of a plan is met again by each block of its shape.
    if single.reads is None:
        plan.readers[(*single.cuts,)] = found
    return found


def run_pass(
    execution: Execution,
    single: Pass,
    views: Mapping[str, View],
    hooks: Hooks,
    caches: Collection[str] = (),
) -> tuple[Any, list[int], Arrivals | None]:
    """Runs a pass and gives an execution what arrives at its sites.

    Args:
        execution: takes the values.
        single: the pass.
        views: how outputs are shown, by path.
        hooks: gets the hooks that are put on modules, for the time that they are there. It is
            that of who may use the model: see `Exclusive`.
        caches: the Python modules of caches: what they call is not a forward's own.

    Returns:
        What the call returned, None if it was stopped early; the nodes that read a site at which
        nothing arrived; and how the pass went, where it was more than reads and writes.
    """
    # By name each takes longer.
    call, cuts, may_stop, steps, reads, through, differentiates = single
    plan, modules = execution.plan, execution.modules
    writes, renewed, tape = plan.writes, execution.renewed, execution.tape
    found = plan.readers.get((*cuts,)) if reads is None else None
    kept, special = _readers(plan, single) if found is None else found
    readers = kept.copy()
    if steps is not None or plan.special:
        special = True
    # In an encoder-decoder model the steps are calls of the decoder, not of the whole model.
    if steps is not None and steps.path:
        modules = {**modules, "": modules[steps.path]}
    if through is not None:
        # A reader without nodes: it only keeps the pass from ending before this place.
        readers.setdefault((*through, 0), [])
    # Another thread may call the same module, outside of Insitu, while this pass has hooks on it.
    thread = get_ident()

    def own_call() -> bool:
        return get_ident() == thread and not execution.busy

    def arrived(
        moment: Moment, view: View | None, module: nn.Module, args: tuple[Any, ...], *rest: Any
    ) -> Any:
        # `Arrivals.arrived` in short, for a forward with reads and writes and nothing else.
        if get_ident() != thread or execution.busy:
            return None  # somebody else's call of the module, beside ours or in an operation
        found = readers.pop(moment, None)
        if found is None:
            return None
        if not may_stop:  # there are more forwards to come
            remove_hook(hooks[moment])
            del hooks[moment]
        path, kind, call, _ = moment
        try:
            if kind != "output":
                value = passing_value(kind, view, module, args, rest)
            elif view is None:
                value = rest[-1]
            else:
                value = view(rest[-1], args, rest[0] if view.takes_arguments else NO_KWARGS)
            arriving = value
            if renewed:
                value = execution.made_new(found, value)
            written = False
            for index, invocation in found:
                cut = cuts[invocation]
                if cut is None:
                    execution.arrive(index, value)
                else:
                    site = Site(invocation, path, kind, call)
                    own = cut.take(site, value)
                    if tape is not None and index in renewed:
                        tape.parts.note(own, value, partial(cut.take, site))
                    execution.arrive(index, own)
                if index in writes:
                    written = True
            if may_stop and not readers:
                raise Stop
            if written:
                value = changed_value(execution, moment[:3], value, found, cuts)
            return None if value is arriving else handed_over(kind, view, module, args, rest, value)
        except Exception as error:
            execution.fail(error)
            raise

    arrivals = None
    result, deliver = None, _nobody
    grad_enabled, restored = is_grad_enabled(), False
    try:
        try:
            if special:
                given = (execution, single, readers, hooks, modules, views, caches)
                arrivals = Arrivals(*given, Changes(sys._getframe()), own_call)
                arrivals.begin()
                deliver = arrivals.pass_on
            else:
                for moment in readers:
                    path = moment[0]
                    put_hook(hooks, modules[path], moment, views.get(path), arrived)
            # Passes of invocations without gradients are spared what autograd keeps.
            set_grad_enabled(differentiates and execution.differentiates)
            result = call(deliver, own_call)
        except Stop as stop:
            stop.__traceback__ = None  # it would keep every frame of the forward, and their tensors
            if arrivals is not None:
                arrivals.stopped = True
        # What a line has raised is noted already, and the model may have made another exception of
        # it.
        except Exception:
            if execution.raised is None:
                raise
        finally:
            set_grad_enabled(grad_enabled)
            # From now on a backward pass may go through rows of several invocations.
            if tape is not None and differentiates and len(cuts) > 1:
                tape.is_batched = True
            if arrivals is not None:
                arrivals.end()
            remove_hooks(hooks)
            restored = True
    finally:
        if not restored:  # another exception has come in the lines above
            set_grad_enabled(grad_enabled)
            if arrivals is not None:
                arrivals.end()
            remove_hooks(hooks)
    if execution.raised is not None:  # the model may have caught it, or raised another for it
        raised, execution.raised, execution.busy = execution.raised, None, False
        try:
            raise raised
        finally:
            del raised  # else the error and this frame would keep each other
    if arrivals is not None:
        if steps is not None:
            execution.next_step()
        return result, arrivals.missing(), arrivals
    missing = [index for found in readers.values() for index, _ in found] if readers else []
    return result, missing, None


def _nobody(kind: Kind, value: Any, *, vocabulary: int | None = None) -> Any:
    return value
