"""A small random model of the class of another one, made from its config.

It has blocks of each kind, as narrow as the config lets it be, and weights of a healthy size. None
of these is 0 or 1: what holds in it does not hold because a bias is nothing.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import nn

from insitu.models.attention import SETTING

_VOCABULARY = 160  # sample prompts have no token from 50 on
_LARGEST = 40_000_000  # numbers, which take a second to draw
_LAYERS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers"),
    *("decoder_layers", "num_encoder_layers", "num_decoder_layers", "depth"),
)
# The ends of what configs call a width of something.
_WIDTHS = (
    *("hidden_size", "d_model", "n_embd", "intermediate_size", "intermediate_size_mlp", "d_ff"),
    *("ffn_dim", "ff_dim", "hidden_dim", "n_inner", "d_inner", "head_dim", "headdim", "d_head"),
    *("head_size", "d_kv", "lora_rank", "kv_channels", "embedding_size", "proj_dim", "d_embed"),
    *("emb_dim", "rotary_dim", "projection_dim", "per_layer_input", "mlp_size"),
)
_VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input", "vocabulary_size")

# State-space models pad prompts to whole chunks, and may need memory for all pairs of positions.
_CHUNKS = "chunk_size"
_CHUNK = 16


class SmallModelError(Exception):
    """No small model of a class can be made."""


def small_model(module: nn.Module, depth: int | None, narrow: bool) -> nn.Module:
    """Returns a small random model of the class of another one.

    Args:
        module: a Transformers model, with its weights or without.
        depth: how many blocks each stack is to have; None for as many as it has.
        narrow: whether it is to be narrower where it can be.

    Raises:
        SmallModelError: if it cannot be made, or would be large.
    """
    config = small_config(module, depth, narrow)
    kind: Any = type(module)
    with quiet(), torch.random.fork_rng([]):
        torch.manual_seed(0)
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
        except Exception as error:  # whatever a class makes of the config
            raise SmallModelError(f"{type(error).__name__}: {error}") from error
        if size > _LARGEST:
            raise SmallModelError(f"it would have {size} weights")
        try:
            with torch.device("cpu"):
                made = kind(config)
        except Exception as error:
            raise SmallModelError(f"{type(error).__name__}: {error}") from error
        made = made.float().eval()
        randomise(made)
    return made


def random_copy(module: nn.Module) -> nn.Module:
    """Returns a copy of a model that is small as it is, with random weights.

    Weights that somebody has set to nothing would make identities hold, or hide that they do.

    Args:
        module: the model, with its weights in memory.

    Raises:
        SmallModelError: if it is large, or its weights are elsewhere.
    """
    parameters = [*module.parameters()]
    size = sum(parameter.numel() for parameter in parameters)
    if size > _LARGEST:
        raise SmallModelError(f"it has {size} weights")
    if not all(one.is_floating_point() and one.device.type == "cpu" for one in parameters):
        raise SmallModelError("its weights are not on the CPU, or quantised")
    with quiet():
        made = copy.deepcopy(module).float().eval()
        randomise(made)
    return made


def small_config(module: nn.Module, depth: int | None, narrow: bool) -> Any:
    """Returns a config like a model's own, for fewer blocks, and narrower ones.

    Args:
        module: the model.
        depth: as of `small_model`.
        narrow: as of `small_model`.
    """
    config: Any = copy.deepcopy(module.config)
    parts = list(_parts(config))
    factor = _factor(parts) if narrow else 1
    for part in parts:
        table = vars(part)
        layers = {name: table[name] for name in _LAYERS if isinstance(table.get(name), int)}
        if depth is not None:
            _truncate(table, layers, depth)
        for name, value in list(table.items()):
            if not _is_width(name):
                continue
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                table[name] = max(value // factor, 1)
            elif isinstance(value, list):
                table[name] = [one // factor if isinstance(one, int) else one for one in value]
        for name in [name for name in table if name.endswith(_CHUNKS)]:
            if isinstance(table[name], int):
                table[name] = min(table[name], _CHUNK)
        _shrink_vocabulary(table)
        table.pop("quantization_config", None)
    vars(config)[SETTING] = _implementation(module)
    for name in ("dtype", "torch_dtype"):
        if name in vars(config):
            vars(config)[name] = torch.float32
    return config


def _implementation(module: nn.Module) -> Any:
    """With which implementation of attention it is to run: as the model, if torch has that."""
    config: Any = module.config
    setting = vars(config).get(SETTING)
    return setting if setting in (None, "eager", "sdpa") or isinstance(setting, dict) else "eager"


def _parts(config: Any) -> Iterator[Any]:
    """A config and those in it."""
    yield config
    for part in vars(config).values():
        if hasattr(part, "get_text_config"):
            yield from _parts(part)


def _truncate(table: dict[str, Any], layers: dict[str, int], depth: int) -> None:
    """Makes a model shallower, and what its config lists by layer as short."""
    for name, count in layers.items():
        if count > depth:
            table[name] = depth
    for name, value in table.items():
        if isinstance(value, list) and len(value) in layers.values() and len(value) > depth:
            table[name] = value[:depth]


def _factor(parts: list[Any]) -> int:
    """By how much all widths of a model can be divided: a power of two, and heads stay even."""
    widths = [
        value
        for part in parts
        for name, value in vars(part).items()
        if _is_width(name) and isinstance(value, int) and value >= 8
    ]
    heads = [_head(part) for part in parts]
    smallest = min([head for head in heads if head] + widths, default=1)
    factor = 1
    while smallest // (2 * factor) >= 8 and all(
        value % (2 * factor) == 0 and (value // (2 * factor)) % 2 == 0 for value in widths
    ):
        factor *= 2
    return factor


def _is_width(name: str) -> bool:
    return name == "dim" or (name.endswith(_WIDTHS) and not name.startswith(("num_", "vocab")))


def _head(part: Any) -> int:
    """How wide a head is, 0 if a config does not say."""
    table = vars(part)
    width = next((table[n] for n in ("hidden_size", "d_model", "n_embd") if table.get(n)), 0)
    names = ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads")
    count = next((table[n] for n in names if table.get(n)), 0)
    return width // count if isinstance(width, int) and isinstance(count, int) and count else 0


def _shrink_vocabulary(table: dict[str, Any]) -> None:
    sizes = [table[n] for n in _VOCABULARIES if isinstance(table.get(n), int)]
    if not sizes or max(sizes) <= _VOCABULARY:
        return
    for name in _VOCABULARIES:
        if isinstance(table.get(name), int):
            table[name] = min(table[name], _VOCABULARY)
    known: dict[int, int] = {}

    def token(value: Any) -> Any:
        if isinstance(value, list):
            return [token(one) for one in value]
        if isinstance(value, int) and not isinstance(value, bool) and value >= _VOCABULARY:
            return known.setdefault(value, _VOCABULARY - 1 - len(known) % 40)
        return value

    for name, value in table.items():
        if name.endswith(("token_id", "token_ids", "token_index")):
            table[name] = token(value)


def randomise(module: nn.Module) -> None:
    """Gives a model random weights of a healthy size, all different from zero.

    Args:
        module: the model. It is changed.
    """
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        saved = module.state_dict()
        for name, buffer in module.named_buffers():  # a factor that is no parameter
            if name in saved and buffer.is_floating_point() and buffer.numel() == 1:
                buffer.mul_(0.5 + torch.rand((), generator=draw))
        for parameter in module.parameters():
            if not parameter.is_floating_point():
                continue
            drawn = torch.randn(parameter.shape, generator=draw)
            if parameter.ndim >= 2:
                parameter.copy_(drawn * parameter.shape[-1] ** -0.5)
            else:  # norms, biases, and what says how fast a state fades
                parameter.add_(drawn * 0.2)


@contextlib.contextmanager
def quiet() -> Generator[None, None, None]:
    """Lets Transformers say nothing while a small model is made and runs."""
    import logging

    log = logging.getLogger("transformers")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
