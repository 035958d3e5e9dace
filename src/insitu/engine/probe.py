"""What every module of a tree takes and returns, found by a run on fake tensors.

The module's parameters and buffers are replaced by fake ones on the CPU for the duration of one
call, so nothing is computed, nothing is allocated and a module without weights does as well.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from insitu.engine.contents import Contents, has_contents
from insitu.engine.counting import Counting, Counts
from insitu.engine.functions import Called, returns_tensors
from insitu.engine.interpose import tapped
from insitu.engine.keeping import fake_weights
from insitu.engine.listening import listening
from insitu.engine.places import View
from insitu.graph.changes import changing
from insitu.graph.errors import UnknownShapeError
from insitu.graph.fake_tensors import Fakes, on_fake_tensors
from insitu.graph.node import Place
from insitu.graph.objects import form_of_object, is_object, map_objects, tensors_within
from insitu.graph.structure import map_structure

Ambient = tuple[torch.dtype | None, ...]
"""The default dtype, and that of autocast on each kind of device, None where it is off."""

_KINDS = ("cpu", "cuda")


def ambient() -> Ambient:
    """Returns the settings that are in force."""
    return (torch.get_default_dtype(), *map(autocast_dtype, _KINDS))


def autocast_dtype(kind: str) -> torch.dtype | None:
    """Returns the dtype of autocast on a kind of device, None if it is off.

    Args:
        kind: the kind, such as "cuda".
    """
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class Call(NamedTuple):
    """The arguments of a call of the wrapped module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def signature(self) -> str:
        """Returns a string that is equal for calls with arguments of equal shapes and dtypes."""

        def leaf(item: Any) -> Any:
            if isinstance(item, torch.Tensor):
                return f"{item.dtype}{tuple(item.shape)}"
            return form_of_object(item)

        return repr(map_structure(leaf, (self.args, self.kwargs)))

    def contents(self) -> str:
        """Returns a string that is equal for calls with equal integers in their tensors."""

        def leaf(item: Any) -> Any:
            return item.tolist() if has_contents(item) else None

        return repr([*map(leaf, tensors_within((self.args, self.kwargs)))])

    def has_objects(self) -> bool:
        """Returns whether objects with attributes are among the arguments, such as a cache."""
        found: list[Any] = []

        def leaf(item: Any) -> None:
            if is_object(item):
                found.append(item)

        map_structure(leaf, (self.args, self.kwargs))
        return bool(found)


class Probe(NamedTuple):
    """What passed in a run on fake tensors.

    Attributes:
        seen: what passed each place, in the order in which it did.
        returned: what each module returned, where `seen` holds how it is shown.
        called: the torch functions that one module's forward called, if they were asked for.
        moments: when each place was passed, by a number that grows.
    """

    seen: Mapping[Place, Any]
    returned: Mapping[str, Any]
    called: Sequence[Called]
    moments: Mapping[Place, int]


def probe(
    module: nn.Module,
    call: Call,
    modules: Mapping[str, nn.Module],
    views: Mapping[str, View],
    inside: str | None = None,
    contents: bool = False,
    caches: Collection[str] = (),
    kind: str = "cpu",
    owners: Collection[str] = (),
) -> Probe:
    """Runs a module on fake tensors and returns what passed its sites.

    Args:
        module: the module; on any device, the meta device too. It is changed for the duration,
            so the caller must hold it (see `exclusive`).
        call: what to call it with; the tensors' shapes and dtypes count.
        modules: its tree, by path.
        views: how outputs are shown, by path.
        inside: the module in whose forward the calls of torch functions are wanted too.
        contents: whether integers in the call's tensors count too. It takes longer.
        caches: the Python modules of caches: what they call is not a forward's own.
        kind: the kind of device that the module is on.
        owners: the modules in whose forwards the functions have places too.

    Raises:
        UnknownShapeError: if the module cannot be run without data.
    """
    seen: dict[Place, Any] = {}
    called: list[Called] = []
    device, casting = _autocast(kind)

    def tell(place: Place, value: Any) -> None:
        seen[place] = value

    def visit(name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = function(*args, **kwargs)
        called.append(Called(name, (args, kwargs), result))
        return result

    def run(*args: Any, **kwargs: Any) -> None:
        with tapped() as taps:
            taps.enter(casting)
            if inside is not None:
                taps.functions(modules[inside], visit, caches)
            module(*args, **kwargs)

    try:
        with listening(modules, views, tell, owners, caches) as returned:
            fake_run(module, call, contents, run, device)
    except Exception as error:  # whatever a model makes of tensors without data
        raise UnknownShapeError(
            "Shapes of this model cannot be found without running it "
            f"({type(error).__name__}: {error}). Save the value and look at its shape after the "
            "block."
        ) from error
    shown = [call for call in called if returns_tensors(call.output)]
    moments = {place: moment for moment, place in enumerate(seen)}
    return Probe(seen, returned, shown, moments)


def count(module: nn.Module, call: Call) -> Counts:
    """Runs a module on fake tensors and returns what that takes.

    Args:
        module: the module; it is changed for the duration, as in `probe`.
        call: what to call it with; the tensors' shapes and dtypes count.

    Raises:
        UnknownShapeError: if the module cannot be run without data.
    """

    def run(*args: Any, **kwargs: Any) -> Counts:
        counting = Counting()
        with changing() as changes:
            changes.enter(counting)
            output = module(*args, **kwargs)
            found = counting.counts  # while the output is there, which counts too
            del output
            return found

    try:
        return fake_run(module, call, forward=run)
    except Exception as error:  # whatever a model makes of tensors without data
        raise UnknownShapeError(
            f"What a forward takes cannot be counted without running it "
            f"({type(error).__name__}: {error})."
        ) from error


def fake_call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Calls a module on fake tensors, in the fake mode that is active.

    Args:
        module: the module; it is changed for the duration, as in `probe`.
        args: its arguments.
        kwargs: its keyword arguments.
    """
    with fake_weights(module, _fake):
        return module(*args, **kwargs)


def fake_run(
    module: nn.Module,
    call: Call,
    contents: bool = False,
    forward: Callable[..., Any] | None = None,
    device: str = "cpu",
) -> Any:
    """Calls a module on fake tensors, in a fake mode of its own, and returns what it returns.

    Args:
        module: the module; it is changed for the duration, as in `probe`.
        call: its arguments; the tensors' shapes and dtypes count.
        contents: whether integers in the call and in the weights count too. It takes longer.
        forward: the function called in the place of the module, with fake tensors; it calls the
            module.
        device: the kind of device that the fake tensors are on.
    """
    known = Contents() if contents else None

    def leaf(item: torch.Tensor) -> torch.Tensor:
        fake = _fake(item, device)
        if known is not None and has_contents(item):
            known.give(fake, item)
        return fake

    mode = Fakes()
    with on_fake_tensors(mode, known), fake_weights(module, leaf):
        # Of objects too: a forward may fill a cache of the user's, or append to it.
        args, kwargs = map_objects(leaf, tuple(call))
        return (module if forward is None else forward)(*args, **kwargs)


def fake_result(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Returns what a module's forward would return, as fake tensors.

    Args:
        module: the module; it is changed for the duration, as in `probe`.
        forward: its forward.
        args: the arguments of a call; the tensors' shapes and dtypes count.
        kwargs: the keyword arguments of the call.

    Raises:
        UnknownShapeError: if that cannot be known without data.
    """
    call = Call(args, dict(kwargs))
    try:
        # Without contents first: keeping them slows each function down.
        return fake_run(module, call, forward=forward)
    except Exception:  # some modules ask what integers say, and some kernels are not for fakes
        pass
    try:
        return fake_run(module, call, True, forward)
    except Exception as error:  # whatever a model makes of tensors without data
        raise UnknownShapeError(
            "What it returns in this step cannot be known without running it "
            f"({type(error).__name__}: {error}): write its output instead."
        ) from error


def _fake(tensor: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    """A fake tensor like another, in the fake mode that is active."""
    # On the CPU, not on the meta device: masks, `generate` and some rotary embeddings fail there.
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def _autocast(kind: str) -> tuple[str, AbstractContextManager[Any]]:
    """On which kind of device to run without data, and in which context.

    Autocast does other things on each. What a model is told of it is that of its own kind.
    """
    if kind in ("cpu", "meta") or not torch.amp.is_autocast_available(kind):
        return "cpu", nullcontext()
    # Autocast of the CPU must not stand in for that of a device where it is off.
    if autocast_dtype(kind) is None:
        return "cpu", torch.autocast("cpu", enabled=False)
    return kind, nullcontext()
