"""Causal tracing: a subject drowned in noise, and which states bring the answer back.

Values of the prompts' own clean run are put in, where activation patching has another prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from insitu.display.axis import Axis
from insitu.graph.errors import OptionError, nearest
from insitu.graph.location import here
from insitu.methods.measured_run import Run
from insitu.methods.metrics import Measure, Metric, Tokens, as_metric, token_ids
from insitu.methods.progress import progress as bar
from insitu.methods.prompts import read_prompts
from insitu.methods.result import Result
from insitu.methods.sites import (
    Site,
    check_count,
    check_positions,
    layers_with,
    site_of,
    stream_of,
)
from insitu.methods.subjects import Subject, positions_of
from insitu.models.language_model import LanguageModel
from insitu.models.prompt_arguments import check_budget
from insitu.tracing.tracer import Tracer

_CHUNK = 4096  # of the vocabulary


def causal_tracing(
    model: LanguageModel,
    prompts: Any,
    subject: Subject | Sequence[Subject],
    answer: Tokens | None = None,
    *,
    metric: Metric | Callable[[Any], Any] | None = None,
    samples: int = 10,
    noise: float | None = None,
    window: int | Mapping[str, int] = 1,
    sites: str | Sequence[str] | None = None,
    layers: int | Iterable[int] | None = None,
    positions: int | Iterable[int] | None = None,
    seed: int = 0,
    progress: bool | None = None,
    max_tokens_per_pass: int | None = None,
) -> Result:
    """Returns how likely the answer is again where states of a noised run are restored.

    Meng et al. (2022), "Locating and Editing Factual Associations in GPT". Gaussian noise is added
    to the embeddings of the subject's tokens, which makes the answer unlikely. Then the values of
    the clean run are put back at one position, in one layer or a few around it, and the rest of
    the run goes on from there.

    Args:
        model: the model.
        prompts: a prompt in any form that `invoke` takes, or several, of any length.
        subject: the words that are drowned: their text as it stands in the prompt, of one token or
            several, or their positions. Of several prompts a text that all of them have, or one for
            each.
        answer: short for the metric of the paper, `metric=probability(answer)`: the token, as text
            such as " Paris" or as its id; or one for each prompt.
        metric: as of `activation_patching`, in the place of `answer`: of each noise by itself, and
            then as a mean.
        samples: how many noises there are. Each prompt, and each restored state, has the same ones:
            `torch.randn(samples, tokens of the subject, width of the embedding)` times `noise`, of
            a generator with the seed.
        noise: the standard deviation of the noise. If None three times that of the model's token
            embeddings, as in the paper: of all their entries, taken together. The paper takes them
            over the subjects of its data set, and this over the vocabulary, so that it does not
            depend on what else is traced.
        window: in how many layers at once values are restored: `window // 2` before the layer, and
            the rest from it on, as far as there are layers. Or that by site: the paper has 1 for
            states and 10 for "mlp_out" and "attention_out".
        sites: the values that are restored, by standard names. A list is an axis of the result.
            None for "residual_out", "mlp_out" and "attention_out"; in a model whose blocks
            normalise the sum, for "block_out", since nothing else that they make is added to a
            stream.
        layers: the layers in the middle of the windows; None for all that have the sites. Of a
            window those layers are restored that have them.
        positions: at which positions values are restored, from the end if negative; all if None.
        seed: of the noise.
        progress: whether a bar shows how far it is; None for on a terminal or in a notebook.
        max_tokens_per_pass: how many tokens, with padding, a pass may have; None for as many as fit
            into a quarter of the free memory.

    Returns:
        The probability of the answer, or the metric, as a mean over the samples, with the axes
        "prompt" and "site" (where several were given), "layer" and "position". `details` has
        "clean" and "corrupted", the same in the clean run and in the noised ones with nothing
        restored, `(prompt,)`, and "noise", its standard deviation.

    Raises:
        OptionError: if there is no such site, layer or position, or a number makes no sense.
        PromptError: if the subject's text is not in the prompt, or more than once, or the answer
            is no one token.

    Example:
        >>> from insitu import LanguageModel
        >>> from insitu.methods import causal_tracing
        >>> model = LanguageModel("insitu/eiffel")
        >>> prompt = "The Louvre is in the city of"
        >>> causal_tracing(model, prompt, "Louvre", " Paris", samples=2).sizes
        {'site': 3, 'layer': 6, 'position': 7}
    """
    check_positions(model)
    read = read_prompts(model, prompts)
    drowned = positions_of(model, read, subject)
    if (answer is None) is (metric is None):
        raise OptionError(
            "Give `answer`, the token whose probability is measured, or `metric`, such as "
            "`metric=lambda run: run.logits[0, -1, 5]`.",
            here(),
        )
    # The probability is measured in all rows of a run at once.
    answers = [None] * len(read) if answer is None else token_ids(model, answer, len(read))
    measured_by = None if metric is None else as_metric(metric)
    measures = [None] * len(read) if measured_by is None else measured_by.of(model, len(read))
    kept, restored_at = read.at(positions)
    if sites is None:
        stream = stream_of(model)
        sites = [stream, *(("mlp_out", "attention_out") if stream == "residual_out" else ())]
    names = [sites] if isinstance(sites, str) else list(sites)
    if not names:
        raise OptionError("`sites` is empty: name the values that are to be restored.", here())
    found = [_site(name) for name in names]
    widths = _widths(window, found)
    middles = layers_with(model, found, layers)
    windows = {
        (site, middle): _around(middle, widths[site], layers_with(model, site, None))
        for site in found
        for middle in middles
    }
    check_count("samples", samples)
    check_budget(max_tokens_per_pass)
    if noise is not None and (isinstance(noise, str) or not noise >= 0):
        raise OptionError(f"`noise` is a standard deviation, so not {noise!r}.", here())
    strength = 3 * embedding_std(model) if noise is None else float(noise)
    embed: Any = model.embedding.module

    ends: list[Any] = []
    restored: list[Any] = []
    with (
        bar("Causal tracing", progress),
        model.trace(max_tokens_per_pass=max_tokens_per_pass) as tracer,
    ):
        each = zip(read.ids, drowned, answers, measures, restored_at, strict=True)
        for ids, places, token, measure, restored_here in each:
            # A model may bring embeddings of another width to that of its stream.
            size = (samples, len(places), embed.embedding_dim)
            added = strength * torch.randn(size, generator=torch.Generator().manual_seed(seed))
            # Rows of one invocation share a pass, however many tokens they are.
            fit = max_tokens_per_pass is None or samples * len(ids) <= max_tokens_per_pass
            noises = [added] if measure is None and fit else added.split(1)
            reference: Any = None
            with tracer.invoke(ids):
                clean = {
                    (site, layer): site.read(model, layer)
                    for (site, _), window_layers in windows.items()
                    for layer in window_layers
                }
                if measured_by is not None:
                    reference = measured_by.reference(model)
                ends.append(_scored(model, token, measure, reference))

            noised = _Noised(model, tracer, ids, places, noises, token, measure, reference)
            ends.append(noised.score({}, 0))
            scores: list[Any] = []
            for (site, _), window_layers in windows.items():
                values = {(site, layer): clean[site, layer] for layer in window_layers}
                scores.extend(noised.score(values, position) for position in restored_here)
            whole: Any = torch.stack(scores)
            restored.append(whole.save())
        both: Any = torch.stack(ends)
        both = both.save()

    many = not isinstance(sites, str)
    shape = ([len(found)] if many else []) + [len(middles)]
    values = [
        scores.value.reshape(*shape, length)
        for scores, length in zip(restored, kept.lengths, strict=True)
    ]
    measured = both.value.reshape(-1, 2)
    measured = measured if read.many else measured[0]
    axes = [Axis.of("site", (site.name for site in found))] if many else []
    return Result(
        f"Causal tracing of {', '.join(site.name for site in found)}",
        "probability of the answer" if measured_by is None else measured_by.name,
        kept.stacked(values, many + 1),
        (*read.axis, *axes, Axis.of("layer", middles), kept.positions()),
        kept.tokens,
        details={
            "clean": measured[..., 0],
            "corrupted": measured[..., 1],
            "noise": torch.tensor(strength),
        },
        centre=None if read.many else float(measured[1]),
    )


def embedding_std(model: LanguageModel) -> float:
    """Returns the standard deviation of all entries of the model's token embeddings.

    They are what the embedding gives for each token of the vocabulary, also where that is scaled.

    Args:
        model: the model, which is loaded for it.
    """
    model.load()
    embed: Any = model.embedding.module
    count, total, squares = 0, 0.0, 0.0
    with torch.no_grad():
        for ids in torch.arange(embed.num_embeddings, device=model.device).split(_CHUNK):
            vectors = embed(ids[None]).double()
            count += vectors.numel()
            total += float(vectors.sum())
            squares += float(vectors.square().sum())
    return ((squares - total**2 / count) / (count - 1)) ** 0.5


@dataclass(frozen=True, slots=True)
class _Noised:
    """Runs of a prompt whose subject is drowned in noise.

    Attributes:
        model: the model.
        tracer: the open block.
        ids: the prompt, `(position,)`.
        places: the subject's positions.
        noises: the noises that are added there, `(rows, place, width)`; each in a run of its own.
        token: as of `_scored`.
        measure: as of `_scored`.
        reference: as of `_scored`.
    """

    model: LanguageModel
    tracer: Tracer
    ids: torch.Tensor
    places: list[int]
    noises: Sequence[torch.Tensor]
    token: int | None
    measure: Measure | None
    reference: Any

    def score(self, restored: Mapping[tuple[Site, int], Any], position: int) -> Any:
        """Returns the measured numbers, as a mean over noises.

        Args:
            restored: the values of the clean run that are put back, by site and layer.
            position: at which position.
        """
        found: list[Any] = []
        for noise in self.noises:
            with self.tracer.invoke(self.ids.expand(len(noise), -1)):
                _drown(self.model, self.places, noise)
                for (site, layer), value in restored.items():
                    part = site.index(position=position)
                    site.read(self.model, layer)[part] = value[part]
                found.append(_scored(self.model, self.token, self.measure, self.reference))
        if len(found) == 1:
            return found[0]
        together: Any = torch.stack(found)
        return together.mean()


def _drown(model: LanguageModel, places: list[int], added: torch.Tensor) -> None:
    """Adds noise to the embeddings at some positions, `(rows, place, width)`."""
    embedded: Any = model.embedding.output
    for number, place in enumerate(places):
        embedded[:, place] += added[:, number].type_as(embedded)


def _scored(
    model: LanguageModel, token: int | None, measure: Measure | None, reference: Any
) -> Any:
    """The measured number: the probability of a token at the last position, as a mean over rows."""
    if measure is not None:
        return measure(Run(model), reference).float()
    logits: Any = model.logits
    return logits[:, -1].float().softmax(-1)[:, token].mean()


def _around(middle: int, width: int, there: Sequence[int]) -> list[int]:
    """The layers of a window that are there."""
    first = middle - width // 2
    return [layer for layer in there if first <= layer < first + width]


def _site(name: str) -> Site:
    site = site_of(name)
    if "position" not in site.axes:
        raise OptionError(f"{name!r} has no positions at which it could be restored.", here())
    return site


def _widths(window: int | Mapping[str, int], sites: Sequence[Site]) -> dict[Site, int]:
    """How many layers are restored at once, by site.

    Raises:
        OptionError: if that is not a number from 1 on, or is said of a site that is not restored.
    """
    given = window if isinstance(window, Mapping) else {site.name: window for site in sites}
    names = [site.name for site in sites]
    for name, width in given.items():
        if name not in names:
            raise OptionError(
                f"`window` has {name!r}{nearest(name, names)}: {names} are restored.", here()
            )
        check_count("window", width)
    return {site: given.get(site.name, 1) for site in sites}
