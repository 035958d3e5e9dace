"""The tuned lens against a training loop in plain PyTorch, and against a closed form."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from insitu import LanguageModel, LoadError
from insitu.graph.errors import OptionError, ShapeError
from insitu.methods import Result, TunedLens, logit_lens, train_tuned_lens, tuned_lens
from tests.fidelity.zoo import module_of
from tests.thinning import sampled

PROMPTS = [[5, 6, 7, 8], [10, 11], [5, 60, 7, 8, 9], [20, 21, 22]]


PLACES = [
    "Colosseum", "Kremlin", "Hagia Sophia", "Brandenburg Gate", "Parthenon", "Taj Mahal",
    "Sagrada Familia", "Burj Khalifa", "Louvre", "Big Ben", "Reichstag", "Tower Bridge",
    "Skytree", "Giza Pyramid", "Eiffel Tower", "Acropolis",
]  # fmt: skip
TEXTS = [
    "The {} is in the city of",
    "The {} is located in",
    "The {} stands in the center of",
    "The {} was built in the city of",
    "The {} is the pride of",
    "The {} is a symbol of",
]


def states_of(module: nn.Module, blocks: Any, ids: list[int]) -> list[torch.Tensor]:
    """The residual stream before the first block and after each, by plain hooks."""
    seen: list[torch.Tensor] = []

    def leaving(part: nn.Module, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0].clone())

    handles = [blocks[0].register_forward_pre_hook(lambda part, args: seen.append(args[0][0]))]
    handles += [block.register_forward_hook(leaving) for block in blocks]
    with torch.no_grad():
        module(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def end_of(kind: str, module: Any) -> tuple[Any, nn.Module, nn.Module]:
    if kind == "gpt2":
        return module.transformer.h, module.transformer.ln_f, module.lm_head
    return module.model.layers, module.model.norm, module.lm_head


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("gpt2", nullcontext),
        pytest.param("llama", torch.inference_mode, marks=pytest.mark.thorough),
    ],
)
def test_training_is_the_loop_that_one_would_write(kind: str, mode: Any) -> None:
    module = module_of(kind)
    blocks, norm, head = end_of(kind, module)
    given = PROMPTS[:3]
    orders = torch.Generator().manual_seed(4)
    layers = [nn.Linear(16, 16) for _ in blocks]
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    parameters = [part for layer in layers for part in layer.parameters()]
    adam = torch.optim.Adam(parameters, lr=0.01)
    losses: list[list[float]] = []
    for _ in range(3):
        order = torch.randperm(3, generator=orders).tolist()
        for numbers in (order[:2], order[2:]):
            rows = [states_of(module, blocks, given[number]) for number in numbers]
            states = [torch.cat(of_layer) for of_layer in zip(*rows, strict=True)]
            with torch.no_grad():
                target = head(norm(states[-1])).log_softmax(-1)
            adam.zero_grad()
            own = [
                F.kl_div(
                    head(norm(state + layer(state))).log_softmax(-1), target, log_target=True,
                    reduction="batchmean",
                )
                for state, layer in zip(states[:-1], layers, strict=True)
            ]  # fmt: skip
            losses.append([loss.item() for loss in own])
            sum(own, torch.zeros(())).backward()
            adam.step()
    module.zero_grad(set_to_none=True)
    with mode():
        lens = train_tuned_lens(
            LanguageModel(module), given, epochs=3, batch_size=2, seed=4,
            optimiser=lambda parts: torch.optim.Adam(parts, lr=0.01),
        )  # fmt: skip
    assert torch.allclose(lens.losses, torch.tensor(losses), atol=1e-5)
    # Adam makes a step of full size of a gradient that is but rounding.
    assert torch.allclose(lens.weight, torch.stack([one.weight for one in layers]), atol=1e-4)
    assert torch.allclose(lens.bias, torch.stack([one.bias for one in layers]), atol=1e-4)
    assert all(part.grad is None for part in module.parameters())

    seen = tuned_lens(LanguageModel(module), given[2], lens, top=100)
    states = states_of(module, blocks, given[2])
    with torch.no_grad():
        told = [state + layer(state) for state, layer in zip(states, layers, strict=False)]
        wanted = [head(norm(one)).softmax(-1) for one in [*told, states[-1]]]
    found = torch.zeros(4, 5, 100).scatter(2, seen.details["ids"], seen.details["probabilities"])
    assert torch.allclose(found, torch.stack(wanted), atol=1e-4)


@pytest.mark.parametrize("kind", sampled(["gpt2", "gemma2"], ["gpt2"]))
def test_an_untrained_lens_sees_what_the_logit_lens_sees(kind: str) -> None:
    model = LanguageModel(module_of(kind))
    plain = logit_lens(model, PROMPTS)
    tuned = tuned_lens(model, PROMPTS, TunedLens.untrained(model))
    assert torch.equal(tuned.values.nan_to_num(), plain.values.nan_to_num())
    assert tuned.texts == plain.texts and tuned.axes == plain.axes


class Turned(nn.Module):
    """A block that returns a fixed affine map of what it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, width))

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states + self.mlp(hidden_states)


@pytest.mark.thorough
def test_of_affine_layers_it_learns_the_affine_map() -> None:
    module: Any = module_of("llama")
    torch.manual_seed(1)
    for layer in range(3):
        module.model.layers[layer] = Turned(16)
        nn.init.normal_(module.model.layers[layer].mlp[0].weight, std=0.05)
    model = LanguageModel(module.eval())
    maps = [block.mlp[0] for block in module.model.layers]
    exact = TunedLens.untrained(model)
    whole, shift = torch.eye(16), torch.zeros(16)
    for number in (2, 1, 0):  # what all blocks behind it make of what a layer says
        step = torch.eye(16) + maps[number].weight.detach()
        shift = shift + whole @ maps[number].bias.detach()
        whole = whole @ step
        exact.weight[number], exact.bias[number] = whole - torch.eye(16), shift

    prompts = torch.arange(4, 84).reshape(8, 10).tolist()
    final = logit_lens(model, prompts, top=100)
    seen = tuned_lens(model, prompts, exact, top=100)
    for layer in range(4):
        assert torch.allclose(seen.values[:, layer], final.values[:, -1], atol=1e-5)

    lens = train_tuned_lens(
        model, prompts, epochs=150, optimiser=lambda parts: torch.optim.Adam(parts, lr=0.01)
    )
    assert bool((lens.losses[-1] < 1e-2 * lens.losses[0]).all())
    # Every token of the vocabulary that is used was seen: the map is known where they point.
    states = torch.stack([model.W_E[ids] for ids in prompts]).flatten(0, 1).detach()
    made = states + states @ lens.weight[0].T + lens.bias[0]
    wanted = states + states @ exact.weight[0].T + exact.bias[0]
    assert F.cosine_similarity(made, wanted, dim=-1).min() > 0.98


def kl(model: LanguageModel, prompts: Any, seen: Result) -> torch.Tensor:
    """KL(final ‖ lens) of each layer, from the probabilities of all tokens."""
    count = model.vocab_size
    shape = (*seen.details["ids"].shape[:-1], count)
    p = torch.zeros(shape).scatter(
        -1, seen.details["ids"].clamp(min=0), seen.details["probabilities"]
    )
    final = p[..., -1:, :, :]
    away = (final * (final.clamp_min(1e-30).log() - p.clamp_min(1e-30).log())).sum(-1)
    return away.nanmean(-1).mean(0)


@pytest.mark.thorough
def test_training_lowers_the_divergence_on_other_prompts(eiffel: LanguageModel) -> None:
    prompts = [text.format(place) for text in TEXTS for place in PLACES[:-3]]
    others = [text.format(place) for text in TEXTS for place in PLACES[-3:]]
    lens = train_tuned_lens(eiffel, prompts, epochs=3, batch_size=6)
    before = kl(eiffel, others, logit_lens(eiffel, others, top=10**6))
    after = kl(eiffel, others, tuned_lens(eiffel, others, lens, top=10**6))
    assert bool((after[:-1] < before[:-1]).all()) and after[1] < before[1] / 2
    assert after[-1] == before[-1] == 0
    shown = lens.training
    assert shown.sizes == {"step": 39, "layer": 6} and bool(
        (shown.values[-1] < shown.values[0]).all()
    )


def test_it_is_saved_loaded_and_trained_on(gpt2: LanguageModel, tmp_path: Any) -> None:
    lens = train_tuned_lens(gpt2, PROMPTS, epochs=1)
    lens.save(tmp_path / "lens.safetensors")
    loaded = TunedLens.load(tmp_path / "lens.safetensors")
    for name in ("weight", "bias", "losses"):
        assert torch.equal(getattr(loaded, name), getattr(lens, name))
    more = train_tuned_lens(gpt2, PROMPTS, epochs=2, batch_size=2, lens=loaded)
    assert more.losses.shape == (5, 4) and torch.equal(more.losses[:1], lens.losses)
    assert torch.equal(loaded.weight, lens.weight) and not torch.equal(more.weight, lens.weight)
    tuned_lens(gpt2, [5, 6], lens).save(tmp_path / "result.safetensors")
    with pytest.raises(LoadError, match="no tuned lens"):
        TunedLens.load(tmp_path / "result.safetensors")


def test_errors_say_what_is_wrong(gpt2: LanguageModel, llama: LanguageModel) -> None:
    with pytest.raises(ShapeError, match="4 layers of width 16, and the model has 3"):
        tuned_lens(llama, [5, 6], TunedLens.untrained(gpt2))
    for option in ("epochs", "batch_size"):
        for wrong in (0, -1, 1.5, None, "2"):
            with pytest.raises(OptionError, match=f"`{option}` is a whole number from 1 on, not"):
                train_tuned_lens(gpt2, PROMPTS, **{option: wrong})  # pyright: ignore
    with pytest.raises(ShapeError, match="do not go with biases"):
        TunedLens(torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(0, 2))
