"""Distributed alignment search: where, and in which directions, a model keeps a variable.

An interchange intervention gives the run of one prompt, the base, what the run of another, the
source, has at a site. If a variable is kept there, the model goes on as if it had the source's
value of it. The search learns, by gradient descent, the directions in which exchanging alone does
that. Geiger et al. 2023 (https://arxiv.org/abs/2303.02536).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from insitu.graph.errors import OptionError
from insitu.graph.location import here
from insitu.graph.ordinary import ordinary_tensors
from insitu.methods.activations import gather, stream_site
from insitu.methods.alignments import Alignment, check_position, course, exchanged, read_pairs
from insitu.methods.metrics import Tokens
from insitu.methods.progress import progress as bar
from insitu.methods.prompts import Prompts
from insitu.methods.sites import check_count, check_positions, chosen, stream_of
from insitu.models.language_model import LanguageModel


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Pairs of prompts.

    Attributes:
        bases: the bases.
        sources: what the sources have at the site, `(pair, width)`.
        answers: the ids of the answers, `(pair,)`.
    """

    bases: Prompts
    sources: torch.Tensor
    answers: torch.Tensor

    def only(self, numbers: Sequence[int]) -> _Pairs:
        """Returns some of them."""
        bases = replace(
            self.bases,
            ids=tuple(self.bases.ids[number] for number in numbers),
            tokens=tuple(self.bases.tokens[number] for number in numbers),
        )
        return _Pairs(bases, self.sources[list(numbers)], self.answers[list(numbers)])


@ordinary_tensors()
def distributed_alignment_search(
    model: LanguageModel,
    bases: Any,
    sources: Any,
    answers: Tokens,
    *,
    layer: int,
    dimensions: int | None = 1,
    site: str | None = None,
    position: int = -1,
    source_position: int | None = None,
    epochs: int = 10,
    lr: float = 1e-2,
    batch_size: int = 16,
    held_out: float = 0.25,
    seed: int = 0,
    progress: bool | None = None,
    max_tokens_per_pass: int | None = None,
) -> Alignment:
    """Learns the directions in which a model keeps a variable, from pairs of prompts.

    The model's parameters stay as they are. A step of the search is one forward and backward of a
    batch of bases; what the sources have is read once.

    Args:
        model: the model.
        bases: the prompts whose runs are changed, of any lengths.
        sources: for each of them, the prompt that has the other value of the variable.
        answers: for each of them, the token that the model should predict if it had the source's
            value of the variable and was the base in all else, as text or id.
        layer: in which block.
        dimensions: how many directions there are. None for no search: the whole vector is
            exchanged, which is the baseline.
        site: the standard name of where: a value that is a vector at each position. None for
            "residual_out", or "block_out" of blocks that normalise the sum.
        position: at which position of a base, from its end if negative.
        source_position: at which position of a source; None for the same.
        epochs: how often all pairs are gone through.
        lr: the learning rate of Adam.
        batch_size: how many pairs a step of the optimiser is made of; they share a pass.
        held_out: which part of the pairs is not trained on.
        seed: decides the first rotation, the pairs that are held out, and the order of the others.
        progress: whether a bar shows how far it is; None for on a terminal or in a notebook.
        max_tokens_per_pass: how many tokens, with padding, a pass that takes no gradient may have;
            None for as many as fit into a quarter of the free memory.

    Returns:
        The alignment, with the interchange-intervention accuracy on both parts of the pairs.

    Raises:
        OptionError: if there are not as many sources and answers as bases, or no such site, layer
            or number of dimensions, epochs or pairs in a step.
        PromptError: if a prompt has no such position, or an answer is no token.
    """
    for name, number in (("epochs", epochs), ("batch_size", batch_size)):
        check_count(name, number)
    place = stream_site(stream_of(model) if site is None else site)
    (block,) = chosen("layer", layer, model.n_layers)
    check_positions(model)
    read, given, wanted = read_pairs(model, bases, sources, answers)
    check_position(read, position)
    draw = torch.Generator().manual_seed(seed)
    train, test = _split(len(read), held_out, draw)
    where = position if source_position is None else source_position
    values = gather(model, given, place, [block], where, max_tokens_per_pass)
    pairs = _Pairs(read, values[:, 0], wanted)
    width = pairs.sources.shape[-1]
    alignment = Alignment(
        place.name, block, position, where, None, 0.0, 0.0, course(torch.zeros(0))
    )
    if dimensions is not None:
        if type(dimensions) is not int or not 0 < dimensions <= width:
            raise OptionError(f"There are 1 to {width} dimensions, not {dimensions!r}.", here())
        directions = _rotation(dimensions, width, seed).to(model.device)
        batches = [
            pairs.only([train[number] for number in batch.tolist()])
            for _ in range(epochs)
            for batch in torch.randperm(len(train), generator=draw).split(batch_size)
        ]
        # The user may have turned gradients off, as for all else that is done with a model.
        with bar("Searching", progress) as shown, torch.enable_grad():
            losses = _train(model, alignment, directions, shown.each(batches), lr)
        rotation = directions.weight.detach().cpu().float()
        alignment = replace(alignment, rotation=rotation, losses=course(losses))
    parts = (pairs.only(part) for part in (test, train))
    hits = (
        alignment.hits(model, part.bases, part.sources, part.answers, max_tokens_per_pass)
        for part in parts
    )
    accuracy, trained = (found.float().mean().item() for found in hits)
    return replace(alignment, accuracy=accuracy, train_accuracy=trained)


def _rotation(dimensions: int, width: int, seed: int) -> nn.Linear:
    """A layer whose weight, `(dimension, width)`, has orthonormal rows and keeps them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = nn.Linear(width, dimensions, bias=False)
        nn.init.orthogonal_(layer.weight)
        parametrizations.orthogonal(layer)
        return layer


def _train(
    model: LanguageModel,
    alignment: Alignment,
    rotation: nn.Linear,
    batches: Iterable[_Pairs],
    lr: float,
) -> torch.Tensor:
    """Trains a rotation, and returns the loss before each step."""
    optimiser = torch.optim.Adam(rotation.parameters(), lr=lr)
    site, losses = stream_site(alignment.site), []
    for batch in batches:
        optimiser.zero_grad()
        lengths = torch.tensor(batch.bases.lengths)
        rows = torch.arange(len(lengths))
        at = alignment.position
        # One invocation with a row for each pair, of which shorter ones are padded.
        with model.trace([ids.tolist() for ids in batch.bases.ids]) as tracer:
            starts = tracer.mask.argmax(1)
            positions = starts + (at if at >= 0 else lengths + at)
            value = site.read(model, alignment.layer)
            source = batch.sources.to(model.device)
            value[rows, positions] = exchanged(value[rows, positions], source, rotation.weight)
            logits = model.logits[rows, starts + lengths - 1].float()
            loss: Any = F.cross_entropy(logits, batch.answers.to(model.device))
            loss.backward()
            losses.append(loss.save(to="cpu"))
        optimiser.step()
    return torch.stack([loss.value for loss in losses]) if losses else torch.zeros(0)


def _split(count: int, held_out: float, draw: torch.Generator) -> tuple[list[int], list[int]]:
    """Which pairs are trained on and which are held out."""
    kept = round(count * held_out)
    if not 0 < held_out < 1 or not 0 < kept < count:
        raise OptionError(
            f"Of {count} pairs, a part of {held_out!r} cannot be held out: there have to be some "
            "of each.",
            here(),
        )
    order = torch.randperm(count, generator=draw).tolist()
    return sorted(order[kept:]), sorted(order[:kept])
