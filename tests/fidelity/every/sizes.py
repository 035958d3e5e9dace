"""How small the sizes of a config become, by name and by type; and which types are not built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BY_SIZE: Mapping[int, tuple[str, ...]] = {
    128: ("mamba_d_ssm",),
    131: ("vocab_size", "vocab_size_per_layer_input", "entity_vocab_size", "decoder_vocab_size"),
    64: (
        *("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "model_dim"),
        *("word_embed_proj_dim", "width", "lru_width", "max_position_embeddings", "n_positions"),
        *("max_seq_len", "n_ctx", "max_sequence_length", "context_length", "attention_hidden_size"),
        *("index_head_dim", "entity_emb_size", "d_latents", "out_hidden_size", "num_latents"),
        *("max_encoder_position_embeddings", "max_decoder_position_embeddings", "projection_dim"),
    ),
    96: (
        *("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "hidden_dim"),
        *("decoder_ffn_dim", "moe_intermediate_size", "ffn_hidden_size", "feed_forward_dim"),
        *("shared_expert_intermediate_size", "expert_ffn_hidden_size"),
    ),
    32: ("q_lora_rank", "kv_lora_rank", "image_size"),
    16: (
        *("head_dim", "d_kv", "attention_head_dim", "kv_channels", "global_head_dim"),
        *("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "hidden_size_per_layer_input"),
        *(
            "linear_key_head_dim",
            "linear_value_head_dim",
            "mamba_d_head",
            "mamba_d_state",
            "linear_head_dim",
        ),
    ),
    8: ("rotary_dim", "chunk_size", "mamba_chunk_size", "mamba_n_heads", "linear_num_heads"),
    4: (
        *("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"),
        *("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"),
        *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        *("linear_num_value_heads",),
    ),
    1: ("n_group", "topk_group"),
    2: (
        *("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "depth"),
        *("decoder_layers", "num_decoder_layers", "num_encoder_layers", "num_key_value_heads"),
        *("num_kv_heads", "num_experts_per_tok", "linear_num_key_heads", "moe_topk"),
    ),
}
SIZES: Mapping[str, int] = {name: size for size, names in _BY_SIZE.items() for name in names}
"""The largest that a number of a config may be, by its name."""

WITH_IMAGES = frozenset(["git"])
"""Types whose text is read behind an image, without tokens for it among the ids."""

IDS: Mapping[str, int] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
"""Ids of tokens, which have to be in the small vocabulary."""

_LATENT = {
    "num_key_value_heads": 4,
    "text_config.num_key_value_heads": 4,
}  # keys and values of all heads come from one small vector
_HEADS = {"head_dim": 16, "text_config.head_dim": 16}
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(
        (
            *("axk1", "axk2", "deepseek_v32", "glm4_moe_lite"),
            *("glm_moe_dsa", "minicpm3", "youtu", "hy_v4"),
            *("bailing_hybrid", "glm5_next", "kimi_k25", "mistral_large4"),
        ),
        _LATENT,
    ),
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2},
    **{name: {**_LATENT, "qk_head_dim": 32} for name in ("longcat_flash", "deepseek_v3")},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_n_groups": 1},
    "kimi_linear": {**_LATENT, "linear_num_heads": 4, "linear_head_dim": 16},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "use_mamba_kernels": False,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "expand": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rwkv": {"attention_hidden_size": 64},
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "en_XX"},
    **dict.fromkeys(
        ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral", "hunyuan_vl"),
        _HEADS,
    ),
    "led": {"attention_window": [4, 4]},
    "nemotron": {"num_key_value_heads": 2},
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
        "intermediate_size": [96, 96], "activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 8,
    },
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "minimax": {
        "full_attn_alpha_factor": 1.5, "full_attn_beta_factor": 0.5, "mlp_alpha_factor": 0.75,
        "linear_attn_alpha_factor": 0.5, "linear_attn_beta_factor": 1.5, "mlp_beta_factor": 1.25,
    },
    "esm": {"vocab_size": 131},
    "t5gemma": {
        "decoder.cross_attention_hidden_size": 64, "encoder.num_hidden_layers": 2,
    },
}  # fmt: skip
"""What has to be so for a type to be small, by the attributes of its config."""

SEVERAL_AXES = frozenset(
    (
        *("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "qwen3_vl", "qwen3_vl_moe", "glm4v"),
        *("glm4v_moe", "glm46v", "glm_ocr", "glmga", "paddleocr_vl", "hunyuan_vl"),
    )
)
"""Types whose rotary embeddings tell height and width and time apart."""

NOT_BUILT: Mapping[str, str] = {
    **dict.fromkeys(
        ("gemma3n", "fast_vlm", "perception_lm"), "its images need a library that is not there"
    ),
    **dict.fromkeys(
        (
            *("blip", "blip-2", "instructblip", "instructblipvideo", "idefics", "kosmos-2"),
            *("pix2struct", "pp_formulanet", "pi0", "udop", "voxtral_realtime", "wav2vec2"),
        ),
        "it takes no prompt of text alone",
    ),
    **dict.fromkeys(
        ("encoder-decoder", "vision-encoder-decoder", "speech-encoder-decoder", "musicgen",
         "musicgen_melody"),
        "it is put together from other types",
    ),
    **dict.fromkeys(
        ("blt", "janus", "reformer", "vibevoice_asr", "xlstm", "zamba", "zamba2", "perceiver"),
        "no small config of it was found",
    ),
    **dict.fromkeys(
        (
            *("cohere_compass", "cohere_compass_text", "hrm_text", "qwen4_exp", "qwen4_exp_text"),
            *("gemma4_assistant", "gemma4_unified_assistant", "dots3_note", "dots3_note_text"),
            *("esmc", "chameleon", "deepseek_ocr2", "diffusion_gemma", "step3p7", "mistral4"),
            *("ernie4_5_vl_moe", "granite4_vision"),
        ),
        "its default config cannot be built, or not without another model",
    ),
    "image-text emu3": "its default config cannot be built, or not without another model",
    **dict.fromkeys(
        (
            *("mllama in 4", "phi4_multimodal in 4", "speech_to_text_2 in 4", "transfo-xl in 4"),
            *("fsmt in 4", "glm4v_moe in 4", "pixtral in 4"),
        ),
        "its default config cannot be built with this version of Transformers",
    ),
    "qdqbert": "it needs a library for quantisation",
    "glm4v in 4": "without a cache its forward of text fails",
    "recurrent_gemma in 4": "without a cache it takes no other batch size than the one before",
}  # fmt: skip
"""Types of which no small model is made, and why: of any task or version, or of one."""
