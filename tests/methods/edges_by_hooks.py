"""Edge attribution with plain hooks and autograd, on architectures whose parts are told by path.

Each receiver gets a leaf that is added to the stream as it reads it, and the score of an edge is
the leaf's gradient times what the sender adds in one run more than in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Columns = Mapping[str, Tensor]


def side_by_side(heads: int, keys: int, size: int) -> Columns:
    """All queries, all keys, all values, in one layer."""
    counts = {"q": heads, "k": keys, "v": keys}
    found, start = dict[str, Tensor](), 0
    for letter, count in counts.items():
        found[letter] = start + torch.arange(count * size).view(count, size)
        start += count * size
    return found


def apart(heads: int, keys: int, size: int) -> Columns:
    """In a layer each."""
    return {k: c - int(c.min()) for k, c in side_by_side(heads, keys, size).items()}


def by_heads(heads: int, keys: int, size: int) -> Columns:
    """In one layer, the query of each head in front of its key and its value."""
    at = torch.arange(heads * 3 * size).view(heads, 3, size)
    return {letter: at[:, place] for place, letter in enumerate("qkv")}


@dataclass(frozen=True)
class Paths:
    """Where the parts of an architecture are.

    Attributes:
        blocks: the list of its blocks.
        norm: in a block, the norm before attention; "" if there is none.
        projections: in a block, what makes queries, keys and values of that, one after the other.
        columns: which numbers of what these make are which head.
        out: in a block, the output projection if heads are senders, else what attention adds.
        norm_2: in a block, the norm before the MLP; "" if there is none.
        mlp: in a block, the MLP.
        final: the last norm.
        mlp_added: in a block, what gives what the MLP adds; "" for the MLP itself.
        parallel: whether the MLP reads what attention reads.
        sends_heads: whether each head is a sender.
    """

    blocks: str
    norm: str
    projections: Mapping[str, tuple[str, ...]]
    columns: Callable[[int, int, int], Columns]
    out: str
    norm_2: str
    mlp: str
    final: str
    mlp_added: str = ""
    parallel: bool = False
    sends_heads: bool = True


def _of_llama(*more: str) -> dict[str, tuple[str, ...]]:
    after = [f"self_attn.{name}" for name in more]
    own = {letter: [p for p in after if p.split(".")[1][0] == letter] for letter in "qkv"}
    return {letter: (f"self_attn.{letter}_proj", *own[letter]) for letter in "qkv"}


_LLAMA = Paths(
    "model.layers", "input_layernorm", _of_llama(), apart, "self_attn.o_proj",
    "post_attention_layernorm", "mlp", "model.norm",
)  # fmt: skip
_GEMMA = Paths(
    "model.layers", "input_layernorm", _of_llama(), apart, "post_attention_layernorm",
    "pre_feedforward_layernorm", "mlp", "model.norm", "post_feedforward_layernorm",
    sends_heads=False,
)  # fmt: skip
PATHS = {
    "gpt2": Paths(
        "transformer.h", "ln_1", dict.fromkeys("qkv", ("attn.c_attn",)), side_by_side,
        "attn.c_proj", "ln_2", "mlp", "transformer.ln_f",
    ),
    "llama": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "phi3": Paths(
        "model.layers", "input_layernorm", dict.fromkeys("qkv", ("self_attn.qkv_proj",)),
        side_by_side, "self_attn.o_proj", "post_attention_layernorm", "mlp", "model.norm",
    ),
    "phi": Paths(
        "model.layers", "input_layernorm", _of_llama(), apart, "self_attn.dense",
        "input_layernorm", "mlp", "model.final_layernorm", parallel=True,
    ),
    "gpt-neox": Paths(
        "gpt_neox.layers", "input_layernorm",
        dict.fromkeys("qkv", ("attention.query_key_value",)),
        by_heads, "attention.dense",
        "post_attention_layernorm", "mlp", "gpt_neox.final_layer_norm", parallel=True,
    ),
    "bloom": Paths(
        "transformer.h", "input_layernorm",
        dict.fromkeys("qkv", ("self_attention.query_key_value",)), by_heads,
        "self_attention.dense", "post_attention_layernorm", "mlp", "transformer.ln_f",
        "mlp.dense_4h_to_h",
    ),
    "gpt-bigcode": Paths(
        "transformer.h", "ln_1", dict.fromkeys("qkv", ("attn.c_attn",)),
        lambda heads, keys, size: side_by_side(heads, 1, size), "attn.c_proj", "ln_2", "mlp",
        "transformer.ln_f",
    ),
    "gpt-j": Paths(
        "transformer.h", "ln_1", {letter: (f"attn.{letter}_proj",) for letter in "qkv"}, apart,
        "attn.out_proj", "ln_1", "mlp", "transformer.ln_f", parallel=True,
    ),
    "olmo2": Paths(
        "model.layers", "", _of_llama("q_norm", "k_norm"), apart, "post_attention_layernorm",
        "", "mlp", "model.norm", "post_feedforward_layernorm", sends_heads=False,
    ),
}  # fmt: skip


def scores(
    module: nn.Module, paths: Paths, clean: Tensor, corrupted: Tensor, metric: Callable[..., Tensor]
) -> dict[tuple[str, str], float]:
    """The score of each edge, by the names of its sender and its receiver."""
    own, other = _added(module, paths, clean), _added(module, paths, corrupted)
    slopes = _slopes(module, paths, clean, metric)
    count = len(module.get_submodule(paths.blocks))
    order = ["input", *(f"{letter}{layer}" for layer in range(count) for letter in "am"), "logits"]

    def place(name: str) -> int:
        return order.index(name.partition(".")[0])

    def reads(sender: str, receiver: str) -> bool:
        same = sender[1:2] == receiver[1:2] and sender[0] == "a" and receiver[0] == "m"
        return place(sender) < place(receiver) and not (paths.parallel and same)

    return {
        (sender, receiver): float(((other[sender] - own[sender]) * slope).sum())
        for receiver, slope in slopes.items()
        for sender in own
        if reads(sender, receiver)
    }


def _added(module: nn.Module, paths: Paths, ids: Tensor) -> dict[str, Tensor]:
    """What each sender adds to the residual stream, `(position, d_model)`."""
    found: dict[str, Tensor] = {}
    blocks = module.get_submodule(paths.blocks)
    heads = module.config.num_attention_heads

    def kept(name: str, value: Any) -> None:
        found[name] = (value[0] if isinstance(value, tuple) else value).view(len(ids), -1)

    def by_heads(layer: int, out: Any, z: Tensor) -> None:
        size = z.shape[-1] // heads
        for head in range(heads):
            part = torch.zeros_like(z)
            own = slice(head * size, (head + 1) * size)
            part[..., own] = z[..., own]
            made = out.forward(part) - out.forward(torch.zeros_like(z))
            kept(f"a{layer}.h{head}", made)

    with ExitStack() as stack, torch.no_grad():
        enter = stack.enter_context
        enter(blocks[0].register_forward_pre_hook(lambda _, args: kept("input", args[0])))
        for layer, block in enumerate(blocks):
            out = block.get_submodule(paths.out)
            if paths.sends_heads:
                enter(
                    out.register_forward_pre_hook(
                        lambda out, args, layer=layer: by_heads(layer, out, args[0])
                    )
                )
            else:
                enter(out.register_forward_hook(lambda _, a, o, layer=layer: kept(f"a{layer}", o)))
            mlp = block.get_submodule(paths.mlp_added or paths.mlp)
            enter(mlp.register_forward_hook(lambda _, a, o, layer=layer: kept(f"m{layer}", o)))
        module(ids[None], use_cache=False)
    return found


def _slopes(
    module: nn.Module, paths: Paths, ids: Tensor, metric: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """The gradient at what each receiver reads of the stream, `(position, d_model)`."""
    config = module.config
    heads, width = config.num_attention_heads, config.hidden_size
    keys = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or width // heads
    columns = paths.columns(heads, keys, size)
    leaves: dict[str, Tensor] = {}
    streams: dict[int, Tensor] = {}

    def leaf(name: str) -> Tensor:
        leaves[name] = torch.zeros(1, len(ids), width, requires_grad=True)
        return leaves[name]

    def normed(norm: nn.Module | None, value: Tensor) -> Tensor:
        return value if norm is None else norm.forward(value)

    with ExitStack() as stack:
        for layer, block in enumerate(module.get_submodule(paths.blocks)):

            def at_start(block: nn.Module, args: Any, layer: int = layer) -> None:
                streams[layer] = args[0]

            stack.enter_context(block.register_forward_pre_hook(at_start))
            norm = block.get_submodule(paths.norm) if paths.norm else None
            for last in {chain[-1] for chain in paths.projections.values()}:
                letters = [one for one, chain in paths.projections.items() if chain[-1] == last]

                def made(
                    _: nn.Module, args: Any, output: Tensor, layer: int = layer,
                    block: nn.Module = block, norm: Any = norm, letters: list[str] = letters,
                ) -> Tensor:  # fmt: skip
                    parts = output.clone()
                    for letter in letters:
                        for head, own in enumerate(columns[letter]):
                            given = streams[layer] + leaf(f"a{layer}.{letter}{head}")
                            given = normed(norm, given)
                            for path in paths.projections[letter]:
                                given = block.get_submodule(path).forward(given)
                            parts[..., own] = given[..., own]
                    return parts

                stack.enter_context(block.get_submodule(last).register_forward_hook(made))
            norm_2 = block.get_submodule(paths.norm_2) if paths.norm_2 else None
            middle: list[Tensor] = []
            if norm_2 is not None and not paths.parallel:
                stack.enter_context(
                    norm_2.register_forward_pre_hook(
                        lambda _, args, middle=middle: middle.append(args[0])
                    )
                )

            def read(
                _: nn.Module, args: Any, layer: int = layer, norm: Any = norm_2,
                middle: list[Tensor] = middle,
            ) -> Any:  # fmt: skip
                stream = streams[layer] if paths.parallel else middle[0] if middle else args[0]
                return (normed(norm, stream + leaf(f"m{layer}")), *args[1:])

            stack.enter_context(block.get_submodule(paths.mlp).register_forward_pre_hook(read))
        final = module.get_submodule(paths.final)
        stack.enter_context(
            final.register_forward_pre_hook(lambda _, args: (args[0] + leaf("logits"),))
        )
        loss = metric(module(ids[None], use_cache=False).logits[0])
    found = torch.autograd.grad(loss, list(leaves.values()))
    return {name: one[0] for name, one in zip(leaves, found, strict=True)}
