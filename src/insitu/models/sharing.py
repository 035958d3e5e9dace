"""What invocations can share on a model: a batch, and the blocks up to which they are alike.

Both are tried out on the model, if its weights are there; how that is done is in `separation.py`
and `chain.py`. Here is when it is done, and with what.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from insitu.graph.errors import ShapeError
from insitu.graph.location import here
from insitu.models.attention import OPTION, attending
from insitu.models.chain import find_chain
from insitu.models.prompts import Prompt, Side
from insitu.models.separation import Separation, Trial
from insitu.models.tokens import vocabulary_of
from insitu.runtime.branches import Chain
from insitu.runtime.hooks import Place, View
from insitu.runtime.inside import SEPARATOR
from insitu.runtime.layout import Layouts, find_layouts
from insitu.runtime.probe import Call

if TYPE_CHECKING:
    from insitu.models.language_model import LanguageModel


def find_separation(
    model: LanguageModel,
    calls: Sequence[Call],
    run: Callable[[nn.Module, Prompt], Any],
    views: Mapping[str, View],
    side: Side,
) -> Separation | None:
    """Returns how values at sites are cut into rows and positions, or None if none can be.

    Args:
        model: the model.
        calls: of the different sizes of `SIZES`.
        run: makes a call.
        views: how outputs are shown in it.
        side: where shorter prompts are padded.
    """
    layouts: Layouts | None = None
    with contextlib.suppress(ShapeError):
        layouts = find_layouts([model.probe(call, views).seen for call in calls])
    if not model.loaded:
        if layouts is None or model.snapshot.exchanges:
            return None
        return Separation(layouts, lambda _: True, lambda _: {})
    trial = Trial(
        partial(run, model.module),
        model.modules,
        views,
        side,
        vocabulary_of(model.module, model.config),
        model.pad_id,
        model.reader.limits.context,
        here(),
    )

    def widens(place: Place) -> bool:
        with model.in_use():
            try:
                return trial.widens(found, place)
            except Exception:  # whatever the model makes of it: then it is not to be run so
                return False

    def inside(owners: Collection[str]) -> Layouts:
        with model.in_use():
            try:
                return trial.inside(owners)
            except Exception:  # as above
                return {}

    found: Layouts = {}
    with model.in_use():
        try:
            found = trial.verified(trial.proposed() if layouts is None else layouts)
        except Exception:  # as above
            return None
    # The trial was of short prompts, which pass other modules than long ones.
    return None if model.snapshot.exchanges else Separation(found, widens, inside)


def find_shared_chain(
    model: LanguageModel,
    module: nn.Module,
    layouts: Layouts,
    options: Mapping[str, Any],
    known: dict[Hashable, Chain | None],
) -> Chain | None:
    """Returns the blocks at which forwards of a model can begin, None if they cannot.

    Args:
        model: the model.
        module: the wrapped module, with its weights.
        layouts: how values are cut.
        options: keyword arguments for the forwards.
        known: what was found before, of which this is to be a part.
    """
    views = model.block_views[False]
    plain = {"use_cache": False} if model.takes_use_cache else {}
    if not model.loaded or not views or "past_key_values" not in model.forward_parameters:
        return None
    if model.is_encoder_decoder:  # its blocks are not one chain
        return None
    implementation = options.get(OPTION)
    rest = {name: value for name, value in options.items() if name != OPTION}
    if rest != plain or model.has_hooks:  # these are to see all blocks and positions
        return None
    inside = frozenset(path.partition(SEPARATOR)[0] for path, _, _ in layouts if SEPARATOR in path)
    key = (implementation, inside)
    if key not in known:
        with model.in_use(), attending(module, implementation):
            known[key] = find_chain(
                module,
                model.modules,
                views,
                layouts,
                rest,
                vocabulary_of(model.module, model.config),
                model.device,
                inside,
            )
    return known[key]
