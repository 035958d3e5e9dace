"""Probes: linear maps that read labels off activations."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec
import torch

from insitu.deprecation import renamed_attribute
from insitu.display.axis import Axis
from insitu.graph.errors import OptionError, PromptError, nearest
from insitu.graph.location import here
from insitu.methods import files
from insitu.methods.activations import Positions, gather, stream_site
from insitu.methods.prompts import read_prompts
from insitu.methods.result import Result
from insitu.methods.sites import chosen
from insitu.models.language_model import LanguageModel

if TYPE_CHECKING:
    from typing import Self

Method: TypeAlias = Literal["logistic", "linear"]
Label: TypeAlias = str | int | float | bool


class _Told(msgspec.Struct):
    """What a file keeps of a probe beside its tensors: fields as of `Probe`.

    Attributes:
        kind: the method. Files have its old name, and can be read by versions before 0.2.
        position: the positions, under their old name; "all" for None.
        positions: the labels of several positions; empty for one or the mean.
    """

    kind: Method
    site: str
    layers: tuple[int, ...]
    position: int | Literal["mean", "all"] | tuple[int, ...]
    classes: tuple[Label, ...]
    positions: tuple[str, ...]


_KIND = "probe"


@dataclass(frozen=True, slots=True, eq=False)
class Probes:
    """Probes of several sites, learned from the same prompts.

    Attributes:
        each: the probe of each site, in the order in which they were named: `probes["mlp_out"]`.
        scores: what they score on held-out prompts, by site, layer, and position if there are
            several; details are those of each.
    """

    each: tuple[Probe, ...]
    scores: Result

    @property
    def sites(self) -> tuple[str, ...]:
        """The standard names of what they read."""
        return tuple(one.site for one in self.each)

    def __repr__(self) -> str:
        return repr(self.scores)

    def __getitem__(self, site: str) -> Probe:
        if site not in self.sites:
            near = nearest(site, self.sites) if isinstance(site, str) else ""
            raise OptionError(
                f"There is no probe of {site!r}{near}, but of {_listed(self.sites)}.", here()
            )
        return self.each[self.sites.index(site)]

    def __contains__(self, site: object) -> bool:
        return site in self.sites

    def __iter__(self) -> Iterator[Probe]:
        return iter(self.each)

    def __len__(self) -> int:
        return len(self.each)


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """Linear maps from activations to labels: one in each layer, and at each of several positions.

    A map gives `weights @ x + biases` of an activation x. That is the log-odds of the second class
    if there are two, a logit for each class if there are more, or the label itself if it is a
    number.

    Attributes:
        method: "logistic" or "linear".
        site: the standard name of what it reads, such as "residual_out".
        layers: the blocks, from 0.
        positions: where in a prompt: a number, several, "mean", or None for all.
        classes: the labels that a logistic one chooses among, sorted.
        weights: `(layer, output, width)`, or `(layer, position, output, width)`, float32.
        biases: `(layer, output)`, or `(layer, position, output)`.
        scores: what it scores on held-out prompts, by layer, and position if there are several.
    """

    method: Method
    site: str
    layers: tuple[int, ...]
    positions: Positions
    classes: tuple[Label, ...]
    weights: torch.Tensor
    biases: torch.Tensor
    scores: Result

    kind = renamed_attribute("kind", "method", goes_in="0.3")
    position = renamed_attribute("position", "positions", goes_in="0.3")

    def __repr__(self) -> str:
        return repr(self.scores)

    def direction(self, layer: int, label: Label | None = None) -> torch.Tensor:
        """Returns the direction in which a label becomes likelier, or larger, of length 1.

        Args:
            layer: the number of the layer.
            label: the class, if there are more than two; None for the second of two.

        Returns:
            `(width,)`, or `(position, width)` for several positions.

        Raises:
            OptionError: if there is no such layer or class.
        """
        weights = self.weights[self._number(layer)]
        if len(self.classes) <= 2:
            sign = 1
            if label is not None:
                sign = 1 if self._class(label) else -1
            found = weights[..., 0, :] * sign
        elif label is None:
            raise OptionError(
                f"There are {len(self.classes)} classes, each with a direction: name one of "
                f"{_listed(self.classes)}.",
                here(),
            )
        else:
            found = weights[..., self._class(label), :]
        return torch.nn.functional.normalize(found, dim=-1)

    def outputs(
        self, model: LanguageModel, prompts: Any, *, max_tokens_per_pass: int | None = None
    ) -> torch.Tensor:
        """Returns what the maps give of some prompts: `weights @ x + biases`.

        Args:
            model: the model.
            prompts: one prompt or several.
            max_tokens_per_pass: as of `probe`.

        Returns:
            `(prompt, layer, output)`, or `(prompt, layer, position, output)`.

        Raises:
            PromptError: if a prompt has no such position; or, of a probe of all positions, if
                prompts have not as many as those that it was learned from.
        """
        read, site = read_prompts(model, prompts), stream_site(self.site)
        layers = chosen("layer", self.layers, model.n_layers)
        found = gather(model, read, site, layers, self.positions, max_tokens_per_pass)
        if found.shape[1:-1] != self.biases.shape[:-1]:  # one position would be taken for each
            raise PromptError(
                f"The probe has a map for each of {self.biases.shape[1]} positions, and these "
                f"prompts have {found.shape[2]}: give prompts of as many tokens.",
                here(),
            )
        return (self.weights @ found[..., None])[..., 0] + self.biases

    def predict(
        self, model: LanguageModel, prompts: Any, *, max_tokens_per_pass: int | None = None
    ) -> Result:
        """Returns what it says of prompts, in each layer.

        Args:
            model: the model.
            prompts: one prompt or several, of any lengths.
            max_tokens_per_pass: as of `probe`.

        Returns:
            By prompt if there are several, layer, and position if there are several. Of a logistic
            one the values are the probability of the class that is likeliest, and the texts say
            which that is; of a linear one they are the label that it expects.
        """
        read = read_prompts(model, prompts)
        outputs = self.outputs(model, prompts, max_tokens_per_pass=max_tokens_per_pass)
        texts: tuple[str, ...] = ()
        if self.method == "linear":
            values = outputs[..., 0]
        else:
            if len(self.classes) == 2:
                outputs = torch.cat([torch.zeros_like(outputs), outputs], -1)
            values, best = outputs.softmax(-1).max(-1)
            texts = tuple(str(self.classes[number]) for number in best.flatten().tolist())
        return Result(
            f"Probe of {self.site}",
            "prediction" if self.method == "linear" else "probability",
            values if read.many else values[0],
            (*read.axis, *self.scores.axes),
            texts=texts,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to a safetensors file, whole or not at all.

        Args:
            path: where to.
        """
        positions = self.positions
        if positions is None:
            positions = "all"
        told = _Told(
            self.method,
            self.site,
            self.layers,
            positions if isinstance(positions, int | str) else tuple(positions),
            self.classes,
            self._labels(),
        )
        tensors = {
            "weights": self.weights,
            "biases": self.biases,
            "scores": self.scores.values,
            **{f"scores.{name}": value for name, value in self.scores.details.items()},
        }
        files.write(path, _KIND, tensors, told)

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
        stream_site(told.site)  # that there is such a site
        axes = "layer position" if told.positions else "layer"
        scores = scored(
            told.kind,
            told.site,
            told.layers,
            told.positions,
            tensors.take("scores", axes),
            tensors.rest("scores."),
        )
        weights = tensors.take("weights", f"{axes} output width")
        biases = tensors.take("biases", f"{axes} output")
        outputs = 1 if told.kind == "linear" or len(told.classes) == 2 else len(told.classes)
        if (told.kind == "logistic" and len(told.classes) < 2) or biases.shape[-1] != outputs:
            raise OptionError(
                f"a {told.kind} probe of {len(told.classes)} classes has not "
                f"{biases.shape[-1]} outputs."
            )
        positions = None if told.position == "all" else told.position
        return cls(
            told.kind, told.site, told.layers, positions, told.classes, weights, biases, scores
        )

    def _labels(self) -> tuple[str, ...]:
        axes = self.scores.axes
        return axes[1].labels if len(axes) > 1 else ()

    def _number(self, layer: int) -> int:
        if layer not in self.layers:
            raise OptionError(
                f"The probe has no layer {layer}, but {_listed(self.layers)}.", here()
            )
        return self.layers.index(layer)

    def _class(self, label: Label) -> int:
        if label not in self.classes:
            raise OptionError(
                f"There is no class {label!r}, but {_listed(self.classes) or 'numbers'}.", here()
            )
        return self.classes.index(label)


def scored(
    method: Method,
    site: str,
    layers: Sequence[int],
    positions: Sequence[str],
    values: torch.Tensor,
    details: Mapping[str, torch.Tensor],
) -> Result:
    """Returns the scores of a probe.

    Args:
        method: the method of the probe.
        site: the standard name of what it reads.
        layers: in which blocks.
        positions: the labels of several positions; empty for one or the mean.
        values: the scores, `(layer,)` or `(layer, position)`.
        details: what else was measured, of the same shape.
    """
    axes = (Axis.of("layer", layers), *((Axis("position", tuple(positions)),) if positions else ()))
    quantity = "accuracy" if method == "logistic" else "R²"
    title = f"{method.capitalize()} probe of {site}"
    return Result(title, quantity, values, axes, details=details)


def together(probes: Sequence[Probe]) -> Probes:
    """Returns probes of several sites with their scores as one result.

    Args:
        probes: those of each site, with the same layers and positions.
    """
    results = [one.scores for one in probes]
    sites = [one.site for one in probes]
    first = results[0]
    scores = Result(
        f"{probes[0].method.capitalize()} probe of {', '.join(sites)}",
        first.quantity,
        torch.stack([one.values for one in results]),
        (Axis.of("site", sites), *first.axes),
        details={
            name: torch.stack([one.details[name] for one in results]) for name in first.details
        },
    )
    return Probes(tuple(probes), scores)


def _listed(items: Iterable[object]) -> str:
    return ", ".join(map(repr, items))
