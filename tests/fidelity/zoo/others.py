"""Models of images and of sound, alone and with text."""

import torch

from tests.fidelity.zoo.architecture import (
    IMAGE_TOKEN,
    VOCABULARY,
    Architecture,
    drawing,
    ids,
    noise,
    sized,
)

PATCHES = 4  # of 4 by 4 pixels, in an image of 8 by 8
FRAMES = 16


def pixels(rows: int, length: int, seed: int) -> torch.Tensor:
    """Images; how long a prompt is has nothing to do with them."""
    return noise(rows, 3, 8, 8, seed=seed)


def spectrogram(rows: int, length: int, seed: int) -> torch.Tensor:
    return noise(rows, 8, FRAMES, seed=seed)


def with_image(rows: int, length: int, seed: int) -> torch.Tensor:
    """Token ids, of which some stand for an image."""
    prompt = ids(rows, length + PATCHES, seed)
    prompt[:, 1 : 1 + PATCHES] = IMAGE_TOKEN
    return prompt


IMAGE_TOWER = {
    "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip

OTHERS = [
    Architecture(
        "vit", "vision", "ViTForImageClassification", {**IMAGE_TOWER, "num_labels": 5},
        ("vit.layers|vit.encoder.layer",), cached=False, draw=drawing(pixel_values=pixels),
    ),
    Architecture(
        "clip", "contrastive", "CLIPModel",
        {
            "text_config": {
                "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 40,
                "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
                "projection_dim": 12, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
            },
            "vision_config": {**IMAGE_TOWER, "projection_dim": 12},
            "projection_dim": 12,
        },
        ("vision_model.encoder.layers", "text_model.encoder.layers"), cached=False,
        draw=drawing(input_ids=ids, pixel_values=pixels),
    ),
    Architecture(
        "whisper", "audio", "WhisperForConditionalGeneration",
        {
            "vocab_size": VOCABULARY, "num_mel_bins": 8, "d_model": 16, "encoder_layers": 2,
            "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "encoder_ffn_dim": 40, "decoder_ffn_dim": 24, "max_source_positions": FRAMES // 2,
            "max_target_positions": 64, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
            "decoder_start_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None,
        },
        ("model.encoder.layers", "model.decoder.layers"),
        draw=drawing(input_features=spectrogram, decoder_input_ids=ids),
    ),
    Architecture(
        "llava", "vision-language", "LlavaForConditionalGeneration",
        {
            "text_config": {
                "model_type": "llama", "vocab_size": VOCABULARY, "bos_token_id": 0,
                "eos_token_id": 2, "pad_token_id": 1, **sized(num_hidden_layers=2),
            },
            "vision_config": {"model_type": "clip_vision_model", **IMAGE_TOWER},
            "image_token_index": IMAGE_TOKEN, "image_token_id": IMAGE_TOKEN,
            "image_seq_length": PATCHES,
        },
        (
            "model.vision_tower.encoder.layers|model.vision_tower.vision_model.encoder.layers",
            "model.language_model.layers",
        ),
        draw=drawing(input_ids=with_image, pixel_values=pixels),
    ),
]  # fmt: skip
