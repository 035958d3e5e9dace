"""What a small random model of some architecture is made of, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import transformers
from torch import nn

Kind = Literal[
    "decoder", "encoder", "encoder-decoder", "vision", "audio", "vision-language", "contrastive"
]
Inputs = dict[str, torch.Tensor]

VOCABULARY = 100
FIRST_TOKEN = 4  # what comes before may mean something: padding, the end, an image
LAST_TOKEN = 90  # and so may what comes after
IMAGE_TOKEN = 95


@dataclass(frozen=True)
class Architecture:
    """A tiny model with random weights, and its inputs.

    Attributes:
        name: a short name of it.
        kind: what it takes and gives.
        model: the name of its class in Transformers. Where that is not there, nor is this.
        config: keyword arguments of its config.
        draw: makes keyword arguments of its forward, for a number of rows, a length and a seed.
        stacks: the paths of its lists of blocks, in the order in which they run; "a|b" where it
            depends on the version of Transformers.
        cached: whether its layers keep keys and values where `use_cache` is on. Of a model with
            layers of several kinds, some do.
    """

    name: str
    kind: Kind
    model: str
    config: Mapping[str, Any]
    stacks: tuple[str, ...]
    cached: bool = True
    draw: Callable[[int, int, int], Inputs] = field(default=lambda *size: {"input_ids": ids(*size)})

    @property
    def exists(self) -> bool:
        """Whether the installed version of Transformers has it."""
        return hasattr(transformers, self.model)

    @property
    def generates(self) -> bool:
        """Whether it continues token ids."""
        return self.kind in ("decoder", "encoder-decoder")

    @property
    def takes_text(self) -> bool:
        """Whether it is called with token ids and nothing else."""
        return self.kind in ("decoder", "encoder", "encoder-decoder")

    def make(self) -> nn.Module:
        """The model, the same each time, and with nothing in it that is initialised to nothing."""
        kind = getattr(transformers, self.model)
        torch.manual_seed(0)
        module = kind(kind.config_class(**self.config)).eval()
        spread_out(module)
        return module

    def stacks_in(self, module: nn.Module) -> list[str]:
        """The paths of its lists of blocks in a model that was made."""
        paths = {path for path, _ in module.named_modules()}
        return [next(path for path in stack.split("|") if path in paths) for stack in self.stacks]

    def inputs(self, rows: int = 1, length: int = 7, seed: int = 0) -> Inputs:
        """Keyword arguments of its forward; other ones for another seed."""
        return self.draw(rows, length, seed)


def spread_out(module: nn.Module) -> None:
    """Makes what is initialised to nothing, such as biases, something that shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:  # others are no weights, such as fixed sinusoids
                parameter.add_(torch.randn_like(parameter) * 0.1)


def ids(rows: int, length: int, seed: int) -> torch.Tensor:
    """Token ids `(rows, length)`, none of which means anything."""
    draw = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(FIRST_TOKEN, LAST_TOKEN, (rows, length), generator=draw)


def noise(*shape: int, seed: int) -> torch.Tensor:
    """What stands for pixels or for a spectrogram."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decoder(name: str, model: str, stack: str, cached: bool = True, **config: Any) -> Architecture:
    """A language model that looks back only."""
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    return Architecture(name, "decoder", model, {**tokens, **config}, (stack,), cached)


def sized(**others: Any) -> dict[str, Any]:
    """A config by the names that most have: grouped keys and values, `d_ff` unlike `d_model`."""
    return {
        "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        **others,
    }  # fmt: skip


def encoder(name: str, model: str, stack: str, **config: Any) -> Architecture:
    """A model of text that looks both ways."""
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 1}
    return Architecture(name, "encoder", model, {**tokens, **config}, (stack,), cached=False)


def drawing(**draws: Callable[[int, int, int], torch.Tensor]) -> Any:
    """Makes several inputs."""
    return partial(_drawn, draws)


def _drawn(draws: Mapping[str, Any], rows: int, length: int, seed: int) -> Inputs:
    return {name: draw(rows, length, seed) for name, draw in draws.items()}
