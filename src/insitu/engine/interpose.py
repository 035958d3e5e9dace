"""Standing between the calls of modules: seeing what passes, and putting something else there.

This is the only file that hangs hooks on modules and exchanges their forwards. What modules keep,
such as weights and flags, is exchanged in `keeping.py`.
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from threading import get_ident
from typing import Any, TypeAlias, cast

from torch import nn
from torch.nn.modules import module as everywhere

from insitu.engine.foreign_hooks import is_the_models, users_hooks
from insitu.engine.functions import Inside, Visit, observed, unobserved
from insitu.engine.places import Moment, View
from insitu.graph.changes import Changes, changing, move_to_end

Hook = tuple[dict[Any, Any], dict[Any, bool] | None, object, Collection[Any] | None]
"""A hook as it lies in a module: the table, the table of those that take keywords, its key, and
the order of the other hooks, if that was changed."""

Hooks: TypeAlias = dict[Any, Hook]
"""The hooks of a pass, by what they are put for: in most, by the first moment of a place."""

Own = Callable[[], bool]
"""Tells whether a module is being called by the run: not by another thread beside it, and not by
an operation of the experiment."""

CALL = "_compiled_call_impl"
"""The attribute that `Module.__call__` enters, if a module has it."""

_INNER = "_call_impl"  # what it enters else: of the class, unless somebody stands around the call
_PLAIN: object = vars(nn.Module)[_INNER]


def put_hook(
    hooks: Hooks, module: nn.Module, first: Moment, view: View | None, arrived: Callable[..., Any]
) -> None:
    """Puts a hook on a module that hands over one of its values.

    It goes straight into the module's tables: `register_forward_hook` takes 3 µs for a handle
    with weak references that nothing here needs, which is as much as all else done for a hook.

    Where it asks for nothing but the output, and there are no others, it goes around the call:
    torch calls a module with a hook in another way, which takes 1 µs more.

    Args:
        hooks: gets the hook, before it is put there.
        module: the module.
        first: the first moment of the place.
        view: how the module's output is shown.
        arrived: is given `first`, `view`, the module and what torch gives a hook. What it returns
            takes the place of the value, unless it is None.
    """
    state = module.__dict__
    output = first[1] == "output"
    asks = view is not None and view.takes_arguments  # as the user's hooks have left them
    if (
        output
        and not asks
        and CALL not in state
        and not state["_forward_hooks"]
        and type(module)._call_impl is _PLAIN
    ):
        # Around the call: a hook in a table would lead torch into its slower way of calling.
        hooks[first] = state, None, CALL, None
        state[CALL] = partial(_called, arrived, first, view, module, state)
        return
    # A function is its own key: no number that torch hands out for its hooks equals it.
    key = partial(arrived, first, view)
    if output:
        table: dict[Any, Any] = module._forward_hooks  # pyright: ignore[reportUnknownVariableType]
        flags: dict[Any, bool] | None = module._forward_hooks_with_kwargs if asks else None
    else:
        table = module._forward_pre_hooks  # pyright: ignore[reportUnknownVariableType]
        flags = module._forward_pre_hooks_with_kwargs
    _put_among_others(hooks, first, module, table, flags, key)


def _put_among_others(
    hooks: Hooks,
    name: Any,
    module: nn.Module,
    table: dict[Any, Any],
    flags: dict[Any, bool] | None,
    key: Any,
    later: Collection[Any] = (),
) -> None:
    """Puts a hook into a table in which there may be others.

    The hooks that belong to a module come after all others. A library's hook on its own module
    notes what the module returns, which the model may go on with: it has to note what was written.
    The user's hooks come before ours, as they stand.
    """
    behind: Collection[Any] = later
    if table:
        own = [other for other, hook in table.items() if is_the_models(hook, module)]
        behind = (*later, *own)
    hooks[name] = table, flags, key, tuple(table) if behind else None
    if flags is not None:
        flags[key] = True
    table[key] = key
    if behind:
        _reorder(table, behind)


def _called(
    arrived: Callable[..., Any],
    first: Moment,
    view: View | None,
    module: Any,  # a module, of whose `forward` nothing is known
    state: Mapping[str, Any],
    /,  # the module's own arguments may have any name
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls a module and hands its output over."""
    if (
        state["_forward_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or _INNER in state
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    ):
        return _called_among_others(arrived, first, view, module, args, kwargs)
    if (
        state["_forward_pre_hooks"]
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
    ):
        # Pre-hooks may change the arguments, and global hooks hold for this module too.
        output = module._call_impl(*args, **kwargs)
    else:
        output = module.forward(*args, **kwargs)  # which is all that `_call_impl` does then
    changed = arrived(first, view, module, args, output)
    return output if changed is None else changed


def _called_among_others(
    arrived: Callable[..., Any],
    first: Moment,
    view: View | None,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls a module that has other hooks by now, with a hook in its place among them."""
    table: dict[Any, Any] = module._forward_hooks  # pyright: ignore[reportUnknownVariableType]
    hooks: Hooks = {}
    # That of another name of the module was put after this one.
    later = [other for other in table if getattr(other, "func", None) == arrived]
    try:
        try:
            key = partial(arrived, first, view)
            _put_among_others(hooks, first, module, table, None, key, later)
            return cast(Any, module)._call_impl(*args, **kwargs)
        finally:
            remove_hooks(hooks)
    finally:
        remove_hooks(hooks)


def remove_hook(hook: Hook) -> None:
    """Takes a hook off its module, if it is still there."""
    table, flags, key, order = hook
    if key in table:
        del table[key]
    if flags is not None:
        flags.pop(key, None)
    if order is not None:
        _reorder(table, order)


def remove_hooks(hooks: Hooks) -> None:
    """Takes the hooks of a pass off its modules. It may be called again."""
    for table, flags, key, order in hooks.values():  # `remove_hook`, without a call for each
        if key in table:
            del table[key]
        if flags is not None:
            flags.pop(key, None)
        if order is not None:
            _reorder(table, order)
    hooks.clear()  # they refer to functions of the pass, which refer to them and to every value


def _reorder(table: dict[Any, Any], order: Collection[Any]) -> None:
    """Brings entries of a table to its end, in some order. Some of them may be gone."""
    for key in order:
        if key in table:
            move_to_end(table, key)


def put_last(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Hangs a hook on what a module returns, in a run: it is the last of those that are there.

    Args:
        module: the module.
        hook: the hook, as torch calls it. `take_last` takes it off.
    """
    table: dict[Any, Any] = module._forward_hooks  # pyright: ignore[reportUnknownVariableType]
    table[hook] = hook


def take_last(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Takes a hook off that `put_last` has hung there; nothing happens if it is not there."""
    cast("dict[Any, Any]", module._forward_hooks).pop(hook, None)


class Taps:
    """What stands at the modules of a run: it sees what passes, and may put something else there.

    All of it is taken off again with the changes that it is noted in.

    Args:
        changes: notes them.
        is_own: whether a call of a module belongs to the run; None for all calls of this thread.
    """

    def __init__(self, changes: Changes, is_own: Own | None = None) -> None:
        self._changes = changes
        self._is_own = in_this_thread() if is_own is None else is_own

    def before(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Sees the arguments of a module's calls.

        Args:
            module: the module.
            function: is given the module, its arguments and its keyword arguments. It may return
                others, as `(args, kwargs)`; None leaves them.
        """
        table = cast("dict[Any, Any]", module._forward_pre_hooks)
        self._hang(table, module._forward_pre_hooks_with_kwargs, function)

    def after(self, module: nn.Module, function: Callable[..., Any], first: bool = False) -> None:
        """Sees what a module's calls return.

        Args:
            module: the module.
            function: is given the module, its arguments, its keyword arguments and what it
                returned. It may return what takes the place of that; None leaves it.
            first: whether it comes before the hooks that are there.
        """
        table = cast("dict[Any, Any]", module._forward_hooks)
        self._hang(table, module._forward_hooks_with_kwargs, function, first)

    def forward(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Lets another function be a module's forward.

        Args:
            module: the module.
            function: is given the module's forward, its arguments and its keyword arguments, and
                returns what the module is to return.
        """
        # Other threads, and calls inside of operations, go on through the module's own forward.
        replaced = partial(_instead, self._is_own, function, module.forward)
        self._changes.put(vars(module), "forward", replaced)

    def enter(self, context: AbstractContextManager[Any]) -> None:
        """Enters a context that is left when the taps are taken off."""
        self._changes.enter(context)

    def functions(self, module: nn.Module, visit: Visit, caches: Collection[str]) -> None:
        """Makes the calls of the torch functions that a module's own forward calls.

        Args:
            module: the module.
            visit: makes a call, given the function's name, the function and its arguments.
            caches: the Python modules of caches, which are left to themselves: see `in_cache`.
        """
        active: list[Inside] = []
        forward = partial(observed, self._is_own, visit, caches, module.forward, active)
        self._changes.put(vars(module), "forward", forward)
        # What a child's forward calls is the child's own: watching stops where a child is called.
        for child in dict.fromkeys(module.children()):
            call = cast("Callable[..., Any]", child._call_impl)
            self._changes.put(vars(child), _INNER, partial(unobserved, self._is_own, call, active))

    def _hang(
        self,
        table: dict[Any, Any],
        flags: dict[Any, bool],
        function: Callable[..., Any],
        first: bool = False,
    ) -> None:
        # A fresh object, so that two taps of one function are two entries.
        key = partial(_if_own, self._is_own, function)
        self._changes.put(flags, key, True)
        self._changes.put(table, key, key)
        if first:
            cast(Any, table).move_to_end(key, last=False)


@contextmanager
def tapped(is_own: Own | None = None) -> Generator[Taps, None, None]:
    """Gives what taps modules until the block ends.

    Args:
        is_own: whether a call of a module belongs to the run; None for all calls of this thread.
    """
    with changing() as changes:
        yield Taps(changes, is_own)


def in_this_thread() -> Own:
    """Returns what tells whether a call is one of this thread."""
    thread = get_ident()
    return lambda: get_ident() == thread


def _if_own(is_own: Own, function: Callable[..., Any], module: nn.Module, *passing: Any) -> Any:
    return function(module, *passing) if is_own() else None


def _instead(
    is_own: Own,
    function: Callable[..., Any],
    forward: Callable[..., Any],
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    return function(forward, *args, **kwargs) if is_own() else forward(*args, **kwargs)


def set_aside(changes: Changes, parts: Iterable[nn.Module]) -> None:
    """Lets the user's hooks sit out the runs of this thread until changes are undone.

    Those of other threads see them as before, also the hooks that hold for all modules.

    Args:
        changes: notes it.
        parts: the modules of the model.
    """
    thread = get_ident()
    for table, key, hook in users_hooks(parts):
        changes.put(table, key, partial(_unless_in, thread, hook))


def _unless_in(thread: int, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a hook, but in one thread."""
    return None if get_ident() == thread else hook(*args, **kwargs)
