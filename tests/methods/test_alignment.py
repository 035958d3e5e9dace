"""Distributed alignment search: on a model whose variable is known, and against a plain loop."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from transformers import LlamaConfig, LlamaForCausalLM

from insitu import LanguageModel, LoadError, OptionError, PromptError
from insitu.methods import Alignment, distributed_alignment_search
from tests.conftest import tiny_gpt2, tiny_llama
from tests.fidelity.zoo import spread_out
from tests.thinning import sampled

WIDTH, KINDS = 16, 4


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def language_model(request: pytest.FixtureRequest) -> LanguageModel:
    model = LanguageModel({"gpt2": tiny_gpt2, "llama": tiny_llama}[request.param]())
    spread_out(model.module)  # so that a change shows
    return model


def known() -> tuple[LanguageModel, torch.Tensor]:
    """A model that repeats its last token, which is made of a sign and a kind, and the sign's axis.

    Its blocks add nothing. Tokens are sums of a vector of the sign and one of the kind, in axes
    that no basis vector lies along; each token's logit is its product with the last.
    """
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=2 * KINDS,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    module = LlamaForCausalLM(config).eval()
    axes = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
    tokens = torch.stack(
        [(1 - 2 * (n // KINDS)) * axes[0] + 1.5 * axes[1 + n % KINDS] for n in range(2 * KINDS)]
    )
    with torch.no_grad():
        for block in module.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        module.model.embed_tokens.weight.copy_(tokens)
        module.lm_head.weight.copy_(2 * tokens)
    return LanguageModel(module), axes[0]


def pairs(count: int = 64) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Bases, sources of other lengths, and the base's token with the source's sign."""
    draw = torch.Generator().manual_seed(2)

    def prompts() -> list[list[int]]:
        lengths = torch.randint(2, 6, (count,), generator=draw).tolist()
        return [torch.randint(0, 2 * KINDS, (n,), generator=draw).tolist() for n in lengths]

    bases, sources = prompts(), prompts()
    answers = [
        source[-1] // KINDS * KINDS + base[-1] % KINDS
        for base, source in zip(bases, sources, strict=True)
    ]
    return bases, sources, answers


@pytest.mark.thorough
def test_it_finds_the_axis_of_a_variable_that_has_one() -> None:
    model, axis = known()
    found = distributed_alignment_search(model, *pairs(), layer=0, epochs=30, lr=0.05)
    assert found.accuracy == found.train_accuracy == 1
    assert found.rotation is not None and found.rotation.shape == (1, WIDTH)
    assert abs((found.rotation[0] @ axis).item()) > 0.9  # two vectors at random: 0.25
    assert found.losses.values[-1] < found.losses.values[0] / 2
    assert all(parameter.grad is None for parameter in model.module.parameters())
    other = pairs(100)
    assert found.score(model, *other) == 1


@pytest.mark.thorough
def test_the_whole_vector_is_too_much_and_its_accuracy_is_known() -> None:
    model, _ = known()
    bases, sources, answers = pairs()
    whole = distributed_alignment_search(
        model, bases, sources, answers, layer=1, dimensions=None, held_out=0.5
    )
    right = [source[-1] == answer for source, answer in zip(sources, answers, strict=True)]
    assert whole.rotation is None and whole.losses.values.shape == (0,)
    both = (whole.accuracy + whole.train_accuracy) / 2
    assert both == pytest.approx(sum(right) / len(right)) and both < 0.6
    assert whole.score(model, bases, sources, answers) == pytest.approx(both)
    assert whole.score(model, bases, sources, [source[-1] for source in sources]) == 1


def begun(width: int, dimensions: int) -> nn.Linear:
    """The rotation that training begins with."""
    torch.manual_seed(0)
    rotation = nn.Linear(width, dimensions, bias=False)
    nn.init.orthogonal_(rotation.weight)
    return parametrizations.orthogonal(rotation)


def plain_loop(
    module: nn.Module,
    path: str,
    bases: list[list[int]],
    vectors: torch.Tensor,
    answers: list[int],
    batches: list[list[int]],
    position: int,
    dimensions: int,
    lr: float,
) -> tuple[list[float], torch.Tensor]:
    """The oracle: the same training with a forward hook; the batch is padded by hand."""
    rotation = begun(vectors.shape[-1], dimensions)
    optimiser = torch.optim.Adam(rotation.parameters(), lr=lr)
    losses = []
    for batch in batches:
        lengths = [len(bases[n]) for n in batch]
        ids = torch.zeros(len(batch), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, n in enumerate(batch):
            ids[row, : lengths[row]] = torch.tensor(bases[n])
            mask[row, : lengths[row]] = 1

        def exchange(part: nn.Module, args: object, output: object) -> object:
            value = (output[0] if isinstance(output, tuple) else output).clone()
            weight, rows = rotation.weight, torch.arange(len(batch))  # noqa: B023
            ends = torch.tensor(lengths)  # noqa: B023
            at = torch.full_like(ends, position) if position >= 0 else ends + position
            base = value[rows, at]
            value[rows, at] = base + (vectors[batch] - base) @ weight.T @ weight  # noqa: B023
            return (value, *output[1:]) if isinstance(output, tuple) else value

        handle = module.get_submodule(path).register_forward_hook(exchange)
        logits = module(input_ids=ids, attention_mask=mask, use_cache=False).logits
        handle.remove()
        last = torch.stack([logits[row, length - 1] for row, length in enumerate(lengths)])
        loss = F.cross_entropy(last, torch.tensor([answers[n] for n in batch]))
        optimiser.zero_grad()
        loss.backward()
        module.zero_grad(set_to_none=True)
        optimiser.step()
        losses.append(loss.item())
    return losses, rotation.weight.detach()


@pytest.mark.parametrize("language_model", sampled(["gpt2", "llama"], ["gpt2"]), indirect=True)
@pytest.mark.parametrize(
    ("position", "mode"), [(-1, torch.inference_mode), (1, nullcontext), (-1, torch.no_grad)]
)
def test_it_is_the_plain_loop_step_for_step(
    language_model: LanguageModel, position: int, mode: Any
) -> None:
    """Of one direction: within a span of several the gradient is rounding, which Adam follows."""
    draw = torch.Generator().manual_seed(4)
    lengths = torch.randint(3, 7, (24,), generator=draw).tolist()
    bases = [torch.randint(1, 100, (n,), generator=draw).tolist() for n in lengths]
    sources = [torch.randint(1, 100, (n,), generator=draw).tolist() for n in lengths[::-1]]
    answers = torch.randint(1, 100, (24,), generator=draw).tolist()
    with mode():
        found = distributed_alignment_search(
            language_model,
            bases,
            sources,
            answers,
            layer=1,
            dimensions=1,
            position=position,
            source_position=-2,
            epochs=3,
            lr=0.02,
            batch_size=5,
        )

    module, path = language_model.module, language_model.blocks[1].path
    kept: list[torch.Tensor] = []
    handle = module.get_submodule(path).register_forward_hook(
        lambda m, a, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        for ids in sources:
            module(torch.tensor([ids]), use_cache=False)
    handle.remove()
    vectors = torch.stack([value[0, -2] for value in kept])
    draw = torch.Generator().manual_seed(0)
    train = sorted(torch.randperm(24, generator=draw).tolist()[6:])
    batches = [
        [train[n] for n in part.tolist()]
        for _ in range(3)
        for part in torch.randperm(18, generator=draw).split(5)
    ]
    first = begun(16, 1).weight.detach()
    losses, weight = plain_loop(module, path, bases, vectors, answers, batches, position, 1, 0.02)
    assert found.rotation is not None
    torch.testing.assert_close(found.losses.values, torch.tensor(losses), atol=1e-5, rtol=1e-5)
    span, expected = found.rotation.T @ found.rotation, weight.T @ weight
    torch.testing.assert_close(span, expected, atol=1e-4, rtol=1e-4)
    assert (span - first.T @ first).abs().max() > 0.05  # it has gone somewhere
    torch.testing.assert_close(found.rotation @ found.rotation.T, torch.eye(1))


def test_applied_in_a_trace(language_model: LanguageModel) -> None:
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(16, 2))[0].T
    empty = distributed_alignment_search(
        language_model,
        [[1, 2], [3, 4]],
        [[5, 6, 7], [7, 8]],
        [1, 2],
        layer=1,
        dimensions=None,
        held_out=0.5,
    )
    alignment = Alignment("residual_out", 1, -1, 0, rotation, 0.0, 0.0, empty.losses)
    with language_model.trace() as tracer:
        with tracer.invoke([5, 6, 7]):
            source = alignment.read(language_model)
            of_source = source.save()
        with tracer.invoke([1, 2]):
            before = language_model.blocks[1].residual_out.save()
            alignment.apply(language_model, source)
            after = language_model.blocks[1].residual_out.save()
    expected = before.value.clone()
    mixed = torch.eye(16) - rotation.T @ rotation
    expected[0, -1] = mixed @ before.value[0, -1] + rotation.T @ rotation @ of_source.value[0]
    torch.testing.assert_close(after.value, expected)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, _ = known()
    for dimensions in (2, None):
        found = distributed_alignment_search(
            model, *pairs(12), layer=1, dimensions=dimensions, epochs=1
        )
        found.save(tmp_path / "alignment.safetensors")
        loaded = Alignment.load(tmp_path / "alignment.safetensors")
        for name in ("site", "layer", "position", "source_position", "accuracy"):
            assert getattr(loaded, name) == getattr(found, name)
        assert loaded.train_accuracy == found.train_accuracy
        assert torch.equal(loaded.losses.values, found.losses.values)
        if dimensions is None:
            assert loaded.rotation is None
        else:
            assert loaded.rotation is not None and found.rotation is not None
            assert torch.equal(loaded.rotation, found.rotation)
    with pytest.raises(LoadError):
        Alignment.load(tmp_path / "nothing")


def test_mistakes(gpt2: LanguageModel) -> None:
    bases, sources, answers = [[1, 2, 3], [4, 5]], [[6, 7, 8], [9, 10]], [11, 12]
    search = distributed_alignment_search
    with pytest.raises(OptionError, match="2 bases, 1 sources and 2 answers") as caught:
        search(gpt2, bases, sources[:1], answers, layer=1)
    assert "test_alignment.py" in str(caught.value)
    with pytest.raises(OptionError, match="1 to 16 dimensions, not 17"):
        search(gpt2, bases, sources, answers, layer=1, dimensions=17, held_out=0.5)
    with pytest.raises(OptionError, match="1 to 16 dimensions, not 1.5"):
        search(gpt2, bases, sources, answers, layer=1, dimensions=1.5, held_out=0.5)  # pyright: ignore
    for option in ("epochs", "batch_size"):
        for wrong in (0, 1.5):
            with pytest.raises(OptionError, match=f"`{option}` is a whole number from 1 on, not"):
                search(gpt2, bases, sources, answers, layer=1, held_out=0.5, **{option: wrong})
    with pytest.raises(OptionError, match="no layer 4"):
        search(gpt2, bases, sources, answers, layer=4)
    with pytest.raises(PromptError, match="no position 2 in the shortest prompt"):
        search(gpt2, bases, sources, answers, layer=1, position=2)
    with pytest.raises(PromptError, match="no position -3 in the shortest prompt"):
        search(gpt2, bases, sources, answers, layer=1, source_position=-3, held_out=0.5)
    with pytest.raises(OptionError, match="cannot be held out"):
        search(gpt2, bases, sources, answers, layer=1, held_out=0.1)
    with pytest.raises(PromptError, match="no token 100"):
        search(gpt2, bases, sources, [11, 100], layer=1)
