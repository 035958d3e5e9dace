"""Steering: a direction found in contrastive prompts, added to what the model computes.

`steering_vector` finds it, `steer` generates with it. Turner et al. 2023
(https://arxiv.org/abs/2308.10248), Rimsky et al. 2023 (https://arxiv.org/abs/2312.06681), Zou et
al. 2023 (https://arxiv.org/abs/2310.01405).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec
import torch

from insitu.deprecation import renamed
from insitu.graph.errors import OptionError, ShapeError
from insitu.graph.location import here
from insitu.methods import files
from insitu.methods.activations import gather, stream_site
from insitu.methods.progress import progress as bar
from insitu.methods.prompts import read_prompts
from insitu.methods.sites import chosen, numbers_of, stream_of, whole
from insitu.models.language_model import LanguageModel

if TYPE_CHECKING:
    from typing import Self

Method: TypeAlias = Literal["difference of means", "principal component"]

_KIND = "steering vector"
_METHODS = ("difference of means", "principal component")


class _Told(msgspec.Struct):
    """What a file keeps of a vector beside its tensor: fields as of `SteeringVector`."""

    site: str
    layers: tuple[int, ...]
    method: str
    position: int | str
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class SteeringVector:
    """A direction in each of some layers.

    It can be multiplied with a number, negated, and added to another of the same layers.

    Attributes:
        site: the standard name of where it was found and is added, such as "residual_out".
        layers: the blocks, from 0.
        vectors: `(layer, width)`, float32.
        method: how it was made.
        position: where in the prompts: a number, or "mean".
        count: how many prompts it was made of, positive and negative together.
    """

    site: str
    layers: tuple[int, ...]
    vectors: torch.Tensor
    method: str = "given"
    position: int | str = -1
    count: int = 0

    def __post_init__(self) -> None:
        stream_site(self.site)
        given: Any = self.layers
        if not isinstance(given, tuple):  # one layer, as its number
            raise OptionError(
                "`layers` is a tuple with a row of `vectors` for each: of one direction, "
                f"`SteeringVector({self.site!r}, (4,), direction[None])`, and not {given!r:.80}.",
                here(3),
            )
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.layers):
            raise ShapeError(
                f"Vectors of {len(self.layers)} layers have the shape ({len(self.layers)}, width), "
                f"not {tuple(self.vectors.shape)}.",
                here(3),
            )

    def __repr__(self) -> str:
        where = f"{_listed(self.layers)}, width {self.vectors.shape[1]}"
        return f"<Steering vector of {self.site}: {self.method}, {where}>"

    def __getitem__(self, layer: int) -> torch.Tensor:
        """Returns the vector of a layer, `(width,)`."""
        if layer not in self.layers:
            raise OptionError(
                f"The vector has no layer {layer}, but {_listed(self.layers)}.", here()
            )
        return self.vectors[self.layers.index(layer)]

    def __mul__(self, factor: float) -> SteeringVector:
        return replace(self, vectors=self.vectors * factor)

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> SteeringVector:
        return replace(self, vectors=self.vectors / factor)

    def __neg__(self) -> SteeringVector:
        return self * -1

    def __add__(self, other: SteeringVector) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        if (self.site, self.layers) != (other.site, other.layers):
            raise OptionError(
                f"A vector of {self.site} in {_listed(self.layers)} and one of {other.site} in "
                f"{_listed(other.layers)} do not add up: `select` layers that both have.",
                here(),
            )
        both = self.vectors + other.vectors
        return replace(self, vectors=both, method="sum", count=self.count + other.count)

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self + -other if isinstance(other, SteeringVector) else NotImplemented

    def normalised(self) -> SteeringVector:
        """Returns it with the length 1 in each layer."""
        return replace(self, vectors=torch.nn.functional.normalize(self.vectors, dim=-1))

    def select(self, layers: int | Iterable[int]) -> SteeringVector:
        """Returns it in some of its layers.

        Args:
            layers: which.

        Raises:
            OptionError: if it has no such layer.
        """
        numbers = list(dict.fromkeys(numbers_of("layer", layers) or []))
        return replace(
            self, layers=tuple(numbers), vectors=torch.stack([self[layer] for layer in numbers])
        )

    @renamed(goes_in="0.3", values={"positions": {"all": None}})
    def apply(
        self,
        model: LanguageModel,
        strength: Any = 1.0,
        *,
        positions: int | Iterable[int] | Literal["last"] | None = None,
    ) -> None:
        """Adds it, in an open invocation or edit: in a trace, or in a step or every step.

        Args:
            model: the model that the block is of; of `with model.edit() as edited:`, `edited`.
            strength: what it is multiplied with: a number, or a tensor or proxy `(rows,)` with one
                for each row of the invocation.
            positions: where: at one or several, from the end if negative; None for all; "last" is
                -1.

        Raises:
            OptionError: if the model has no such layer, or the positions are of no known kind.
            BlockError: outside of an invocation.
        """
        site = stream_site(self.site)
        if isinstance(strength, str):
            raise OptionError(f"A strength is a number, not {strength!r}.", here())
        if isinstance(strength, list | tuple):
            strength = torch.tensor(strength)
        factor = strength.reshape(-1, 1, 1) if hasattr(strength, "reshape") else strength
        layers = chosen("layer", self.layers, model.n_layers)
        for layer, vector in zip(layers, self.vectors, strict=True):
            value = site.read(model, layer)
            added = (vector * factor).type_as(value)
            if positions is None:
                site.write(model, layer, value + added)
            else:
                value[:, _index(positions)] += added

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to a safetensors file, whole or not at all.

        Args:
            path: where to.
        """
        told = _Told(self.site, self.layers, self.method, self.position, self.count)
        files.write(path, _KIND, {"vectors": self.vectors}, told)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Returns what `save` has written.

        Args:
            path: the file.

        Raises:
            LoadError: if it is no such file.
        """
        return files.read(path, _KIND, _Told, cls._read)

    @classmethod
    def _read(cls, told: _Told, tensors: files.Tensors) -> Self:
        vectors = tensors.take("vectors", "layer width")
        return cls(told.site, told.layers, vectors, told.method, told.position, told.count)


def steering_vector(
    model: LanguageModel,
    positive: Any,
    negative: Any,
    *,
    site: str | None = None,
    layers: int | Iterable[int] | None = None,
    position: int | Literal["mean"] = -1,
    method: Method = "difference of means",
    progress: bool | None = None,
    max_tokens_per_pass: int | None = None,
) -> SteeringVector:
    """Finds the direction from some prompts to others, in each layer.

    Args:
        model: the model.
        positive: prompts that have the wanted property, of any lengths.
        negative: prompts that do not.
        site: the standard name of where to look: a value that is a vector at each position. None
            for "residual_out", or "block_out" of blocks that normalise the sum.
        layers: in which blocks; None for all.
        position: at which position of each prompt, from its end if negative; or the mean over its
            positions.
        method: "difference of means", positive - negative (Rimsky et al. 2023; of a single pair,
            that of Turner et al. 2023); or "principal component" (Zou et al. 2023): the direction
            of length 1 along which the differences of the pairs are largest in the mean square,
            about 0, turned to where positive prompts lie. The i-th positive prompt and the i-th
            negative one are a pair.
        progress: whether a bar shows how far it is; None for on a terminal or in a notebook.
        max_tokens_per_pass: how many tokens, with padding, a pass may have; None for as many as fit
            into a quarter of the free memory.

    Returns:
        The vector.

    Raises:
        OptionError: if there is no such site, layer or method, or there are no pairs where they
            are needed.
        PromptError: if a prompt has no such position.
    """
    if method not in _METHODS:
        raise OptionError(
            f"A steering vector is made by {' or '.join(map(repr, _METHODS))}, not {method!r}.",
            here(),
        )
    where = _position(position)
    with_it, without = read_prompts(model, positive), read_prompts(model, negative)
    pairs = method == "principal component"
    if pairs and len(with_it) != len(without):
        raise OptionError(
            f"A principal component is of pairs, and there are {len(with_it)} positive prompts and "
            f"{len(without)} negative ones.",
            here(),
        )
    place = stream_site(stream_of(model) if site is None else site)
    # Each once: of a layer that is named twice, the vector would be added twice.
    numbers = list(dict.fromkeys(chosen("layer", layers, model.n_layers)))
    both = replace(with_it, ids=with_it.ids + without.ids, tokens=with_it.tokens + without.tokens)
    with bar("Reading activations", progress):
        found = gather(model, both, place, numbers, where, max_tokens_per_pass)
    high, low = found[: len(with_it)], found[len(with_it) :]
    means = high.mean(0) - low.mean(0)
    vectors = _principal((high - low).transpose(0, 1), means) if pairs else means
    return SteeringVector(place.name, tuple(numbers), vectors, method, where, len(both))


def _position(given: Any) -> int | Literal["mean"]:
    """A position as it was meant, also as a number of NumPy or torch."""
    if isinstance(given, str) and given == "mean":
        return given
    try:
        return whole(given)
    except TypeError:
        raise OptionError(
            f'The position is a number or "mean", not {given!r}: there is one vector in a layer.',
            here(),
        ) from None


def _principal(differences: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """The first principal component about 0, from `(layer, pair, width)`, towards the means."""
    *_, directions = torch.linalg.svd(differences, full_matrices=False)
    first = directions[:, 0]
    return torch.where((first * means).sum(-1, keepdim=True) < 0, -first, first)


def _index(positions: Any) -> Any:
    """What indexes the positions that are written to."""
    if isinstance(positions, str) and positions == "last":
        return slice(-1, None)
    if isinstance(positions, str):
        raise OptionError(
            f'Positions are numbers, "last", or None for all here, not {positions!r}; '
            '"generated" is of `steer`.',
            here(),
        )
    return numbers_of("position", positions)


def _listed(layers: Sequence[int]) -> str:
    return f"layer{'s' * (len(layers) != 1)} {', '.join(map(str, layers))}"
