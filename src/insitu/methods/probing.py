"""Probing: what can be read off activations by a linear map, learned from labelled prompts.

The maps are fitted by scikit-learn on activations that one trace gathers. Alain and Bengio 2016
(https://arxiv.org/abs/1610.01644); on what a score does not show, Belinkov 2022
(https://arxiv.org/abs/2102.12452).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, isfinite
from numbers import Real
from typing import Any, TypedDict, Unpack, overload

import torch

from insitu.deprecation import renamed
from insitu.graph.errors import MissingPackageError, OptionError
from insitu.graph.location import here
from insitu.methods.activations import (
    Positions,
    gather_each,
    position_labels,
    positions_of,
    stream_site,
)
from insitu.methods.probes import Label, Method, Probe, Probes, scored, together
from insitu.methods.progress import progress as bar
from insitu.methods.prompts import read_prompts
from insitu.methods.sites import layers_with, stream_of
from insitu.models.language_model import LanguageModel


class _Options(TypedDict, total=False):
    layers: int | Iterable[int] | None
    positions: Positions
    method: Method
    penalty: float
    held_out: float
    seed: int
    progress: bool | None
    max_tokens_per_pass: int | None


@overload
def probe(
    model: LanguageModel,
    prompts: Any,
    labels: Sequence[Label] | torch.Tensor,
    *,
    sites: str | None = None,
    **options: Unpack[_Options],
) -> Probe: ...
@overload
def probe(
    model: LanguageModel,
    prompts: Any,
    labels: Sequence[Label] | torch.Tensor,
    *,
    sites: Sequence[str],
    **options: Unpack[_Options],
) -> Probes: ...
@renamed(
    site="sites",
    kind="method",
    position="positions",
    values={"positions": {"all": None}},
    goes_in="0.3",
)
def probe(
    model: LanguageModel,
    prompts: Any,
    labels: Sequence[Label] | torch.Tensor,
    *,
    sites: str | Sequence[str] | None = None,
    layers: int | Iterable[int] | None = None,
    positions: Positions = -1,
    method: Method = "logistic",
    penalty: float = 1.0,
    held_out: float = 0.25,
    seed: int = 0,
    progress: bool | None = None,
    max_tokens_per_pass: int | None = None,
) -> Probe | Probes:
    """Learns linear maps from activations to labels, and scores them on prompts that are held out.

    Each activation is brought to mean 0 and variance 1 over the training prompts, so that one
    penalty means the same in every layer; the maps that are returned take activations as they are.

    Args:
        model: the model.
        prompts: the prompts, of any lengths.
        labels: the label of each: of a logistic probe texts, whole numbers or truth values, of a
            linear one numbers.
        sites: the standard name of the value that is read: a vector at each position, such as
            "mlp_out" or "post"; None for "residual_out", or "block_out" of blocks that normalise
            the sum. Of several there is a probe each, all from the same runs and the same training
            prompts.
        layers: in which blocks; None for all that have it.
        positions: where, from the end if negative: at one position; at several, each by itself;
            as the mean over all ("mean"); or, if None, at all, each by itself, of prompts of one
            length.
        method: "logistic", a logistic regression, scored by its accuracy; or "linear", a ridge
            regression, scored by R².
        penalty: the weight of the squared length of the map beside the loss, summed over prompts.
        held_out: which part of the prompts is not trained on. Classes are held out in proportion.
        seed: which those are.
        progress: whether a bar shows how far it is; None for on a terminal or in a notebook.
        max_tokens_per_pass: how many tokens, with padding, a pass may have; None for as many as fit
            into a quarter of the free memory.

    Returns:
        The probe; of several sites `Probes`, which has one for each: `probes["mlp_out"]`. In both
        `scores` has the scores on held-out prompts, by site if several were given, layer, and
        position if there are several. In `details` are those on training prompts ("train"), and for
        a logistic probe what always saying the most frequent class would score ("majority").

    Raises:
        MissingPackageError: if scikit-learn is not installed.
        OptionError: if labels and prompts do not go together, labels are not those of a probe
            of the method, or there is no such site, layer, method or penalty.
        PromptError: if a prompt has no such position.
    """
    _needed()
    sites = stream_of(model) if sites is None else sites
    where = positions_of(positions)
    names = [sites] if isinstance(sites, str) else list(sites)
    read, places = read_prompts(model, prompts), [stream_site(name) for name in names]
    if not places or len(set(places)) < len(places):
        raise OptionError(f"`sites` are one or several, each named once, not {names}.", here())
    given = _plain(labels)
    _check(given, len(read), method, held_out)
    _check_penalty(penalty, method)
    split = _split(given, method, held_out, seed)
    numbers = layers_with(model, places, layers)
    with bar("Reading activations", progress):
        found = gather_each(model, read, places, numbers, where, max_tokens_per_pass)
    labelled = position_labels(read, where) or ()
    classes = tuple(sorted(set(given))) if method == "logistic" else ()
    learned: list[Probe] = []
    for place, values in zip(places, found, strict=True):
        weights, biases, scores, details = _learned(values, given, split, method, penalty)
        result = scored(method, place.name, numbers, labelled, scores, details)
        maps = (weights, biases, result)
        learned.append(Probe(method, place.name, tuple(numbers), where, classes, *maps))
    return learned[0] if isinstance(sites, str) else together(learned)


def _learned(
    found: torch.Tensor,
    labels: Sequence[Any],
    split: tuple[list[int], list[int]],
    method: Method,
    penalty: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The weights and biases of all maps of a site, their scores, and what else was measured."""
    train, test = split
    shape = found.shape[1:-1]
    inputs = found.flatten(1, -2).movedim(1, 0)  # (map, prompt, width)
    fits = [_fit(x, labels, train, test, method, penalty) for x in inputs.double()]
    weights, biases, scores, trained = (
        torch.stack(parts).unflatten(0, shape).float() for parts in zip(*fits, strict=True)
    )
    details = {"train": trained}
    if method == "logistic":
        held = [labels[number] for number in test]
        most = max(sorted(set(labels)), key=[labels[number] for number in train].count)
        details["majority"] = torch.full(shape, held.count(most) / len(held))
    return weights, biases, scores, details


def _fit(
    inputs: torch.Tensor,
    labels: Sequence[Any],
    train: Sequence[int],
    test: Sequence[int],
    method: Method,
    penalty: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fits one map, and returns its weights and biases and its scores, held out and in training."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if method == "logistic":
        regression: Any = LogisticRegression(C=1 / penalty, max_iter=10_000)
    else:
        regression = Ridge(alpha=penalty)
    scaler = StandardScaler()
    fitted = make_pipeline(scaler, regression)
    values = inputs.numpy()
    fitted.fit(values[train], [labels[number] for number in train])
    scores = [
        fitted.score(values[part], [labels[number] for number in part]) for part in (test, train)
    ]
    coefficients = torch.as_tensor(regression.coef_, dtype=torch.float64).reshape(
        -1, inputs.shape[-1]
    )
    weights = coefficients / torch.as_tensor(scaler.scale_)
    biases = torch.as_tensor(regression.intercept_, dtype=torch.float64).reshape(-1)
    biases = biases - weights @ torch.as_tensor(scaler.mean_)
    return weights, biases, torch.tensor(scores[0]), torch.tensor(scores[1])


def _split(
    labels: Sequence[Any], method: Method, held_out: float, seed: int
) -> tuple[list[int], list[int]]:
    """Which prompts are trained on and which are held out."""
    from sklearn.model_selection import train_test_split

    stratify = labels if method == "logistic" else None
    try:
        train, test = train_test_split(
            range(len(labels)), test_size=held_out, random_state=seed, stratify=stratify
        )
    except ValueError as error:
        raise OptionError(f"The prompts cannot be divided: {error}", here()) from None
    if stratify is not None:
        learned = {labels[number] for number in train}
        lost = next((label for label in sorted(set(labels)) if label not in learned), None)
        if lost is not None:  # the maps would be of fewer classes than there are
            raise OptionError(
                f"The prompts cannot be divided: no prompt with the label {lost!r} is left to "
                "train on. Give more of them, or a smaller `held_out`.",
                here(),
            )
    return list(train), list(test)


def _check(labels: Sequence[Any], count: int, method: str, held_out: float) -> None:
    if method not in ("logistic", "linear"):
        raise OptionError(f"A probe is 'logistic' or 'linear', not {method!r}.", here())
    if len(labels) != count:
        raise OptionError(f"There are {len(labels)} labels for {count} prompts.", here())
    if not 0 < held_out < 1:
        raise OptionError(f"`held_out` is a part of the prompts, not {held_out!r}.", here())
    for label in labels:
        if not isinstance(label, str | int | float):
            raise OptionError(
                f"A label is one text, number or truth value for a prompt, not {label!r}.", here()
            )
    texts = sum(isinstance(label, str) for label in labels)
    if method == "linear":
        if texts:
            raise OptionError(
                "A linear probe has numbers as labels: see `method='logistic'`.", here()
            )
        for label in labels:
            if not isfinite(label):
                raise OptionError(f"A linear probe cannot be fitted to a label {label!r}.", here())
    elif 0 < texts < count:
        raise OptionError("Labels are all texts or all numbers, and these are both.", here())
    elif not all(isinstance(label, str) or float(label).is_integer() for label in labels):
        raise OptionError(
            "The labels of a logistic probe are classes, and numbers that are not whole are none: "
            "see `method='linear'`.",
            here(),
        )
    if method == "logistic" and len(set(labels)) < 2:
        raise OptionError(f"All prompts have one label, {labels[0]!r}.", here())


def _plain(labels: Sequence[Label] | torch.Tensor) -> list[Any]:
    """Labels as Python's own values, also those of torch, NumPy and pandas."""
    given: Any = labels
    if hasattr(given, "tolist"):
        return given.tolist()
    return [label.item() if getattr(label, "ndim", None) == 0 else label for label in given]


def _check_penalty(penalty: float, method: Method) -> None:
    least_squares = method == "linear" and penalty == 0
    if not least_squares and not (isinstance(penalty, Real) and 0 < penalty < inf):
        raise OptionError(
            f"`penalty` is a number above 0, or 0 for a linear probe without one, not {penalty!r}.",
            here(),
        )


def _needed() -> None:
    """Raises if scikit-learn is not there."""
    try:
        import sklearn  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        raise MissingPackageError(
            "Probes are fitted by scikit-learn, which is not installed: "
            "`pip install 'insitu[probe]'`.",
            here(),
        ) from None
