"""One small run of a model, in which all that can be read is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from insitu.engine.probe import Call
from insitu.models.language_model import LanguageModel
from insitu.models.samples import sample_call

if TYPE_CHECKING:
    from insitu.models.model import Model

Readings = Mapping[Any, Callable[[], Any]]
"""Functions that give proxies in a block, by what they are called."""


def small_call(model: Model) -> Call | None:
    """Returns arguments for a small forward of a model, None if it is not known what it takes.

    Args:
        model: the model, with its weights.
    """
    call = sample_call(model.module, model.module.config)
    if call is None:
        return None
    weight = next(p for p in model.module.parameters() if p.is_floating_point())
    draw = torch.Generator().manual_seed(0)

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.is_floating_point():  # pixels, or a spectrogram
            value = torch.randn(value.shape, generator=draw).to(weight.dtype)
        return value if weight.is_meta else value.to(weight.device)

    return Call((), {name: moved(value) for name, value in call.kwargs.items()})


def read(
    model: Model, call: Call, readings: Readings, change: Callable[[], None] | None = None
) -> tuple[dict[Any, torch.Tensor], dict[Any, str]]:
    """Makes a forward and returns what was read in it, and why other things could not be.

    Args:
        model: the model.
        call: its arguments.
        readings: what to read.
        change: writes something in the block, before anything is read.

    Returns:
        Values, and messages, each by what the reading is called.
    """
    try:
        with _opened(model, call):
            if change is not None:
                change()
            saved = {key: reading().save() for key, reading in readings.items()}
        return {key: proxy.value for key, proxy in saved.items()}, {}
    except Exception as error:  # whatever a model makes of it: that is to be found out here
        failure = next(iter(str(error).splitlines()), type(error).__name__)
    if len(readings) == 1:
        return {}, dict.fromkeys(readings, failure)
    values: dict[Any, torch.Tensor] = {}
    failures: dict[Any, str] = {}
    for half in _halves(list(readings)):
        found, failed = read(model, call, {key: readings[key] for key in half}, change)
        values.update(found)
        failures.update(failed)
    return values, failures


def _halves(keys: Sequence[Any]) -> Iterator[Sequence[Any]]:
    middle = len(keys) // 2
    yield keys[:middle]
    yield keys[middle:]


def _opened(model: Model, call: Call) -> Any:
    """A block of one forward."""
    kwargs = dict(call.kwargs)
    if isinstance(model, LanguageModel):
        return model.trace(kwargs.pop("input_ids"), **kwargs)
    return model.trace(**kwargs)
