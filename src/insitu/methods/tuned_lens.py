"""The tuned lens: a logit lens that has learned to translate what each layer says.

The paper is "Eliciting Latent Predictions from Transformers with the Tuned Lens" (Belrose et al.
2023, https://arxiv.org/abs/2303.08112). An affine translator for each layer is added to the hidden
states there. It is trained so that the prediction that follows is the one that the model ends in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from insitu.display.axis import Axis
from insitu.graph.errors import LoadError, ShapeError
from insitu.graph.location import here
from insitu.graph.ordinary import ordinary_tensors
from insitu.methods import files
from insitu.methods.lens import look, stages_of
from insitu.methods.metrics import Tokens
from insitu.methods.progress import progress as bar
from insitu.methods.prompts import read_prompts
from insitu.methods.readout import Readout, check_edits, readout_of
from insitu.methods.result import Result
from insitu.methods.sites import check_count
from insitu.models.language_model import LanguageModel

if TYPE_CHECKING:
    from typing import Self

_KIND = "tuned lens"


class _Told(msgspec.Struct):
    """What a file keeps of a lens beside its tensors: nothing."""


_SITE = "residual_out"

Optimiser = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
"""Makes a torch optimiser of the parameters that it is to train."""


@dataclass(frozen=True, slots=True, eq=False)
class TunedLens:
    """An affine translator for each layer but the last: `h + weight @ h + bias` is read out.

    Attributes:
        weight: `(layer, d_model, d_model)`, float32: first that of the embedding, then those of
            what leaves each block but the last, which the model reads out itself.
        bias: `(layer, d_model)`, float32.
        losses: `(step, layer)`: the KL divergence in nats that each had in each step of training.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    losses: torch.Tensor

    def __post_init__(self) -> None:
        layers, width = self.bias.shape
        if tuple(self.weight.shape) != (layers, width, width):
            raise ShapeError(
                f"Weights of shape {tuple(self.weight.shape)} do not go with biases of shape "
                f"{tuple(self.bias.shape)}: they are (layer, d_model, d_model) and "
                "(layer, d_model).",
                here(3),
            )

    def __repr__(self) -> str:
        (layers, width), steps = self.bias.shape, len(self.losses)
        trained = f"{steps} steps of training" if steps else "untrained"
        return f"<Tuned lens: layer {layers} x width {width}, {trained}>"

    @classmethod
    def untrained(cls, model: LanguageModel) -> Self:
        """Returns the lens that translates nothing: it sees what the logit lens sees.

        Args:
            model: the model that it is for.
        """
        layers, width = model.n_layers, model.d_model
        weight = torch.zeros(layers, width, width, device=model.device)
        return cls(weight, torch.zeros(layers, width, device=model.device), torch.zeros(0, layers))

    def translate(self, number: int, value: Any) -> Any:
        """Returns the hidden states that are read out in the place of others.

        Args:
            number: how many blocks they come after.
            value: the hidden states `(..., d_model)`, a tensor or a proxy.
        """
        if number == len(self.bias):
            return value
        return _translated(value, self.weight[number], self.bias[number])

    @property
    def training(self) -> Result:
        """How it was trained: the KL divergence in nats with the axes step and layer."""
        steps, layers = self.losses.shape
        axes = (Axis.of("step", range(steps)), Axis.of("layer", _labels(layers)))
        return Result("Training of a tuned lens", "KL divergence", self.losses, axes)

    def to(self, device: str | torch.device) -> Self:
        """Returns it on another device.

        Args:
            device: which.
        """
        return type(self)(self.weight.to(device), self.bias.to(device), self.losses)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to a safetensors file, whole or not at all.

        Args:
            path: where to.
        """
        tensors = {"weight": self.weight, "bias": self.bias, "losses": self.losses}
        files.write(path, _KIND, tensors, _Told())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Returns what `save` has written, on the CPU.

        Args:
            path: the file.

        Raises:
            LoadError: if it is no such file.
        """
        return files.read(path, _KIND, _Told, cls._read)

    @classmethod
    def _read(cls, told: _Told, tensors: files.Tensors) -> Self:
        return cls(
            tensors.take("weight", "layer width width"),
            tensors.take("bias", "layer width"),
            tensors.take("losses", "step layer"),
        )


def tuned_lens(
    model: LanguageModel,
    prompts: Any,
    lens: TunedLens,
    *,
    layers: int | Iterable[int] | None = None,
    positions: int | Iterable[int] | None = None,
    token: Tokens | None = None,
    top: int = 10,
    progress: bool | None = None,
    max_tokens_per_pass: int | None = None,
) -> Result:
    """Returns what a model is about to predict after each block, by a tuned lens.

    Args:
        model: the model.
        prompts: one prompt or several, in any form that `invoke` takes.
        lens: a lens that was trained for the model.
        layers: as of `logit_lens`.
        positions: as of `logit_lens`.
        token: as of `logit_lens`.
        top: as of `logit_lens`.
        progress: whether a bar shows how far it is; None for on a terminal or in a notebook.
        max_tokens_per_pass: how many tokens, with padding, a pass may have; None for as many as fit
            into a quarter of the free memory.

    Returns:
        As of `logit_lens`.

    Raises:
        OptionError: as of `logit_lens`.
        ShapeError: if the lens is for a model of another size.
    """
    if tuple(lens.bias.shape) != (model.n_layers, model.d_model):
        count, width = lens.bias.shape
        raise ShapeError(
            f"The lens is for {count} layers of width {width}, and the model has "
            f"{model.n_layers} of width {model.d_model}.",
            here(),
        )
    stages, lens = stages_of(model, _SITE, layers), lens.to(model.device)
    return look(
        model,
        prompts,
        "Tuned lens",
        stages,
        lens.translate,
        positions,
        token,
        top,
        progress,
        max_tokens_per_pass,
    )


@ordinary_tensors()
def train_tuned_lens(
    model: LanguageModel,
    prompts: Any,
    *,
    epochs: int = 10,
    batch_size: int = 8,
    optimiser: Optimiser | None = None,
    lens: TunedLens | None = None,
    seed: int = 0,
    progress: bool | None = None,
    max_tokens_per_pass: int | None = None,
) -> TunedLens:
    """Trains a tuned lens.

    The loss of each layer is KL(final ‖ lens): how far the prediction that the lens reads there is
    from the one that the model ends in, the mean over all positions of a batch. No layer has a
    part in the loss of another, so all are trained at once. The model itself is left as it is.

    Args:
        model: the model.
        prompts: what to train on, in any form that `invoke` takes.
        epochs: how often all prompts are gone through.
        batch_size: how many prompts there are in a step of the optimiser, as of `torch`.
        optimiser: from the parameters to a torch optimiser; None for Adam with a rate of 1e-3.
        lens: where to begin; None for a lens that translates nothing.
        seed: of the order of the prompts, which is another one in each epoch.
        progress: whether a bar shows how far it is; None for on a terminal or in a notebook.
        max_tokens_per_pass: how many tokens, with padding, a pass may have, so that a step takes
            several; None for as many as fit into a quarter of the free memory.

    Raises:
        OptionError: if `epochs` or `batch_size` is no number from 1 on.
        LoadError: if a server has the weights of the model.

    Example:
        ```python
        lens = train_tuned_lens(model, texts, optimiser=lambda p: torch.optim.SGD(p, lr=1.0))
        ```
    """
    for name, number in (("epochs", epochs), ("batch_size", batch_size)):
        check_count(name, number)
    if model.away is not None:
        raise LoadError(
            "Each step of training computes logits with the weights of the model, which are on a "
            "server. Train the lens where they are, save it, and read it here with "
            "`TunedLens.load`.",
            here(),
        )
    readout = readout_of(model)
    given = read_prompts(model, prompts)
    check_edits(model, given, max_tokens_per_pass)
    start = (TunedLens.untrained(model) if lens is None else lens).to(model.device)
    weights = [torch.nn.Parameter(one.clone()) for one in start.weight]
    biases = [torch.nn.Parameter(one.clone()) for one in start.bias]
    every = [*weights, *biases]
    trained = optimiser(every) if optimiser else torch.optim.Adam(every, lr=1e-3)
    losses: list[torch.Tensor] = []
    steps = epochs * -(-len(given) // batch_size)
    with bar("Training a lens", progress) as shown:
        for numbers in shown.each(_batches(len(given), epochs, batch_size, seed), steps):
            states = _states(model, [given.ids[n] for n in numbers], max_tokens_per_pass)
            losses.append(_backward(readout, weights, biases, states))
            shown.say(f"loss {float(losses[-1].mean()):.3f}")
            trained.step()
            trained.zero_grad()
    seen = torch.cat([start.losses.cpu(), torch.stack(losses)])
    return TunedLens(_stacked(weights), _stacked(biases), seen)


def _batches(count: int, epochs: int, batch: int, seed: int) -> Iterator[Sequence[int]]:
    """The numbers of the prompts of each step."""
    chance = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(count, generator=chance).tolist()
        yield from (order[at : at + batch] for at in range(0, count, batch))


def _states(
    model: LanguageModel, prompts: Sequence[torch.Tensor], max_tokens_per_pass: int | None
) -> list[torch.Tensor]:
    """The residual stream at each stage, `(positions of all prompts, d_model)`."""
    stages = stages_of(model, _SITE, None)
    kept: list[list[Any]] = []
    with model.trace(max_tokens_per_pass=max_tokens_per_pass) as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                kept.append([stage.read(model)[0].save() for stage in stages])
    return [torch.cat([one.value for one in of_stage]) for of_stage in zip(*kept, strict=True)]


def _backward(
    readout: Readout,
    weights: Sequence[torch.nn.Parameter],
    biases: Sequence[torch.nn.Parameter],
    states: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Gives each layer's translator the gradient of its loss, and returns the losses.

    One layer after the other, so that there are logits of no more than two at a time.
    """
    losses: list[torch.Tensor] = []
    with readout.model.in_use():
        with torch.no_grad():
            final = readout(states[-1]).float().log_softmax(-1)
        for state, weight, bias in zip(states, weights, biases, strict=False):
            with torch.enable_grad():
                seen = readout(_translated(state, weight, bias)).float().log_softmax(-1)
                loss = (final.exp() * (final - seen)).sum(-1).mean()
            # Not `backward`, which would reach the model's own parameters.
            weight.grad, bias.grad = torch.autograd.grad(loss, [weight, bias])
            losses.append(loss.detach().cpu())
    return torch.stack(losses)


def _translated(value: Any, weight: torch.Tensor, bias: torch.Tensor) -> Any:
    wide = value.float()
    return (wide + torch.nn.functional.linear(wide, weight, bias)).type_as(value)


def _stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([part.detach() for part in parts])


def _labels(layers: int) -> list[str]:
    return ["embedding", *map(str, range(layers - 1))]
