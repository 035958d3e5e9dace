"""Small models of many kinds with random weights, and what plain hooks see in them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from insitu import zoo
from tests.fidelity.architectures import spread_out, tiny_bert, tiny_t5

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SIGHT = {**SIZES, "num_hidden_layers": 3, "image_size": 8, "patch_size": 4}
HALVES = {
    **{f"{half}_{what}": 2 for half in ("encoder", "decoder") for what in ("layers",)},
    **{f"{half}_attention_heads": 4 for half in ("encoder", "decoder")},
    **{f"{half}_ffn_dim": 32 for half in ("encoder", "decoder")},
    "d_model": 16,
}


def bert() -> nn.Module:
    return ready(tiny_bert)


def t5() -> nn.Module:
    return ready(tiny_t5)


def bart() -> nn.Module:
    config = BartConfig(vocab_size=100, max_position_embeddings=40, **HALVES)
    return ready(lambda: BartForConditionalGeneration(config))


def vit() -> nn.Module:
    return ready(lambda: ViTForImageClassification(ViTConfig(**SIGHT)))


def clip() -> nn.Module:
    text = {**SIZES, "vocab_size": 100, "max_position_embeddings": 20}
    config = CLIPConfig(text_config=text, vision_config=SIGHT, projection_dim=8)
    return ready(lambda: CLIPModel(config))


def whisper() -> nn.Module:
    config = WhisperConfig(
        vocab_size=100, num_mel_bins=8, max_source_positions=10, max_target_positions=20,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **HALVES,
    )  # fmt: skip
    return ready(lambda: WhisperForConditionalGeneration(config))


def llava() -> nn.Module:
    tokenizer = seeing_tokenizer()
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    text = LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=64, **SIZES
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SIGHT),
        text_config=text,
        image_token_index=image_id,
        image_token_id=image_id,
    )
    return ready(lambda: LlavaForConditionalGeneration(config))


def seeing_tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(zoo.folder("insitu/eiffel"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def llava_processor() -> Any:
    sizes = {"shortest_edge": 8}, {"height": 8, "width": 8}
    name = "CLIPImageProcessorPil"  # Transformers 5 has two, one of them for torchvision
    if not hasattr(transformers, name):
        name = "CLIPImageProcessor"
    images = getattr(transformers, name)(size=sizes[0], crop_size=sizes[1])
    return LlavaProcessor(
        images,
        seeing_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for m in messages %}{{ m.role }}: {% for c in m.content %}"
            "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %} "
            "{% endfor %}{% if add_generation_prompt %}answer:{% endif %}"
        ),
    )


def image(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (12, 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ready(make: Callable[[], nn.Module]) -> nn.Module:
    """A model in eval mode, with weights that depend on nothing else and are nowhere zero."""
    torch.manual_seed(0)
    module = make().eval()
    spread_out(module)
    return module


def outputs_of(module: nn.Module, path: str, call: Callable[..., Any], **kwargs: Any) -> list[Any]:
    """The oracle: what a module returns at each of its calls in a call of the model."""
    seen: list[Any] = []
    part = module.get_submodule(path)
    handle = part.register_forward_hook(lambda module, args, output: seen.append(first(output)))
    try:
        with torch.no_grad():
            call(**kwargs)
    finally:
        handle.remove()
    return seen


def first(output: Any) -> Any:
    """The hidden states, where a block returns more."""
    return output[0] if isinstance(output, tuple) else output
