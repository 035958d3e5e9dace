"""Models of images and of speech from folders, against plain Transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from insitu import LanguageModel, LoadError, Model, VisionLanguageModel
from tests.conftest import tiny_gpt2
from tests.models.kinds import clip, llava, outputs_of, vit, whisper

PIXELS = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
IDS = torch.tensor([[3, 14, 15, 92, 65]])
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, torch.Tensor], str, str]] = {
    "images": (vit, {"pixel_values": PIXELS}, "vit.layernorm", "logits"),
    "speech": (
        whisper,
        {
            "input_features": torch.linspace(-1, 1, 160).reshape(1, 8, 20),
            "decoder_input_ids": torch.tensor([[1, 2]]),
        },
        "model.encoder.layers.1",
        "logits",
    ),
    "images and text": (
        clip,
        {"input_ids": IDS, "pixel_values": PIXELS},
        "visual_projection",
        "logits_per_image",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_any_model_of_transformers_is_read_without_loading_it_first(
    tmp_path: Path, name: str
) -> None:
    make, inputs, path, result = CASES[name]
    module = make()
    module.save_pretrained(tmp_path)
    model = Model.from_pretrained(tmp_path)
    assert not model.loaded and type(model.module) is type(module)
    assert model.config.model_type == module.config.model_type
    site: Any = model
    for part in path.split("."):
        site = site[int(part)] if part.isdigit() else getattr(site, part)
    with model.trace(**inputs):
        read = site.output
        if name == "speech":  # it is a block's
            read = read[0]
        shape, dtype = read.shape, read.dtype
        read, output = read.save(), model.output[result].save()
        assert not model.loaded
    assert model.loaded and not model.module.training
    module = type(module).from_pretrained(tmp_path)
    expected = outputs_of(module, path, module, **inputs)[0]
    assert torch.equal(read.value, expected)
    assert (shape, dtype) == (expected.shape, expected.dtype)
    with torch.no_grad():
        assert torch.equal(output.value, module(**inputs)[result])


def test_each_invocation_has_arguments_of_its_own(tmp_path: Path) -> None:
    module = vit()
    module.save_pretrained(tmp_path)
    model = Model.from_pretrained(tmp_path)
    with model.trace() as tracer:
        with tracer.invoke(pixel_values=PIXELS):
            hidden = model.vit.layernorm.output
        with tracer.invoke(pixel_values=-PIXELS):
            model.vit.layernorm.output = hidden
            logits = model.output.logits.save()
    with torch.no_grad():
        assert torch.equal(logits.value, module(PIXELS).logits)


def test_arguments_reach_from_pretrained(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path)
    model = Model.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.module.dtype == torch.bfloat16
    assert model.load().dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_edits_hold_and_do_not_load(tmp_path: Path) -> None:
    module = vit()
    module.save_pretrained(tmp_path)
    model = Model.from_pretrained(tmp_path)
    with model.edit() as edited:
        edited.vit.layernorm.output[:] = 0
    assert not edited.loaded
    with edited.trace(pixel_values=PIXELS):
        logits = edited.output.logits.save()
    assert torch.equal(logits.value[0], module.classifier.bias)
    assert model.load() is edited.load()


def test_a_model_that_cannot_be_made_without_weights_is_loaded_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = vit()
    module.save_pretrained(tmp_path)

    def looks(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(type(module), "_from_config", looks)
    model = Model.from_pretrained(tmp_path)
    assert model.loaded
    with model.trace(pixel_values=PIXELS):
        logits = model.output.logits.save()
    with torch.no_grad():
        assert torch.equal(logits.value, module(PIXELS).logits)


def test_what_is_nowhere_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no-such/model") as caught:
        Model.from_pretrained("no-such/model")
    assert __file__ in str(caught.value)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(LoadError):
        Model.from_pretrained(tmp_path)


def test_every_class_of_models_can_be_made_so(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    llava().save_pretrained(tmp_path / "llava")
    mine = object()
    model = LanguageModel.from_pretrained(tmp_path / "gpt2", tokenizer=mine)
    assert type(model) is LanguageModel and model.tokenizer is mine and not model.loaded
    assert type(VisionLanguageModel.from_pretrained(tmp_path / "llava")) is VisionLanguageModel
    assert type(Model.from_pretrained(tmp_path / "gpt2").module).__name__ == "GPT2LMHeadModel"


def test_a_plain_module_has_no_config_and_is_loaded() -> None:
    model = Model(nn.Linear(2, 2))
    assert model.loaded
    with pytest.raises(AttributeError, match="config"):
        _ = model.config


def test_a_pipeline_is_made_of_modules() -> None:
    """What diffusers does: a loop of its own around a module that gets keyword arguments."""

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mid_block = nn.Linear(3, 3)

        def forward(self, sample: torch.Tensor, timestep: int) -> torch.Tensor:
            return self.mid_block(sample) / (timestep + 1)

    torch.manual_seed(0)
    module = Denoiser()
    model, sample = Model(module), torch.ones(1, 3)
    for timestep in range(3):
        with model.trace(sample, timestep=timestep):
            model.mid_block.output[:, 0] = 0
            changed = model.output.save()
        sample = changed.value
    assert sample.shape == (1, 3) and sample[0, 0] == 0
