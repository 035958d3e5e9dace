"""Causal tracing, beside the same loops with PyTorch's hooks."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from insitu import LanguageModel
from insitu.graph.errors import OptionError, PromptError
from insitu.methods import causal_tracing
from insitu.methods.causal_tracing import embedding_std
from tests.conftest import tiny_gpt2, tiny_llama
from tests.fidelity.architectures import spread_out
from tests.fidelity.zoo import module_of
from tests.thinning import sampled

PROMPTS = [[5, 17, 3, 88, 41], [7, 9, 30, 2, 66, 12, 4]]
SUBJECTS = [[1, 2], [-3]]
ANSWERS = [11, 23]
SAMPLES = 4


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def language_model(request: pytest.FixtureRequest) -> LanguageModel:
    """Models in which each part matters, as it does not at random initialisations."""
    model = LanguageModel({"gpt2": tiny_gpt2, "llama": tiny_llama}[request.param]())
    spread_out(model.module)
    return model


def modules_of(module: nn.Module, site: str) -> list[nn.Module]:
    gpt2 = module.config.model_type == "gpt2"
    blocks = module.transformer.h if gpt2 else module.model.layers
    if site == "residual_out":
        return list(blocks)
    if site == "mlp_out":
        return [block.mlp for block in blocks]
    return [block.attn if gpt2 else block.self_attn for block in blocks]


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def traced(
    module: nn.Module,
    ids: list[int],
    places: list[int],
    noise: torch.Tensor,
    restored: list[tuple[nn.Module, int]],
    answer: int,
) -> float:
    """The mean probability of an answer with the clean row of a batch restored in the others."""

    def drown(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        for number, place in enumerate(places):
            output[1:, place] += noise[:, number]
        return output

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(module.get_input_embeddings().register_forward_hook(drown))
        for owner, position in restored:

            def restore(module: nn.Module, args: Any, output: Any, at: int = position) -> None:
                first(output)[1:, at] = first(output)[0, at]

            stack.enter_context(owner.register_forward_hook(restore))
        rows = torch.tensor([ids] * (1 + len(noise)))
        found = module(input_ids=rows, use_cache=False).logits[1:, -1]
    return float(found.softmax(-1)[:, answer].mean())


def noise_of(model: LanguageModel, count: int, strength: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return strength * torch.randn(SAMPLES, count, model.d_model, generator=generator)


@pytest.mark.parametrize("language_model", sampled(["gpt2", "llama"], ["llama"]), indirect=True)
@pytest.mark.parametrize(("site", "width"), [("residual_out", 1), ("mlp_out", 2)])
def test_restored_states_of_prompts_of_any_length(
    language_model: LanguageModel, site: str, width: int
) -> None:
    model, module = language_model, language_model.module
    result = causal_tracing(
        model, PROMPTS, SUBJECTS, ANSWERS, samples=SAMPLES, noise=0.7, sites=site, window=width
    )
    layers = model.n_layers
    assert result.sizes == {"prompt": 2, "layer": layers, "position": 7}
    owners = modules_of(module, site)
    for number, (ids, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        places = [[1, 2], [4]][number]
        noise = noise_of(model, len(places), 0.7)
        for layer in range(layers):
            window = owners[max(layer - width // 2, 0) : layer + (width + 1) // 2]
            for position in range(len(ids)):
                parts = [(owner, position) for owner in window]
                expected = traced(module, ids, places, noise, parts, answer)
                found = result.values[number, layer, position].item()
                assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert result.values[number, :, len(ids) :].isnan().all()
        expected = traced(module, ids, places, noise, [], answer)
        assert result.details["corrupted"][number].item() == pytest.approx(expected, rel=1e-4)
        expected = traced(module, ids, places, 0 * noise, [], answer)
        assert result.details["clean"][number].item() == pytest.approx(expected, rel=1e-4)


def test_noise_is_as_wide_as_the_embedding() -> None:
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 8, "ffn_dim": 32, "num_hidden_layers": 2}
    config = OPTConfig(**sizes, num_attention_heads=4, vocab_size=100, max_position_embeddings=40)
    torch.manual_seed(0)
    module: Any = OPTForCausalLM(config).eval()
    spread_out(module)
    model = LanguageModel(module)
    found = causal_tracing(
        model, PROMPTS[0], [1, 2], 11, samples=SAMPLES, noise=0.7, sites="residual_out"
    )
    noise = 0.7 * torch.randn(SAMPLES, 2, 8, generator=torch.Generator().manual_seed(0))
    for layer, owner in enumerate(module.model.decoder.layers):
        expected = traced(module, PROMPTS[0], [1, 2], noise, [(owner, 4)], 11)
        assert found.values[layer, 4].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_sites_and_windows_by_site(language_model: LanguageModel) -> None:
    model, module = language_model, language_model.module
    result = causal_tracing(
        model, PROMPTS[0], [1, 2], 11, samples=SAMPLES, noise=0.7, seed=3,
        window={"attention_out": 3}, layers=[-1, 1],
    )  # fmt: skip
    last = model.n_layers - 1
    assert result.sizes == {"site": 3, "layer": 2, "position": 5}
    assert result.axis("site").labels == ("residual_out", "mlp_out", "attention_out")
    assert result.axis("layer").labels == (str(last), "1")
    noise = noise_of(model, 2, 0.7, seed=3)
    for at, (site, around) in enumerate(
        (("residual_out", 0), ("mlp_out", 0), ("attention_out", 1))
    ):
        owners = modules_of(module, site)
        for where, layer in enumerate((last, 1)):
            window = owners[layer - around : layer + around + 1]
            expected = traced(module, PROMPTS[0], [1, 2], noise, [(o, 4) for o in window], 11)
            found = result.values[at, where, 4].item()
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_positions_are_chosen(language_model: LanguageModel) -> None:
    model, module = language_model, language_model.module
    result = causal_tracing(
        model, PROMPTS, SUBJECTS, ANSWERS, samples=SAMPLES, noise=0.7, sites="residual_out",
        layers=0, positions=iter([-1, 1]),
    )  # fmt: skip
    assert result.sizes == {"prompt": 2, "layer": 1, "position": 2}
    assert result.axis("position").labels == ("-1", "1")
    (owner, *_) = modules_of(module, "residual_out")
    for number, (ids, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        places = [[1, 2], [4]][number]
        noise = noise_of(model, len(places), 0.7)
        for at, position in enumerate((len(ids) - 1, 1)):
            expected = traced(module, ids, places, noise, [(owner, position)], answer)
            found = result.values[number, 0, at].item()
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
        chosen = result.select(prompt=number)
        assert chosen.axis("position").labels == (str(ids[-1]), str(ids[1]))
    with pytest.raises(OptionError, match="no position 5"):
        causal_tracing(model, PROMPTS[0], 1, 11, positions=5)


def test_layers_without_a_site_are_left_out() -> None:
    """Of the three blocks of this model, the second has attention."""
    module = module_of("jamba")
    spread_out(module)
    model = LanguageModel(module)
    given: dict[str, Any] = {"samples": SAMPLES, "noise": 0.7}
    result = causal_tracing(model, PROMPTS[0], [1, 2], 11, sites="attention_out", window=3, **given)
    assert result.axis("layer").labels == ("1",)
    noise, owner = noise_of(model, 2, 0.7), module.model.layers[1].self_attn
    for position in range(5):
        expected = traced(module, PROMPTS[0], [1, 2], noise, [(owner, position)], 11)
        assert result.values[0, position].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    both = causal_tracing(model, PROMPTS[0], [1, 2], 11, **given)
    assert both.sizes == {"site": 3, "layer": 1, "position": 5}
    states = causal_tracing(model, PROMPTS[0], [1, 2], 11, sites="residual_out", **given)
    assert states.sizes == {"layer": 3, "position": 5}
    with pytest.raises(OptionError, match="Layer 0 has no `attention_out`"):
        causal_tracing(model, PROMPTS[0], [1, 2], 11, layers=[0, 1], **given)


def test_the_last_state_restored_is_the_clean_run(language_model: LanguageModel) -> None:
    result = causal_tracing(language_model, PROMPTS[0], 0, 11, sites="residual_out", noise=1.0)
    clean, corrupted = result.details["clean"], result.details["corrupted"]
    assert result.values[-1, -1].item() == pytest.approx(clean.item(), rel=1e-4)
    assert abs(clean - corrupted) > 1e-3 * clean
    assert result.values[-1, :-1].tolist() == pytest.approx([corrupted.item()] * 4, rel=1e-4)
    assert result.centre == pytest.approx(corrupted.item())


def test_noise_is_three_times_the_spread_of_embeddings(language_model: LanguageModel) -> None:
    model = language_model
    weights = model.module.get_input_embeddings().weight
    assert embedding_std(model) == pytest.approx(weights.std().item(), rel=1e-4)
    given = {"samples": SAMPLES, "sites": "mlp_out", "layers": 0}
    found = causal_tracing(model, PROMPTS[0], [1], 11, **given)
    assert found.details["noise"].item() == pytest.approx(3 * weights.std().item(), rel=1e-4)
    noise = noise_of(model, 1, 3 * weights.std().item())
    expected = traced(model.module, PROMPTS[0], [1], noise, [], 11)
    assert found.details["corrupted"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        ("The Eiffel Tower is in the city of", "Eiffel Tower", [" Eiffel", " Tower"]),
        ("The Eiffel Tower is in the city of", "The Eiffel", ["The", " Eiffel"]),
        ("The Eiffel Tower is in the city of", "iffel To", [" Eiffel", " Tower"]),
        ("The Eiffel Tower is in the city of", [-1, 0], ["The", " of"]),
    ],
)
def test_subjects_are_found_in_the_text(
    eiffel: LanguageModel, prompt: str, subject: Any, expected: list[str]
) -> None:
    from insitu.methods.prompts import read_prompts
    from insitu.methods.subjects import positions_of

    prompts = read_prompts(eiffel, prompt)
    (found,) = positions_of(eiffel, prompts, subject)
    assert [prompts.tokens[0][at] for at in found] == expected


@pytest.mark.thorough
def test_a_subject_in_several_prompts_is_drowned_in_each(eiffel: LanguageModel) -> None:
    prompts = ["The Louvre is in the city of", "To see the Louvre, you must visit"]
    given = {"samples": 2, "sites": "residual_out", "layers": [2]}
    both = causal_tracing(eiffel, prompts, "Louvre", " Paris", **given)
    for number, prompt in enumerate(prompts):
        alone = causal_tracing(eiffel, prompt, "Louvre", " Paris", **given)
        part = both.select(prompt=number)
        torch.testing.assert_close(part.values, alone.values, rtol=1e-4, atol=1e-5)
        assert part.axis("position") == alone.axis("position")
        assert alone.details["clean"] > alone.details["corrupted"]


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no samples": ({"samples": 0}, OptionError, "`samples`"),
    "a noise in words": ({"noise": "3"}, OptionError, "`noise` .* not '3'"),
    "no sites": ({"sites": []}, OptionError, "`sites` is empty"),
    "a negative noise": ({"noise": -1.0}, OptionError, "`noise`"),
    "no window": ({"window": 0}, OptionError, "`window`"),
    "a window elsewhere": ({"window": {"mlp": 3}}, OptionError, "mlp_out"),
    "a site": ({"sites": "residual"}, OptionError, "residual_out"),
    "a site without positions": ({"sites": "pattern"}, OptionError, "no positions"),
    "a position": ({"subject": [7]}, OptionError, "no position 7"),
    "no position": ({"subject": []}, OptionError, "No position was chosen"),
    "no subject": ({"subject": None}, OptionError, "its text or its positions, not None"),
    "another subject": ({"subject": "Kremlin"}, PromptError, "no subject"),
    "a subject twice": ({"subject": "i"}, PromptError, "times the"),
    "a longer answer": ({"answer": " Paris Rome"}, PromptError, "2 tokens"),
    "subjects": ({"prompts": ["The Louvre is in", "Rome is in"], "subject": ["Rome"]}, OptionError,
                 "1 subjects for 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(eiffel: LanguageModel, name: str) -> None:
    changed, error, message = WRONG[name]
    given = {"prompts": "The Louvre is in", "subject": "Louvre", "answer": " Paris", **changed}
    with pytest.raises(error, match=message):
        causal_tracing(eiffel, **given)
