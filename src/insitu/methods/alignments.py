"""Alignments: directions in which a model keeps a variable, and interventions that exchange them.

Geiger et al. 2023 (https://arxiv.org/abs/2303.02536).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import nan
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from insitu.display.axis import Axis
from insitu.graph.errors import OptionError, PromptError
from insitu.graph.location import here
from insitu.methods import files
from insitu.methods.activations import gather, stream_site
from insitu.methods.metrics import Tokens
from insitu.methods.prompts import Prompts, read_prompts
from insitu.methods.result import Result
from insitu.models.language_model import LanguageModel

if TYPE_CHECKING:
    from typing import Self

_KIND = "alignment"


class _Told(msgspec.Struct):
    """What a file keeps of an alignment beside its tensors: fields as of `Alignment`.

    JSON has no NaN: the accuracy of no pairs is null.
    """

    site: str
    layer: int
    position: int
    source_position: int
    accuracy: float | None
    train_accuracy: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """Directions at a site in which a variable is kept.

    Attributes:
        site: the standard name of where, such as "residual_out".
        layer: the block, from 0.
        position: at which position of a base, from its end if negative.
        source_position: at which position of a source.
        rotation: the directions, `(dimension, width)`, orthonormal, float32; None for all that
            there are.
        accuracy: the interchange-intervention accuracy on pairs that were held out: in which part
            of them the model predicts the source's answer for the base.
        train_accuracy: that on pairs that were trained on.
        losses: the cross-entropy of the answers, by step of the search; of no steps if there was
            none.
    """

    site: str
    layer: int
    position: int
    source_position: int
    rotation: torch.Tensor | None
    accuracy: float
    train_accuracy: float
    losses: Result

    def __repr__(self) -> str:
        directions = "all" if self.rotation is None else len(self.rotation)
        return (
            f"<Alignment of {self.site}, layer {self.layer}: directions {directions}, accuracy "
            f"{self.accuracy:.3g} held out, {self.train_accuracy:.3g} in training>"
        )

    def read(self, model: LanguageModel) -> Any:
        """Returns what a source has there, in its open invocation: `(rows, width)`.

        Args:
            model: the model.

        Raises:
            BlockError: outside of an invocation.
        """
        site = stream_site(self.site)
        return site.read(model, self.layer)[:, self.source_position]

    def apply(self, model: LanguageModel, source: Any) -> None:
        """Exchanges the variable of a base for that of a source, in the base's open invocation.

        Args:
            model: the model.
            source: what the source has there, `(rows, width)`: what `read` has given, in this run
                or another.

        Raises:
            BlockError: outside of an invocation.
        """
        value = stream_site(self.site).read(model, self.layer)
        base = value[:, self.position]
        value[:, self.position] = exchanged(base, source, self.rotation)

    def score(
        self,
        model: LanguageModel,
        bases: Any,
        sources: Any,
        answers: Tokens,
        *,
        max_tokens_per_pass: int | None = None,
    ) -> float:
        """Returns the interchange-intervention accuracy on other pairs.

        Args:
            model: the model.
            bases: as of `distributed_alignment_search`.
            sources: as of `distributed_alignment_search`.
            answers: as of `distributed_alignment_search`.
            max_tokens_per_pass: as of `distributed_alignment_search`.

        Raises:
            OptionError: if there are not as many sources and answers as bases.
            PromptError: if a prompt has no such position, or an answer is no token.
        """
        read, given, wanted = read_pairs(model, bases, sources, answers)
        check_position(read, self.position)
        site, most = stream_site(self.site), max_tokens_per_pass
        found = gather(model, given, site, [self.layer], self.source_position, most)
        hits = self.hits(model, read, found[:, 0], wanted, most)
        return hits.float().mean().item()

    def hits(
        self,
        model: LanguageModel,
        bases: Prompts,
        sources: torch.Tensor,
        answers: torch.Tensor,
        max_tokens_per_pass: int | None = None,
    ) -> torch.Tensor:
        """Returns for which bases the model predicts the answer.

        Args:
            model: the model.
            bases: the bases.
            sources: what the sources have there, `(prompt, width)`.
            answers: token ids, `(prompt,)`.
            max_tokens_per_pass: as of `distributed_alignment_search`.

        Returns:
            `(prompt,)`, of truth values.
        """
        with model.trace(max_tokens_per_pass=max_tokens_per_pass) as tracer:
            said = []
            for ids, source in zip(bases.ids, sources, strict=True):
                with tracer.invoke(ids):
                    self.apply(model, source[None])
                    said.append(model.logits[0, -1].argmax().save(to="cpu"))
        return torch.stack([token.value for token in said]) == answers

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to a safetensors file, whole or not at all.

        Args:
            path: where to.
        """
        told = _Told(*(getattr(self, name) for name in _Told.__struct_fields__))
        tensors = {"losses": self.losses.values}
        if self.rotation is not None:
            tensors["rotation"] = self.rotation
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
        return cls(
            told.site,
            told.layer,
            told.position,
            told.source_position,
            tensors.take("rotation", "dimension width") if "rotation" in tensors else None,
            nan if told.accuracy is None else told.accuracy,
            nan if told.train_accuracy is None else told.train_accuracy,
            course(tensors.take("losses", "step")),
        )


def exchanged(base: Any, source: Any, rotation: Any) -> Any:
    """Returns base vectors with what source vectors have in some directions.

    Args:
        base: `(rows, width)`.
        source: `(rows, width)`.
        rotation: the directions, `(dimension, width)`, orthonormal; None for all.
    """
    source = source.type_as(base)
    if rotation is None:
        return source
    rotation = rotation.type_as(base)
    return base + (source - base) @ rotation.T @ rotation


def course(losses: torch.Tensor) -> Result:
    """Returns the losses of a search, by step.

    Args:
        losses: `(step,)`.
    """
    axes = (Axis.of("step", range(len(losses))),)
    return Result("Distributed alignment search", "cross-entropy", losses, axes)


def read_pairs(
    model: LanguageModel, bases: Any, sources: Any, answers: Tokens
) -> tuple[Prompts, Prompts, torch.Tensor]:
    """Returns bases, sources and the ids of answers.

    Args:
        model: the model.
        bases: as of `distributed_alignment_search`.
        sources: as of `distributed_alignment_search`.
        answers: as of `distributed_alignment_search`.

    Raises:
        OptionError: if there are not as many of each.
    """
    read, given = read_prompts(model, bases), read_prompts(model, sources)
    if isinstance(answers, torch.Tensor):
        answers = answers.tolist()
    several = [answers] * len(read) if isinstance(answers, str | int) else list(answers)
    if not len(read) == len(given) == len(several):
        raise OptionError(
            f"There are {len(read)} bases, {len(given)} sources and {len(several)} answers: each "
            "base has a source and an answer.",
            here(),
        )
    return read, given, torch.tensor([model.token_id(answer) for answer in several])


def check_position(prompts: Prompts, position: int) -> None:
    """Raises if a prompt has no such position.

    Raises:
        PromptError: in that case.
    """
    shortest = min(prompts.lengths)
    if not -shortest <= position < shortest:
        raise PromptError(
            f"There is no position {position} in the shortest prompt, of {shortest} tokens.",
            here(),
        )
