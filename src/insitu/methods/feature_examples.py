"""In which contexts features are largest: the first thing to look at to see what one stands for.

Activations are read from a folder that `insitu.harvest` has written, once from the first row to
the last; the model does not run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from insitu.deprecation import renamed
from insitu.graph.errors import OptionError, ShapeError
from insitu.graph.location import here
from insitu.methods.examples import FeatureExample, FeatureExamples
from insitu.methods.progress import progress as bar
from insitu.methods.prompts import words
from insitu.methods.sae import SparseAutoencoder
from insitu.methods.sites import check_count, chosen
from insitu.models.language_model import LanguageModel
from insitu.models.tokens import vocabulary_of

_NUMBERS = 2**22
"""How many features of rows are computed at once: 16 MB of them."""

_PER_FEATURE = ("W_enc", "b_enc", "threshold", "b_gate", "b_mag", "r_mag")


@renamed(k="top", goes_in="0.3")
def feature_examples(
    activations: Any,
    sae: SparseAutoencoder | None,
    features: int | Sequence[int],
    *,
    top: int = 10,
    context: int = 16,
    site: str | None = None,
    model: LanguageModel | None = None,
    progress: bool | None = None,
) -> FeatureExamples:
    """Returns the contexts in which features are largest, in activations of a data set.

    Of each sequence there is at most one example, where the feature is largest in it; of several
    that are as large, those come first that come first in the data. Places at which a feature is
    not above 0 are no examples.

    Args:
        activations: an `insitu.harvest.Activations`, with all positions of each sequence.
        sae: the sparse autoencoder of the features; None if the site itself keeps the largest
            features, as one such as `SaeSite` does.
        features: the number of a feature, or several.
        top: how many examples of each feature.
        context: how many tokens are shown on either side, as far as they are of the same document.
        site: which site of the activations; None if there is but one.
        model: whose tokenizer makes words of token ids; None to show the ids.
        progress: whether a bar shows how far it is; None for on a terminal or in a notebook.

    Returns:
        The examples of each feature, the largest first.

    Raises:
        OptionError: if there is no such feature, the site is not named although there are several,
            only some positions of sequences were kept, or the model lacks tokens that are there.
        ShapeError: if the sparse autoencoder is of another width than the site.

    Example:
        `feature_examples(Activations.open(folder), sae, [3, 17], model=model)`
    """
    reading = _Reading(activations, sae, features, site)
    check_count("top", top)
    check_count("context", context, 0)
    best = _Best(len(reading.numbers), top)
    with bar("Looking for examples", progress) as shown:
        for first, stop, sequence in _parts(activations, reading.rows_at_once):
            best.add(reading.values(slice(first, stop)), sequence, first)
            shown.reached(stop, activations.rows)
    found: list[tuple[FeatureExample, ...]] = []
    for at, number in enumerate(reading.numbers):
        values, rows = best.of(at)
        own = [reading.example(at, number, row, context, model) for row in rows]
        found.append(tuple(replace(o, value=v) for o, v in zip(own, values, strict=True)))
    return FeatureExamples(
        reading.site,
        tuple(reading.numbers),
        tuple(found),
        tuple(best.counts.tolist()),
        activations.rows,
    )


class _Reading:
    """Features of rows of a folder.

    Attributes:
        site: the label of the site.
        numbers: the numbers of the features.
        rows_at_once: how many rows are read at once.
    """

    def __init__(
        self, activations: Any, sae: SparseAutoencoder | None, features: Any, site: str | None
    ) -> None:
        if not hasattr(activations, "specification"):
            raise OptionError(
                "Examples are looked for in an `insitu.harvest.Activations`: "
                f"`Activations.open(folder)`, not {activations!r:.80}.",
                here(),
            )
        if activations.specification.reduce is not None:
            raise OptionError(
                "These activations are of some positions of each sequence only, and examples take "
                "all: harvest without `reduce`.",
                here(),
            )
        if site is None and len(activations.sites) > 1:
            raise OptionError(
                f"There are several sites: name one of {list(activations.sites)} with `site=`.",
                here(),
            )
        self._activations = activations
        self.site: str = activations.sites[0] if site is None else site
        told = activations.site(self.site)
        if (told.features is None) == (sae is None):
            raise OptionError(
                f"{self.site!r} holds whole activations: give the sparse autoencoder of the "
                "features."
                if sae is None
                else f"{self.site!r} holds features already: give None for `sae`.",
                here(),
            )
        count = told.features if sae is None else sae.n_features
        self.numbers = list(dict.fromkeys(chosen("feature", features, count)))
        self._sae = sae
        wide = len(self.numbers)
        if sae is not None:
            width = torch.Size(told.shape).numel()
            if width != sae.width:
                raise ShapeError(
                    f"{self.site!r} is {width} wide, and the sparse autoencoder {sae.width}.",
                    here(),
                )
            wide = width + sae.n_features
            if sae.architecture != "topk":  # each feature is computed by itself
                self._sae, wide = _only(sae, self.numbers), width + len(self.numbers)
        self.rows_at_once = max(_NUMBERS // wide, 1)

    def values(self, rows: Any) -> torch.Tensor:
        """Returns how large the features are at some rows, float32 `(rows, feature)`."""
        taken = self._activations[self.site][rows]
        if self._sae is None:
            wanted = torch.tensor(self.numbers, dtype=taken.indices.dtype)
            same = taken.indices[:, :, None] == wanted
            return (taken.values.float()[:, :, None] * same).sum(1)
        with torch.no_grad():
            device = self._sae.weights["W_enc"].device
            found = self._sae.encode(taken.flatten(1).to(device)).float().cpu()
        return found if found.shape[1] == len(self.numbers) else found[:, self.numbers]

    def example(
        self, at: int, number: int, row: int, context: int, model: LanguageModel | None
    ) -> FeatureExample:
        """Returns the place of a row, with the tokens around it."""
        read = self._activations
        first, stop = max(row - context, 0), min(row + context + 1, read.rows)
        sequence, document = read.sequence[first:stop], read.document[first:stop]
        own = (sequence == sequence[row - first]) & (document == document[row - first])
        kept = own.nonzero().flatten()
        first, stop = first + int(kept[0]), first + int(kept[-1]) + 1
        ids = read.token_ids[first:stop].long()
        values = self.values(slice(first, stop))[:, at]
        texts = tuple(map(str, ids.tolist())) if model is None else self._words(model, ids)
        return FeatureExample(
            number,
            float(values[row - first]),
            row,
            int(read.sequence[row]),
            int(read.position[row]),
            int(read.document[row]),
            texts,
            ids,
            values.clone(),
            row - first,
        )

    def _words(self, model: LanguageModel, ids: torch.Tensor) -> tuple[str, ...]:
        count = vocabulary_of(model.module, model.config)
        if not 0 <= int(ids.min()) <= int(ids.max()) < count:
            raise OptionError(
                f"The model has {count} tokens, and the activations are of token "
                f"{int(ids.max())}: give the model that they were taken from, "
                f"{self._activations.specification.model!r:.80}.",
                here(),
            )
        return words(model, ids.tolist())


class _Best:
    """The largest values so far of each feature, one of each sequence.

    Attributes:
        counts: at how many rows each is above 0.
    """

    def __init__(self, features: int, top: int) -> None:
        self._top = top
        self._values = torch.zeros(0, features)
        self._rows = torch.zeros(0, features, dtype=torch.long)
        self.counts = torch.zeros(features, dtype=torch.long)

    def add(self, values: torch.Tensor, sequence: torch.Tensor, first: int) -> None:
        """Takes the values of whole sequences, `(rows, feature)`, from a row on."""
        values = values.nan_to_num(nan=0.0)
        self.counts += (values > 0).sum(0)
        _, lengths = sequence.unique_consecutive(return_counts=True)
        starts = [0, *lengths.cumsum(0).tolist()]
        largest, rows = [self._values], [self._rows]
        for start, stop in pairwise(starts):
            part = values[start:stop]
            at = part.argmax(0)
            largest.append(part.gather(0, at[None]))
            rows.append(at[None] + first + start)
        # Stable, so that of those that are alike the first in the data come first.
        order = torch.cat(largest).sort(stable=True, dim=0, descending=True)
        self._values = order.values[: self._top]
        self._rows = torch.cat(rows).gather(0, order.indices[: self._top])

    def of(self, feature: int) -> tuple[list[float], list[int]]:
        """Returns the values of a feature above 0, and their rows."""
        kept = self._values[:, feature] > 0
        return self._values[kept, feature].tolist(), self._rows[kept, feature].tolist()


def _parts(activations: Any, rows: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Cuts rows into parts of whole sequences: the first row, the end, and the sequences."""
    first = 0
    while first < activations.rows:
        size = rows
        sequence = activations.sequence[first : first + size]
        while first + size < activations.rows and bool(sequence[0] == sequence[-1]):
            size *= 2  # a sequence that is longer than a part
            sequence = activations.sequence[first : first + size]
        stop = first + len(sequence)
        if stop < activations.rows:
            # The last one may go on behind the part.
            kept = int((sequence != sequence[-1]).sum())
            sequence, stop = sequence[:kept], first + kept
        yield first, stop, sequence
        first = stop


def _only(sae: SparseAutoencoder, features: Sequence[int]) -> SparseAutoencoder:
    """A sparse autoencoder with some of its features. None of them depends on the others."""
    weights = dict(sae.weights)
    index = torch.tensor(features, device=weights["W_enc"].device)
    for name in _PER_FEATURE:
        if name in weights:
            weights[name] = weights[name].index_select(-1, index)
    weights["W_dec"] = weights["W_dec"].index_select(0, index)
    return replace(sae, weights=weights)
