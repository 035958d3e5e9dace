"""A small random model of every type that Transformers has, made from its own default config.

Sizes go down by their names, whatever the type. What that cannot know of a type, such as sizes
that have to fit together, stands in `sizes.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.fidelity.every.sizes import IDS, NOT_BUILT, OVERRIDES, SEVERAL_AXES, SIZES, WITH_IMAGES
from tests.fidelity.zoo import spread_out

_MAPPINGS: Mapping[str, Mapping[str, Any]] = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "image-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
_MOST = 200_000_000  # parameters of what is still small
_FIRST, _LAST = 4, 90  # token ids that mean nothing
_VERSION = transformers.__version__.partition(".")[0]
CASES = [
    (task, kind)
    for task, kinds in _MAPPINGS.items()
    for kind in sorted(kinds)
    if NOT_BUILT.keys().isdisjoint((kind, f"{task} {kind}", f"{kind} in {_VERSION}"))
]


def small_model(task: str, kind: str) -> nn.Module:
    """Makes a model with random weights, the same each time.

    Args:
        task: which auto class it is of: "causal", "seq2seq", "masked" or "image-text".
        kind: its `model_type`.
    """
    named = _MAPPINGS[task][kind]
    made: Any = getattr(transformers, named if isinstance(named, str) else named[0])
    config = CONFIG_MAPPING[kind]()
    text = config.get_text_config()
    if isinstance(text, made.config_class):  # of a type of several parts, the model of its text
        config = text
    _shrink(config)
    for path, value in OVERRIDES.get(kind, {}).items():
        *parts, last = path.split(".")
        owner: Any = config
        for part in parts:
            owner = getattr(owner, part, None)
        if owner is not None:
            setattr(owner, last, value)
    if kind in SEVERAL_AXES:
        _set_sections(config.get_text_config())
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as that a layer without weights is not initialised
        module = made._from_config(config).float().eval()
    size = sum(parameter.numel() for parameter in module.parameters())
    assert size < _MOST, f"{kind} has {size / 1e6:.0f} million parameters: see `sizes.py`"
    spread_out(module)
    draw = torch.Generator().manual_seed(2)
    for name, buffer in module.named_buffers():  # such as what Gemma 4 multiplies a stream with
        if name in module.state_dict() and buffer.is_floating_point() and buffer.numel() == 1:
            buffer.mul_(0.5 + torch.rand((), generator=draw))
    return module


def inputs_for(module: nn.Module) -> dict[str, torch.Tensor]:
    """Token ids for a forward: twelve rows, so that what is linear can be told from what is not."""
    draw = torch.Generator().manual_seed(1)
    config: Any = module.config
    ids = torch.randint(_FIRST, _LAST, (12, 6), generator=draw)
    if config.model_type in WITH_IMAGES:
        size = config.vision_config.image_size
        return {"input_ids": ids, "pixel_values": torch.randn(12, 3, size, size, generator=draw)}
    if not config.is_encoder_decoder:
        return {"input_ids": ids}
    return {
        "input_ids": ids,
        "decoder_input_ids": torch.randint(_FIRST, _LAST, (12, 5), generator=draw),
    }


def _shrink(config: Any) -> None:
    """Makes the numbers of a config, and of the configs in it, small by their names."""
    for value in list(vars(config).values()):
        if isinstance(value, transformers.PretrainedConfig):
            _shrink(value)
    names = getattr(config, "attribute_map", None) or {}
    own = vars(config)
    for name, size in SIZES.items():
        name = names.get(name, name)
        found = own.get(name)
        if isinstance(found, int) and not isinstance(found, bool) and found > size:
            setattr(config, name, size)
    for name, value in IDS.items():
        if isinstance(own.get(name), int | list) or (name == "pad_token_id" and name in own):
            setattr(config, name, value)
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = own.get(name)
        if isinstance(kinds, list) and kinds:
            different = list(dict.fromkeys(kinds))
            count = max(2, len(different))
            setattr(config, name, (different * count)[:count])
            if hasattr(config, "num_hidden_layers"):
                config.num_hidden_layers = count


def _set_sections(config: Any) -> None:
    """Has the parts of a rotary embedding of several axes sum up to half a small head."""
    rope = getattr(config, "rope_parameters", None)
    half = 4 if isinstance(rope, dict) and rope.get("partial_rotary_factor", 1) == 0.5 else 8
    sections = [half // 4, half - half // 4 - half // 2, half // 2]
    if isinstance(rope, dict):
        rope["mrope_section"] = sections
    else:
        config.rope_scaling = {"rope_type": "default", "mrope_section": sections}
