"""Lists of prompts that a server runs: each row is what a plain hook sees of that prompt alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from insitu import LanguageModel, PromptError, serve
from tests.fidelity.zoo import module_of

# They start servers, which import Transformers twice each; `make test` keeps test_remote_models.py.
pytestmark = pytest.mark.thorough

TEXTS = ["The Eiffel Tower is in the city of", "The Louvre is in", "Rome"]


@pytest.fixture(scope="module")
def here() -> LanguageModel:
    return LanguageModel("insitu/eiffel")


def alone(model: LanguageModel, text: str) -> torch.Tensor:
    """What a plain hook sees leave the third block, for a prompt by itself."""
    module: Any = model.load()
    seen: list[torch.Tensor] = []
    handle = module.transformer.h[2].register_forward_hook(
        lambda _, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        module(**model.tokenizer(text, return_tensors="pt"))
    handle.remove()
    return seen[0][0]


def assert_rows(found: torch.Tensor, mask: torch.Tensor, here: LanguageModel, side: str) -> None:
    """Checks each row against its prompt alone, and that padding is on a side."""
    for row, own, text in zip(found, mask, TEXTS, strict=True):
        expected = alone(here, text)
        torch.testing.assert_close(row[own.bool()], expected, rtol=1e-5, atol=1e-5)
        padding, tokens = [0] * (len(own) - len(expected)), [1] * len(expected)
        assert own.tolist() == (padding + tokens if side == "left" else tokens + padding)


def encoded(model: LanguageModel, side: str) -> Any:
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, side
    return tokenizer(TEXTS, padding=True, return_tensors="pt")


def test_a_list_of_texts_is_padded_on_the_left(there: LanguageModel, here: LanguageModel) -> None:
    with there.trace(TEXTS) as tracer:
        hidden = there.transformer.h[2].output[0].save()
    assert_rows(hidden.value, tracer.mask, here, "left")
    assert not there.loaded


def test_lists_of_ids_in_invocations_of_a_session(
    there: LanguageModel, here: LanguageModel
) -> None:
    ids = [there.tokenizer(text)["input_ids"] for text in TEXTS]
    with there.session(), there.trace() as tracer:
        with tracer.invoke(ids) as invoker:
            hidden = there.transformer.h[2].output[0].save()
        with tracer.invoke(TEXTS[1]):
            single = there.transformer.h[2].output[0].save()
    assert_rows(hidden.value, invoker.mask, here, "left")
    torch.testing.assert_close(single.value[0], alone(here, TEXTS[1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_a_tokenizer_has_padded(there: LanguageModel, here: LanguageModel, side: str) -> None:
    encoding = encoded(here, side)
    with there.trace(encoding):
        hidden = there.transformer.h[2].output[0].save()
    with there.trace(**encoding):
        again = there.transformer.h[2].output[0].save()
    for found in (hidden, again):
        assert_rows(found.value, encoding["attention_mask"], here, side)


def test_a_cache_of_several_prompts(there: LanguageModel, here: LanguageModel) -> None:
    cache = there.run_with_cache(TEXTS, "residual_out")
    assert_rows(cache["blocks.2.residual_out"], cache.mask, here, "left")


def test_a_model_that_is_here_is_not_loaded_for_a_list(url: str, here: LanguageModel) -> None:
    model = LanguageModel("insitu/eiffel")
    with model.trace(TEXTS, remote=url) as tracer:
        hidden = model.transformer.h[2].output[0].save()
    assert not model.loaded
    assert_rows(hidden.value, tracer.mask, here, "left")


def test_a_generation_that_ends_within_the_context(
    there: LanguageModel, here: LanguageModel
) -> None:
    with there.generate(TEXTS[0], max_new_tokens=300) as generator:  # the context is 256
        pass
    module: Any = here.load()
    ids = here.tokenizer(TEXTS[0], return_tensors="pt")
    assert generator.output.equal(module.generate(**ids, max_new_tokens=300, do_sample=False))
    with pytest.raises(PromptError, match="300 are to be generated, but the model's context"):
        with there.generate(TEXTS[0], max_new_tokens=300, min_new_tokens=300):
            pass


def test_a_list_that_the_server_would_pad_on_the_other_side_is_refused(tmp_path: Path) -> None:
    module: Any = module_of("rwkv")  # which does not hide padding on the left
    module.save_pretrained(tmp_path / "rwkv")
    with serve(tmp_path / "rwkv") as server:
        model = LanguageModel(remote=server.url)
        with pytest.raises(PromptError, match=r"on the left(.|\n)*on the right") as caught:
            with model.trace([[11, 12, 13], [21]]):
                model.output["logits"].save()
        assert caught.value.location is not None and caught.value.location.file == __file__
        with model.trace() as tracer:
            saved = []
            for ids in ([11, 12, 13], [21]):
                with tracer.invoke(ids):
                    saved.append(model.output["logits"].save())
    with torch.no_grad():
        for ids, found in zip(([11, 12, 13], [21]), saved, strict=True):
            expected = module(torch.tensor([ids])).logits
            torch.testing.assert_close(found.value, expected, rtol=1e-4, atol=1e-4)
