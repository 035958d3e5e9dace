"""Decoders whose blocks are attention and an MLP, all alike."""

from tests.fidelity.zoo.architecture import decoder, sized

DECODERS = [
    decoder(
        "gpt2", "GPT2LMHeadModel", "transformer.h",
        n_embd=16, n_layer=3, n_head=4, n_inner=40, n_positions=64,
    ),
    decoder(
        "gpt-neo", "GPTNeoForCausalLM", "transformer.h",
        hidden_size=16, num_layers=2, num_heads=4, intermediate_size=40, window_size=4,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=64,
    ),
    decoder(
        "gpt-j", "GPTJForCausalLM", "transformer.h",
        n_embd=16, n_layer=2, n_head=4, n_inner=40, n_positions=64, rotary_dim=2,
    ),
    decoder(
        "gpt-neox", "GPTNeoXForCausalLM", "gpt_neox.layers",
        hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, rotary_pct=0.5,
    ),
    decoder(
        "opt", "OPTForCausalLM", "model.decoder.layers",
        hidden_size=16, num_hidden_layers=2, ffn_dim=40, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=16,
    ),
    decoder("bloom", "BloomForCausalLM", "transformer.h", hidden_size=16, n_layer=2, n_head=4),
    decoder(
        "falcon", "FalconForCausalLM", "transformer.h",
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
        ffn_hidden_size=40, new_decoder_architecture=True,
    ),
    decoder(
        "falcon-parallel", "FalconForCausalLM", "transformer.h",
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, ffn_hidden_size=40,
        multi_query=True, parallel_attn=True,
    ),
    decoder(
        "falcon-alibi", "FalconForCausalLM", "transformer.h",
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, ffn_hidden_size=40,
        multi_query=False, parallel_attn=False, alibi=True, bias=True,
    ),
    decoder(
        "mpt", "MptForCausalLM", "transformer.blocks",
        d_model=16, n_heads=4, n_layers=2, expansion_ratio=3, max_seq_len=64, use_cache=True,
    ),
    decoder("llama", "LlamaForCausalLM", "model.layers", **sized()),
    decoder("mistral", "MistralForCausalLM", "model.layers", **sized(sliding_window=4)),
    decoder("gemma", "GemmaForCausalLM", "model.layers", **sized(head_dim=6)),
    decoder(
        "gemma2", "Gemma2ForCausalLM", "model.layers",
        **sized(head_dim=6, sliding_window=4, query_pre_attn_scalar=6),
    ),
    decoder(
        "gemma3", "Gemma3ForCausalLM", "model.layers",
        **sized(
            head_dim=6, sliding_window=4, query_pre_attn_scalar=6,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    decoder("qwen2", "Qwen2ForCausalLM", "model.layers", **sized()),
    decoder("qwen3", "Qwen3ForCausalLM", "model.layers", **sized(head_dim=6)),
    decoder(
        "phi", "PhiForCausalLM", "model.layers",
        **sized(num_hidden_layers=2, num_key_value_heads=4, partial_rotary_factor=0.5),
    ),
    decoder("phi3", "Phi3ForCausalLM", "model.layers", **sized(num_hidden_layers=2)),
    decoder(
        "olmo", "OlmoForCausalLM", "model.layers", **sized(num_hidden_layers=2, clip_qkv=8.0)
    ),
    decoder("olmo2", "Olmo2ForCausalLM", "model.layers", **sized(num_hidden_layers=2)),
    decoder(
        "cohere", "CohereForCausalLM", "model.layers",
        **sized(num_hidden_layers=2, use_qk_norm=True),
    ),
    decoder(
        "stablelm", "StableLmForCausalLM", "model.layers",
        **sized(num_hidden_layers=2, partial_rotary_factor=0.5),
    ),
    decoder(
        "granite", "GraniteForCausalLM", "model.layers",
        **sized(
            num_hidden_layers=2, embedding_multiplier=3.0, residual_multiplier=0.7,
            attention_multiplier=0.4, logits_scaling=2.0,
        ),
    ),
    decoder(
        "gpt-bigcode", "GPTBigCodeForCausalLM", "transformer.h",
        n_embd=16, n_layer=2, n_head=4, n_inner=40, n_positions=64, multi_query=True,
    ),
]  # fmt: skip
