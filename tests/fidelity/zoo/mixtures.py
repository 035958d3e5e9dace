"""Decoders with a choice of experts in the place of some or all MLPs."""

from tests.fidelity.zoo.architecture import decoder, sized

MIXTURES = [
    decoder(
        "mixtral", "MixtralForCausalLM", "model.layers",
        **sized(num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2),
    ),
    decoder(
        "qwen3-moe", "Qwen3MoeForCausalLM", "model.layers",
        **sized(
            num_hidden_layers=2, head_dim=6, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=24, norm_topk_prob=True, mlp_only_layers=[0],
        ),
    ),
    decoder(
        "deepseek-v3", "DeepseekV3ForCausalLM", "model.layers",
        **sized(
            num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=6,
            qk_rope_head_dim=4, v_head_dim=6, n_routed_experts=4, n_shared_experts=1,
            num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=24,
            first_k_dense_replace=1,
        ),
    ),
    decoder(
        "gpt-oss", "GptOssForCausalLM", "model.layers",
        **sized(
            num_hidden_layers=2, head_dim=6, num_local_experts=4, num_experts_per_tok=2,
            sliding_window=4, layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    decoder(
        "llama4", "Llama4ForCausalLM", "model.layers",
        **sized(
            num_hidden_layers=4, head_dim=6, num_local_experts=4, num_experts_per_tok=1,
            intermediate_size=24, intermediate_size_mlp=40, interleave_moe_layer_step=2,
            attention_chunk_size=8, no_rope_layers=[1, 1, 1, 0],
        ),
    ),
]  # fmt: skip
