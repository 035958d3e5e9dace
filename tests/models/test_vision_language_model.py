"""Language models with images, against plain Transformers with the same processor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from insitu import (
    LanguageModel,
    LoadError,
    OptionError,
    PromptError,
    PromptTypeError,
    VisionLanguageModel,
)
from tests.conftest import tiny_gpt2
from tests.models.kinds import image, llava, llava_processor, outputs_of

TEXT = "<image> The Louvre is in"
LAYER = "model.language_model.layers.1"
TOWER = "model.vision_tower"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    llava().save_pretrained(folder)
    llava_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder)


@pytest.fixture
def model(folder: Path) -> VisionLanguageModel:
    return VisionLanguageModel(folder)


def encoded(text: Any = TEXT, **media: Any) -> dict[str, Any]:
    return dict(llava_processor()(text=text, return_tensors="pt", **media))


def chat(seed: int = 0, text: str = "The Louvre is in") -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image(seed)}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def run(module: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return module(**kwargs)


def test_weights_load_with_the_first_run(model: VisionLanguageModel, plain: nn.Module) -> None:
    assert not model.loaded and "VisionLanguageModel" in repr(model)
    assert type(model.processor).__name__ == "LlavaProcessor"
    with model.trace(TEXT, images=image()):
        tower = model.model.vision_tower.output.save()
        hidden = model.model.language_model.layers[1].output[0].save()
        logits = model.lm_head.output.save()
        assert not model.loaded
    assert model.loaded
    inputs = encoded(images=image())
    assert torch.equal(logits.value, run(plain, **inputs).logits)
    assert torch.equal(hidden.value, outputs_of(plain, LAYER, plain, **inputs)[0])
    expected = outputs_of(plain, TOWER, plain, **inputs)[0].last_hidden_state
    assert torch.equal(tower.value.last_hidden_state, expected)


def test_the_image_makes_a_difference(model: VisionLanguageModel) -> None:
    saved = []
    with model.trace() as tracer:
        for seed in (0, 1):
            with tracer.invoke(TEXT, images=image(seed)):
                saved.append(model.lm_head.output.save())
    assert (saved[0].value - saved[1].value).abs().max() > 1e-3


@pytest.mark.thorough
def test_shapes_are_known_before_the_run(model: VisionLanguageModel) -> None:
    layer = model.model.language_model.layers[1]
    with model.trace(TEXT, images=image()):
        assert model.model.language_model.layers[0].output[0].shape == (1, 8, 16)
        assert model.model.multi_modal_projector.output.shape == (1, 4, 16)
        layer.skip(model.model.language_model.layers[0].output[0])
        logits = model.lm_head.output.save()
    with model.generate(TEXT, images=image(), max_new_tokens=2):
        assert layer.output.shape[0] == (1, 8, 16)
        assert model.lm_head.output.shape == (1, 1, 1337)
    with model.trace(TEXT, images=image()):
        early = model.lm_head(
            model.model.language_model.norm(model.model.language_model.layers[0].output[0])
        ).save()
    torch.testing.assert_close(logits.value, early.value)


def test_a_chat_may_have_its_images_in_it_or_beside_it(
    model: VisionLanguageModel, plain: nn.Module
) -> None:
    inputs = llava_processor().apply_chat_template(
        chat(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = run(plain, **inputs).logits
    with model.trace(chat()):
        inside = model.lm_head.output.save()
    beside = [{"role": "user", "content": [{"type": "image"}, chat()[0]["content"][1]]}]
    with model.trace(beside, images=[image()]):
        outside = model.lm_head.output.save()
    assert torch.equal(inside.value, expected) and torch.equal(outside.value, expected)


def test_what_a_processor_returned_is_a_prompt(
    model: VisionLanguageModel, plain: nn.Module
) -> None:
    inputs = llava_processor()(text=TEXT, images=image(), return_tensors="pt")
    with model.trace(inputs):
        logits = model.lm_head.output.save()
    assert torch.equal(logits.value, run(plain, **inputs).logits)


def test_several_texts_of_one_invocation_are_padded_by_the_processor(
    model: VisionLanguageModel, plain: nn.Module
) -> None:
    texts, images = [TEXT, "<image> Rome"], [image(0), image(1)]
    with model.trace(texts, images=images) as tracer:
        logits = model.lm_head.output.save()
        assert tracer.mask.tolist()[1][:2] == [0, 0]
    for row, text in enumerate(texts):
        alone = run(plain, **encoded(text, images=images[row])).logits[0]
        torch.testing.assert_close(logits.value[row, -len(alone) :], alone, atol=1e-5, rtol=0)
    with model.generate(texts, images=images, max_new_tokens=3) as generator:
        pass
    inputs = encoded(texts, images=images, padding=True, padding_side="left")
    expected = run(plain.generate, **inputs, max_new_tokens=3, pad_token_id=model.traits.pad_id)
    assert torch.equal(generator.output, expected)


def test_a_generation_and_its_steps(model: VisionLanguageModel, plain: Any) -> None:
    with model.generate(TEXT, images=image(), max_new_tokens=4) as generator:
        hidden = model.model.language_model.layers[1].output[0].save()
        with generator.every_step():
            tokens = generator.tokens().save()
        with generator.step(2):
            later = model.model.language_model.layers[1].output[0].save()
    inputs = {**encoded(images=image()), "max_new_tokens": 4, "pad_token_id": model.traits.pad_id}
    expected = run(plain.generate, **inputs)
    assert torch.equal(generator.output, expected)
    assert torch.equal(torch.stack(tokens.value, 1), expected[:, -4:])
    seen = outputs_of(plain, LAYER, plain.generate, **inputs)
    assert torch.equal(hidden.value, seen[0]) and torch.equal(later.value, seen[2])


def test_a_write_into_what_the_image_became_changes_what_is_said(
    model: VisionLanguageModel, plain: Any
) -> None:
    with model.trace(TEXT, images=image()):
        model.model.multi_modal_projector.output[:] = 0
        logits = model.lm_head.output.save()
    projector = plain.model.multi_modal_projector
    hook = projector.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    expected = run(plain, **encoded(images=image())).logits
    hook.remove()
    assert torch.equal(logits.value, expected)
    assert (expected - run(plain, **encoded(images=image())).logits).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["trace", "generate"])
def test_invocations_see_nothing_of_each_other(
    model: VisionLanguageModel, plain: Any, mode: str
) -> None:
    options = {"max_new_tokens": 3} if mode == "generate" else {}
    longer = "<image> To see the Hagia Sophia, you must visit"
    given = [
        ((TEXT,), {"images": image(0)}, encoded(images=image(0))),
        ((longer,), {"images": [image(1)]}, encoded(longer, images=image(1))),
        (("The Louvre is in the city of",), {}, encoded("The Louvre is in the city of")),
        (("Rome",), {}, encoded("Rome")),
    ]
    saved, invokers = [], []
    with getattr(model, mode)(**options) as tracer:
        for args, media, _ in given:
            with tracer.invoke(*args, **media) as invoker:
                saved.append(model.model.language_model.layers[1].output[0].save())
                invokers.append(invoker)
    for own, invoker, (_, _, inputs) in zip(saved, invokers, given, strict=True):
        call: Any = plain
        inputs.pop("mm_token_type_ids", None)
        if mode == "generate":
            call = plain.generate
            inputs = {**inputs, **options, "pad_token_id": model.traits.pad_id}
            assert torch.equal(invoker.output, run(call, **inputs))
        expected = outputs_of(plain, LAYER, call, **inputs)[0]
        torch.testing.assert_close(own.value, expected, atol=1e-5, rtol=0)


@pytest.mark.thorough
def test_texts_alone_share_a_pass(model: VisionLanguageModel) -> None:
    with model.trace() as tracer:
        for text in ("The Louvre is in", "Rome"):
            with tracer.invoke(text):
                shape = model.lm_head.output.shape
                saved = model.lm_head.output.save()
                assert shape[0] == 1
    assert len(tracer.plan.passes) == 1 and saved.shape == shape


def test_values_of_one_prompt_go_into_another(model: VisionLanguageModel, plain: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(TEXT, images=image(0)):
            seen = model.model.multi_modal_projector.output
        with tracer.invoke(TEXT, images=image(1)):
            model.model.multi_modal_projector.output = seen
            logits = model.lm_head.output.save()
    assert torch.equal(logits.value, run(plain, **encoded(images=image(0))).logits)


def test_gradients_reach_the_image(model: VisionLanguageModel, plain: Any) -> None:
    with model.trace(TEXT, images=image()):
        gradient = model.model.multi_modal_projector.output.grad.save()
        model.lm_head.output[0, -1].max().backward()
    seen: list[torch.Tensor] = []
    hook = plain.model.multi_modal_projector.register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    logits = plain(**encoded(images=image())).logits
    hook.remove()
    (expected,) = torch.autograd.grad(logits[0, -1].max(), seen)
    torch.testing.assert_close(gradient.value, expected)


def test_numbers_of_the_image_are_in_the_dtype_of_the_model(folder: Path) -> None:
    model = VisionLanguageModel(folder, dtype=torch.bfloat16)
    with model.trace(TEXT, images=image()):
        pixels = model.model.vision_tower.inputs.save()
    args, kwargs = pixels.value
    tensors = [*args, *(v for v in kwargs.values() if isinstance(v, torch.Tensor))]
    assert tensors[0].dtype == torch.bfloat16


def test_a_model_in_memory_takes_its_processor_along(plain: Any) -> None:
    model = VisionLanguageModel(plain, processor=llava_processor())
    with model.trace(TEXT, images=image()):
        logits = model.lm_head.output.save()
    assert torch.equal(logits.value, run(plain, **encoded(images=image())).logits)


def test_a_missing_processor_is_an_error_only_when_it_is_needed(tmp_path: Path, plain: Any) -> None:
    llava().save_pretrained(tmp_path)
    model = VisionLanguageModel(tmp_path)
    with pytest.raises(PromptError, match="no processor: pass `processor=`") as caught:
        with model.trace(TEXT, images=image()):
            pass
    assert __file__ in str(caught.value)
    with pytest.raises(LoadError, match="no processor"):
        _ = model.processor
    with pytest.raises(PromptError, match="no tokenizer"), model.trace("text"):
        pass
    with model.trace(encoded(images=image())):
        logits = model.lm_head.output.save()
    assert torch.equal(logits.value, run(plain, **encoded(images=image())).logits)


def test_what_the_processor_refuses_is_an_error_of_the_prompt(model: VisionLanguageModel) -> None:
    with pytest.raises(PromptError, match="LlavaProcessor cannot process the prompt") as caught:
        with model.trace("<image> <image> two", images=[object()]):
            pass
    assert __file__ in str(caught.value)


def test_images_go_with_text(model: VisionLanguageModel) -> None:
    with pytest.raises(PromptTypeError, match="a string, a list of strings or a chat"):
        with model.trace([1, 2, 3], images=image()):
            pass
    with pytest.raises(OptionError, match="own `images`: give it to `invoke`"):
        model.trace(images=image())
    with pytest.raises(OptionError, match="takes no option `pictures`"):
        with model.trace() as tracer, tracer.invoke(TEXT, pictures=image()):
            pass


def test_a_language_model_says_that_it_takes_no_images() -> None:
    model = LanguageModel(tiny_gpt2())
    with pytest.raises(OptionError, match="takes no `images`: load it as a `VisionLanguageModel`"):
        model.trace([1, 2], images=image())
    with pytest.raises(OptionError, match="takes no `images`: load it as a `VisionLanguageModel`"):
        with model.trace() as tracer, tracer.invoke([1, 2], images=image()):
            pass


def test_a_language_model_without_eyes_is_an_error(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="no vision-language model: load it with `LanguageModel`"):
        VisionLanguageModel(tmp_path)
