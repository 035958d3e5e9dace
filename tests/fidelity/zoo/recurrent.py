"""Decoders with a state in the place of attention, and those that have layers of both kinds."""

from tests.fidelity.zoo.architecture import decoder, sized

RECURRENT = [
    decoder(
        "mamba", "MambaForCausalLM", "backbone.layers", cached=False,
        hidden_size=16, state_size=4, num_hidden_layers=2,
    ),
    decoder(
        "mamba2", "Mamba2ForCausalLM", "backbone.layers", cached=False,
        hidden_size=16, state_size=4, num_hidden_layers=2, num_heads=4, head_dim=8, n_groups=2,
        chunk_size=4,
    ),
    decoder(
        "rwkv", "RwkvForCausalLM", "rwkv.blocks", cached=False,
        hidden_size=16, attention_hidden_size=16, intermediate_size=40, num_hidden_layers=2,
        context_length=64,
    ),
    decoder(
        "jamba", "JambaForCausalLM", "model.layers",
        **sized(
            attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
            expert_layer_offset=1, num_experts=4, num_experts_per_tok=2, mamba_d_state=4,
            mamba_d_conv=4, mamba_expand=2, mamba_dt_rank=4, use_mamba_kernels=False,
        ),
    ),
    decoder(
        "bamba", "BambaForCausalLM", "model.layers",
        **sized(
            attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1,
            mamba_d_state=4, mamba_chunk_size=4,
        ),
    ),
    decoder(
        "zamba2", "Zamba2ForCausalLM", "model.layers",
        **sized(
            num_key_value_heads=4, layers_block_type=["mamba", "hybrid", "mamba"],
            num_mem_blocks=1, n_mamba_heads=4, mamba_headdim=8, mamba_d_state=4,
            mamba_ngroups=1, chunk_size=4, adapter_rank=4, use_mem_rope=True,
        ),
    ),
    decoder(
        "qwen3-next", "Qwen3NextForCausalLM", "model.layers",
        **sized(
            head_dim=8, layer_types=["linear_attention", "full_attention", "linear_attention"],
            linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=4,
            linear_value_head_dim=6, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=24, shared_expert_intermediate_size=24,
        ),
    ),
]  # fmt: skip
