"""The logit lens: what a model would predict if it stopped after a block.

nostalgebraist, "interpreting GPT: the logit lens", 2020. The model turns the output of its last
block into logits: by the final norm, the unembedding, and all else that it has, such as a soft cap.
The lens does the same to the output of each block. So the last row is what the model itself
predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from insitu.display.axis import Axis
from insitu.graph.errors import OptionError
from insitu.graph.location import here
from insitu.methods.metrics import Tokens, token_ids
from insitu.methods.progress import progress as bar
from insitu.methods.prompts import read_prompts, words
from insitu.methods.readout import Readout, check_edits, readout_of
from insitu.methods.result import Result
from insitu.methods.sites import Site, check_count, chosen, site_of, stream_of
from insitu.models.language_model import LanguageModel

Translate = Callable[[int, Any], Any]
"""From the number of a stage and hidden states `(1, position, d_model)` there to the hidden states
that are read out in their place. Both may be proxies."""

_STREAM = ("position", "d_model")


@dataclass(frozen=True, slots=True)
class Stage:
    """A place in the residual stream that is looked at.

    Attributes:
        number: how many blocks come before it: 0 for the embedding.
        label: what it is called on the axis of layers.
        site: the site that is read there.
        layer: in which block.
    """

    number: int
    label: str
    site: Site
    layer: int

    def read(self, model: LanguageModel) -> Any:
        """Returns its proxy, `(1, position, d_model)`, in an open invocation."""
        return self.site.read(model, self.layer)


def logit_lens(
    model: LanguageModel,
    prompts: Any,
    *,
    site: str | None = None,
    layers: int | Iterable[int] | None = None,
    positions: int | Iterable[int] | None = None,
    token: Tokens | None = None,
    top: int = 10,
    progress: bool | None = None,
    max_tokens_per_pass: int | None = None,
) -> Result:
    """Returns what a model would predict from the residual stream after each block.

    Args:
        model: the model.
        prompts: one prompt or several, in any form that `invoke` takes.
        site: the value that is read in each block, of the width of the residual stream. "mlp_out"
            shows what one MLP alone speaks for. None is "residual_out", or "block_out" of blocks
            that normalise the sum.
        layers: which blocks; None for all, and before them the embedding: what the first block is
            given, where that is the residual stream.
        positions: which positions, from the end if negative; None for all.
        token: the token whose probability is the value of a cell, as text or id, or one for each
            prompt; None for the most likely token of each cell.
        top: how many of the most likely tokens are kept in the details.
        progress: whether a bar shows how far it is; None for on a terminal or in a notebook.
        max_tokens_per_pass: how many tokens, with padding, a pass may have; None for as many as fit
            into a quarter of the free memory.

    Returns:
        Probabilities with the axes layer and position, before them prompt if several were given.
        The texts are the most likely tokens. In the details there are `ids` and `probabilities` of
        the `top` most likely tokens, with one axis more, most likely first; ids are -1 where a
        prompt has no position.

    Raises:
        OptionError: if there is no such site, layer, position or token.
        PathError: if the model's blocks have no such value, as those that normalise the sum
            have no `residual_mid`.

    Example:
        >>> from insitu import LanguageModel
        >>> from insitu.methods import logit_lens
        >>> model = LanguageModel("insitu/eiffel", device_map="cpu")
        >>> lens = logit_lens(model, "The Eiffel Tower is in the city of")
        >>> lens.sizes, lens.select(layer=-1, position=-1).texts
        ({'layer': 7, 'position': 8}, (' Paris',))
    """
    site = stream_of(model) if site is None else site
    return look(
        model,
        prompts,
        "Logit lens" if site == "residual_out" else f"Logit lens of {site}",
        stages_of(model, site, layers),
        lambda number, value: value,
        positions,
        token,
        top,
        progress,
        max_tokens_per_pass,
    )


def stages_of(model: LanguageModel, site: str, layers: int | Iterable[int] | None) -> list[Stage]:
    """Returns the places that a lens looks at, first to last.

    Args:
        model: the model.
        site: as of `logit_lens`.
        layers: as of `logit_lens`.

    Raises:
        OptionError: if there is no such site or layer.
    """
    found = site_of(site)
    if found.axes != _STREAM:
        raise OptionError(
            f"A lens reads values as wide as the residual stream, which {site!r} is not: "
            '"residual_out", "residual_mid", "attention_out" or "mlp_out".',
            here(),
        )
    after = site != "residual_in"
    numbers = chosen("layer", layers, model.n_layers)
    stages = [Stage(layer + after, str(layer), found, layer) for layer in numbers]
    if layers is None and site == "residual_out":
        stages.insert(0, Stage(0, "embedding", site_of("residual_in"), 0))
    return stages


def look(
    model: LanguageModel,
    prompts: Any,
    title: str,
    stages: Sequence[Stage],
    translate: Translate,
    positions: int | Iterable[int] | None,
    token: Tokens | None,
    top: int,
    progress: bool | None,
    max_tokens_per_pass: int | None,
) -> Result:
    """Returns the readout of each stage.

    Args:
        model: the model.
        prompts: as of `logit_lens`.
        title: that of the result.
        stages: where to look.
        translate: changes hidden states before they are read out.
        positions: as of `logit_lens`.
        token: as of `logit_lens`.
        top: as of `logit_lens`.
        progress: as of `logit_lens`.
        max_tokens_per_pass: as of `logit_lens`.
    """
    readout = readout_of(model)
    given = read_prompts(model, prompts)
    check_edits(model, given, max_tokens_per_pass)
    looked, places = given.at(positions)
    wanted = None if token is None else token_ids(model, token, len(given))
    check_count("top", top)
    top = min(top, model.vocab_size)
    kept: list[list[tuple[Any, ...]]] = []
    with bar(title, progress), model.trace(max_tokens_per_pass=max_tokens_per_pass) as tracer:
        for number, ids in enumerate(given.ids):
            one = None if wanted is None else wanted[number]
            with tracer.invoke(ids):
                seen = (
                    _seen(readout, translate(stage.number, _at(stage.read(model), places[number])))
                    for stage in stages
                )
                kept.append([_kept(probabilities, one, top) for probabilities in seen])
    values, probabilities, ids = (
        looked.stacked([torch.stack([cell[part].value for cell in cells]) for cells in kept], 1)
        for part in range(3)
    )
    return Result(
        title,
        "probability",
        values,
        (*given.axis, Axis.of("layer", [stage.label for stage in stages]), looked.positions()),
        looked.tokens,
        _texts(model, ids[..., 0]),
        {"ids": ids, "probabilities": probabilities},
    )


def _at(value: Any, places: Sequence[int]) -> Any:
    return value[:, list(places)]


def _seen(readout: Readout, value: Any) -> Any:
    """Probabilities `(position, vocabulary)`."""
    return readout.recorded(value)[0].float().softmax(-1)


def _kept(probabilities: Any, wanted: int | None, top: int) -> tuple[Any, ...]:
    """The saved parts of probabilities, which are gone before those of the next stage are there."""
    best = probabilities.topk(top)
    value = best.values[:, 0] if wanted is None else probabilities[:, wanted]
    return value.save(to="cpu"), best.values.save(to="cpu"), best.indices.save(to="cpu")


def _texts(model: LanguageModel, ids: torch.Tensor) -> tuple[str, ...]:
    """Token ids as text, "" where there is none."""
    numbers = ids.flatten().tolist()
    known = sorted(set(numbers) - {-1})
    named = dict(zip(known, words(model, known), strict=True))
    return tuple(named.get(number, "") for number in numbers)
