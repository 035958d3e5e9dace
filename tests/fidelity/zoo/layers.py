"""Which layers the blocks of the zoo have, by what Transformers calls them.

This is what tests of standard names hook into: it is written down here, and not found out.
"""

from __future__ import annotations

from torch import nn

LAYERS = {
    "attention.q": (
        *("self_attn.q_proj", "attn.q_proj", "attn.attention.q_proj", "attention.self.query"),
        *("attention.q_lin", "layer.0.SelfAttention.q", "attention.q_proj"),
        *("attention.attention.query", "shared_transformer.self_attn.q_proj"),
    ),
    "attention.k": (
        *("self_attn.k_proj", "attn.k_proj", "attn.attention.k_proj", "attention.self.key"),
        *("attention.k_lin", "layer.0.SelfAttention.k", "attention.k_proj"),
        *("attention.attention.key", "shared_transformer.self_attn.k_proj"),
    ),
    "attention.v": (
        *("self_attn.v_proj", "attn.v_proj", "attn.attention.v_proj", "attention.self.value"),
        *("attention.v_lin", "layer.0.SelfAttention.v", "attention.v_proj"),
        *("attention.attention.value", "shared_transformer.self_attn.v_proj"),
    ),
    # One that makes queries, keys and values.
    "attention.qkv": (
        *("attn.c_attn", "attention.query_key_value", "self_attention.query_key_value"),
        *("attn.Wqkv", "self_attn.qkv_proj"),
    ),
    "attention.q_norm": ("self_attn.q_norm", "self_attn.qk_norm"),
    "attention.k_norm": ("self_attn.k_norm", "self_attn.qk_norm"),
    "attention.out": (
        *("attn.c_proj", "attn.attention.out_proj", "attn.out_proj", "attention.dense"),
        *("self_attn.out_proj", "self_attention.dense", "self_attn.o_proj", "self_attn.dense"),
        *("attention.output.dense", "attention.out_lin", "attn.Wo", "layer.0.SelfAttention.o"),
        *("attention.o_proj", "shared_transformer.self_attn.o_proj"),
    ),
    "cross_attention.q": ("encoder_attn.q_proj", "layer.1.EncDecAttention.q"),
    "cross_attention.k": ("encoder_attn.k_proj", "layer.1.EncDecAttention.k"),
    "cross_attention.v": ("encoder_attn.v_proj", "layer.1.EncDecAttention.v"),
    "cross_attention.out": ("encoder_attn.out_proj", "layer.1.EncDecAttention.o"),
    # What makes that which goes into the nonlinearity; of some it makes the rest too.
    "mlp.into": (
        *("mlp.c_fc", "mlp.fc_in", "mlp.dense_h_to_4h", "fc1", "ffn.up_proj", "mlp.fc1"),
        *("mlp.gate_proj", "mlp.gate_up_proj", "feed_forward.gate_proj", "feed_forward.key"),
        *("intermediate.dense", "ffn.lin1", "mlp.Wi", "layer.1.DenseReluDense.wi"),
        "layer.2.DenseReluDense.wi",
    ),
    "mlp.up": ("mlp.up_proj", "feed_forward.up_proj"),
    "mlp.out": (
        *("mlp.c_proj", "mlp.fc_out", "mlp.dense_4h_to_h", "fc2", "ffn.down_proj", "mlp.fc2"),
        *("mlp.down_proj", "feed_forward.down_proj", "feed_forward.value", "output.dense"),
        *("ffn.lin2", "mlp.Wo", "layer.1.DenseReluDense.wo", "layer.2.DenseReluDense.wo"),
    ),
    "mixer": ("mixer", "mamba", "mamba_decoder", "linear_attn"),
}


def layer_path(block: nn.Module, role: str) -> str | None:
    """The path of a block's layer of some role, None if it has none.

    Args:
        block: the block.
        role: such as "attention.out".
    """
    paths = {path for path, _ in block.named_modules()}
    found = [path for path in LAYERS[role] if path in paths]
    assert len(found) <= 1, found
    return found[0] if found else None


def layer(block: nn.Module, role: str) -> nn.Module | None:
    """A block's layer of some role, None if it has none.

    Args:
        block: as of `layer_path`.
        role: as of `layer_path`.
    """
    path = layer_path(block, role)
    return None if path is None else block.get_submodule(path)
