"""What invocations can share on a model: a batch, and the blocks up to which they are alike.

Both are tried out on the model, if its weights are there; how that is done is in `separation.py`
and `resume_trial.py`. Here is when it is done, and with what.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from insitu.batching.demand import Side
from insitu.batching.layout import Layouts
from insitu.batching.proposed_layouts import SIZES, find_layouts
from insitu.batching.shared_blocks import Chain
from insitu.engine.fallback import Fallback, tried
from insitu.engine.places import View
from insitu.engine.probe import Call
from insitu.graph.errors import ShapeError
from insitu.graph.location import here
from insitu.graph.node import SEPARATOR, Place
from insitu.models.attention import OPTION, attending
from insitu.models.later_steps import LaterSteps
from insitu.models.prompts import Prompt
from insitu.models.resume_trial import ResumeTrial
from insitu.models.separation import Separation, Trial
from insitu.models.tokens import vocabulary_of

if TYPE_CHECKING:
    from insitu.models.language_subject import LanguageSubject

_BATCH = "a batch of prompts"
_STEPS = "a generation of a batch"
_SOON_READ = 2**30  # bytes of weights
_EXCHANGES = Fallback("short prompts pass other modules than long ones")


def separation_of(
    model: LanguageSubject,
    sample: Callable[[int, int], Call],
    run: Callable[[nn.Module, Prompt], Any],
    views: Mapping[str, View],
    side: Side,
    go_on: Callable[[nn.Module, Prompt, torch.Tensor], Any] | None = None,
) -> Separation | Fallback:
    """Returns how values at sites are cut into rows and positions, or why none can be.

    It is tried once, with the weights if they are there. Without them it is read from shapes
    alone, which is enough for a plan that is not run.

    Args:
        model: the model.
        sample: gives a call with a batch size and a length.
        run: makes such a call.
        views: how outputs are shown in it.
        side: where shorter prompts are padded.
        go_on: generates given tokens `(rows, step)` behind a prompt; None if there are no steps.
    """
    key = (f"{side} {sample(*SIZES[0]).signature()}", model.loaded)
    if key not in model.traits.separations:
        model.traits.separations[key] = _find_separation(model, sample, run, views, side, go_on)
    return model.traits.separations[key]


def _find_separation(
    model: LanguageSubject,
    sample: Callable[[int, int], Call],
    run: Callable[[nn.Module, Prompt], Any],
    views: Mapping[str, View],
    side: Side,
    go_on: Callable[[nn.Module, Prompt, torch.Tensor], Any] | None,
) -> Separation | Fallback:
    """The separation, which is not known yet."""
    layouts: Layouts | None = None
    context = model.traits.reader.limits.context
    fits = context is None or context >= max(length for _, length in SIZES)
    # Of these few tokens a run without data takes longer than one with it, until the weights are
    # so many that reading them takes longer still: `proposed` makes runs of the same sizes.
    if not (model.loaded and fits and model.snapshot.weight_bytes < _SOON_READ):
        with contextlib.suppress(ShapeError):
            layouts = find_layouts([model.probe(sample(*size), views).seen for size in SIZES])
    if not model.loaded:
        if layouts is None:
            return Fallback("the shapes of a batch are known only with the weights")
        if model.snapshot.exchanges:
            return _EXCHANGES

        def supposed(owners: Collection[str]) -> Layouts:
            try:
                return find_layouts([model.probe_inside(sample(*s), views, owners) for s in SIZES])
            except ShapeError:
                return {}

        return Separation(layouts, lambda _: True, supposed)
    trial = Trial(
        partial(run, model.module),
        model.snapshot,
        views,
        side,
        vocabulary_of(model.module, model.config),
        model.traits.pad_id,
        context,
        here(),
    )

    def widens(place: Place) -> bool:
        with model.in_use():
            return tried(lambda: trial.widens(verified, place), _BATCH) is True

    def inside(owners: Collection[str]) -> Layouts:
        with model.in_use():
            inner = tried(lambda: trial.inside(owners), _BATCH)
        return {} if isinstance(inner, Fallback) else inner

    def later(owners: Collection[str]) -> LaterSteps | Fallback:
        assert go_on is not None
        forced = partial(go_on, model.module)
        with model.in_use():
            return tried(lambda: trial.later_steps(forced, model.traits.generating, owners), _STEPS)

    def differentiates() -> bool:
        places: list[Place] = [(path, "output", 0) for path in views]
        cuttable = [place for place in places if place in verified]
        if len(cuttable) < 2:
            return False
        with model.in_use():
            return tried(lambda: trial.gradients_agree(verified, cuttable), _BATCH) is True

    with model.in_use():
        found = tried(
            lambda: trial.verified(trial.proposed() if layouts is None else layouts), _BATCH
        )
    if isinstance(found, Fallback):
        return found
    verified = found
    if model.snapshot.exchanges:  # by the trial, which was of short prompts
        return _EXCHANGES
    steps = None if go_on is None else later
    return Separation(verified, widens, inside, steps, differentiates)


def chain_of(
    model: LanguageSubject, module: nn.Module, layouts: Layouts, options: Mapping[str, Any]
) -> Chain | Fallback:
    """Returns the blocks at which forwards of a model can begin, or why they cannot.

    It is tried once, and again where functions are looked at in more forwards.

    Args:
        model: the model.
        module: the wrapped module, with its weights.
        layouts: how values are cut.
        options: keyword arguments for the forwards.
    """
    views = model.traits.block_views[False]
    plain = {"use_cache": False} if model.traits.takes_use_cache else {}
    if not model.loaded:
        return Fallback("the weights are not loaded")
    if not views:
        return Fallback("its blocks are not known")
    if model.traits.is_encoder_decoder:
        return Fallback("the blocks of an encoder and a decoder are not one chain")
    if "past_key_values" not in model.traits.forward_parameters:
        return Fallback("its forward takes no keys and values")
    implementation = options.get(OPTION)
    rest = {name: value for name, value in options.items() if name != OPTION}
    if rest != plain:
        return Fallback(f"with {_listed(rest, plain)} every block runs for each prompt")
    inside = frozenset(path.partition(SEPARATOR)[0] for path, _, _ in layouts if SEPARATOR in path)
    key, known = (implementation, inside), model.traits.chains
    if key not in known:
        with model.in_use(), attending(module, implementation):
            trial = ResumeTrial(
                module,
                model.snapshot,
                views,
                layouts,
                rest,
                vocabulary_of(model.module, model.config),
                model.traits.placement.device,
                inside,
            )
            known[key] = trial.chain()
    return known[key]


def _listed(options: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    """The names of the options that are not the usual ones."""
    names = sorted(name for name in {*options, *usual} if options.get(name) != usual.get(name))
    return ", ".join(f"`{name}`" for name in names)
