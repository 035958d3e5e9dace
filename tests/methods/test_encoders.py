"""Encoders work with the methods as they come: `block_out`, and metrics of any value of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from insitu import LanguageModel, OptionError, ShapeError
from insitu.methods import (
    ablate,
    activation_patching,
    attribution_patching,
    causal_tracing,
    discover_circuit,
    edge_attribution,
    gradient_times_input,
    integrated_gradients,
    logit_lens,
    probe,
    run_circuit,
    steering_vector,
)
from tests.fidelity.zoo import module_of
from tests.thinning import sampled

CLEAN, CORRUPTED = [5, 6, 7, 8], [5, 16, 7, 8]
SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
DIRECTION = torch.randn(32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("what", "part"),
    [pytest.param("attention", "attention.output", marks=pytest.mark.thorough), ("mlps", "output")],
)
def test_what_an_encoders_blocks_add_is_ablated(what: Any, part: str) -> None:
    """Without it, the norm is given nothing but the value before it."""
    module, blocks = made("encoder")

    def loss(run: Any) -> Any:
        return run.output.last_hidden_state[0, -1] @ DIRECTION

    found = ablate(LanguageModel(module), CLEAN, loss, part=what)
    for layer, block in enumerate(blocks):
        dense = block.get_submodule(part).dense
        handle = dense.register_forward_hook(lambda part, args, out: torch.zeros_like(out))
        with torch.no_grad():
            expected = module(torch.tensor([CLEAN])).last_hidden_state[0, -1] @ DIRECTION
        handle.remove()
        assert torch.allclose(found.values.flatten()[layer], expected, atol=1e-5)


def made(kind: str) -> tuple[Any, Any]:
    """A module, and its blocks."""
    torch.manual_seed(0)
    if kind == "classifier":
        config = BertConfig(**SMALL, initializer_range=0.3)
        module: Any = BertForSequenceClassification(config)
        return module.eval(), module.bert.encoder.layer
    if kind == "encoder":
        module = BertModel(BertConfig(**SMALL, initializer_range=0.3))
        return module.eval(), module.encoder.layer
    if kind == "distilled":
        config = DistilBertConfig(
            vocab_size=60, dim=32, n_layers=3, n_heads=4, hidden_dim=48, initializer_range=0.3
        )
        module = DistilBertModel(config)
        return module.eval(), module.transformer.layer
    module = RobertaForMaskedLM(RobertaConfig(**SMALL, initializer_range=0.3))
    return module.eval(), module.roberta.encoder.layer


METRICS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "a classifier's logit": ("classifier", lambda run: run.output.logits[0, 1]),
    "its logits by name": ("classifier", lambda run: run.logits[0, 1]),
    "a direction in an embedding": (
        "encoder",
        lambda run: run.output.last_hidden_state[:, 0] @ DIRECTION,
    ),
    "a cosine of an embedding": (
        "distilled",
        lambda run: torch.cosine_similarity(run.output.last_hidden_state[0, 0], DIRECTION, dim=0),
    ),
    "a logit of a masked token": ("masked", lambda run: run.logits[0, -1, 5]),
}


def returned(module: Any, ids: list[int]) -> Any:
    return module(input_ids=torch.tensor([ids]))


class Plain:
    """What a metric is given by plain PyTorch: what the model returned."""

    def __init__(self, output: Any) -> None:
        self.output = output
        self.logits = getattr(output, "logits", None)


def outputs_of_blocks(module: Any, blocks: Any, ids: list[int]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    first = lambda out: out if isinstance(out, torch.Tensor) else out[0]  # noqa: E731
    hooks = [b.register_forward_hook(lambda m, a, out: found.append(first(out))) for b in blocks]
    returned(module, ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(
    "name", sampled(METRICS, ["its logits by name", "a direction in an embedding"])
)
def test_patching_is_that_of_plain_hooks_with_nothing_chosen(name: str) -> None:
    kind, metric = METRICS[name]
    module, blocks = made(kind)
    with torch.no_grad():
        donors = outputs_of_blocks(module, blocks, CLEAN)
        expected = torch.zeros(3, 4)
        for layer, block in enumerate(blocks):
            for position in range(4):

                def put(_: Any, __: Any, out: Any, layer: int = layer, at: int = position) -> Any:
                    hidden = (out if isinstance(out, torch.Tensor) else out[0]).clone()
                    hidden[:, at] = donors[layer][:, at]
                    return hidden if isinstance(out, torch.Tensor) else (hidden, *out[1:])

                hook = block.register_forward_hook(put)
                expected[layer, position] = metric(Plain(returned(module, CORRUPTED))).squeeze()
                hook.remove()
    found = activation_patching(LanguageModel(module), CLEAN, CORRUPTED, metric, normalised=False)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-5)
    assert "block_out" in found.title


@pytest.mark.parametrize(
    "name", sampled(METRICS, ["a classifier's logit", "a cosine of an embedding"])
)
def test_gradients_are_those_of_autograd(name: str) -> None:
    kind, metric = METRICS[name]
    module, blocks = made(kind)
    with torch.no_grad():
        clean = outputs_of_blocks(module, blocks, CLEAN)
    kept = outputs_of_blocks(module, blocks, CORRUPTED)
    kept = []
    hooks = []

    def keep(_: Any, __: Any, out: Any) -> None:
        hidden = out if isinstance(out, torch.Tensor) else out[0]
        hidden.retain_grad()
        kept.append(hidden)

    hooks = [block.register_forward_hook(keep) for block in blocks]
    metric(Plain(returned(module, CORRUPTED))).squeeze().backward()
    for hook in hooks:
        hook.remove()
    expected = torch.stack(
        [((a - b.detach()) * b.grad).sum(-1)[0] for a, b in zip(clean, kept, strict=True)]
    )
    module.zero_grad()
    found = attribution_patching(LanguageModel(module), CLEAN, CORRUPTED, metric, normalised=False)
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-5)


def test_each_point_of_a_path_is_measured_by_itself() -> None:
    """A metric that reads the model's own sites would else see the first point only."""
    module, blocks = made("encoder")
    model = LanguageModel(module)

    def metric(_: Any) -> Any:
        return model.blocks[1].block_out[0, 0] @ DIRECTION

    found = integrated_gradients(model, CLEAN, metric, steps=24)
    assert found.details["difference"].abs() < 1e-3 * found.values.abs().max()

    def value(embedded: torch.Tensor | None = None) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        first = lambda out: out if isinstance(out, torch.Tensor) else out[0]  # noqa: E731
        hooks = [blocks[1].register_forward_hook(lambda m, a, out: seen.append(first(out)))]
        if embedded is not None:
            hooks.append(
                module.embeddings.word_embeddings.register_forward_hook(lambda m, a, out: embedded)
            )
        returned(module, CLEAN)
        for hook in hooks:
            hook.remove()
        return seen[0][0, 0] @ DIRECTION

    embedded = module.embeddings.word_embeddings(torch.tensor([CLEAN])).detach().requires_grad_()
    number = value(embedded)
    number.backward()
    by_input = gradient_times_input(model, CLEAN, metric)
    assert embedded.grad is not None
    expected = (embedded.grad * embedded).sum(-1)[0].detach()
    torch.testing.assert_close(by_input.values, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.details["input"], number.detach(), rtol=1e-4, atol=1e-5)


def test_heads_are_ablated_by_what_a_classifier_says() -> None:
    module, blocks = made("classifier")
    found = ablate(LanguageModel(module), CLEAN, METRICS["a classifier's logit"][1], layers=1)
    expected = torch.zeros(4)
    with torch.no_grad():
        for head in range(4):

            def off(_: Any, args: Any, head: int = head) -> Any:
                z = args[0].clone()
                z[..., head * 8 : head * 8 + 8] = 0
                return z, *args[1:]

            hook = blocks[1].attention.output.dense.register_forward_pre_hook(off)
            expected[head] = returned(module, CLEAN).logits[0, 1]
            hook.remove()
    torch.testing.assert_close(found.values[0], expected, rtol=1e-4, atol=1e-5)


def test_probes_vectors_and_lenses_take_what_leaves_a_block() -> None:
    module, blocks = made("masked")
    model = LanguageModel(module)
    with torch.no_grad():
        high, low = (outputs_of_blocks(module, blocks, ids) for ids in (CLEAN, CORRUPTED))
    vector = steering_vector(model, [CLEAN], [CORRUPTED])
    assert vector.site == "block_out"
    for layer in range(3):
        expected = high[layer][0, -1] - low[layer][0, -1]
        torch.testing.assert_close(vector[layer], expected, rtol=1e-4, atol=1e-5)
    prompts = [[5, number, 7] for number in range(8, 24)]
    learned = probe(model, prompts, [number % 2 for number in range(16)], layers=[0, 2])
    assert learned.site == "block_out"
    lens = logit_lens(model, CLEAN, top=1)
    assert lens.axis("layer").labels == ("0", "1", "2")
    own = returned(module, CLEAN).logits[0].argmax(-1)
    assert lens.details["ids"][-1, :, 0].tolist() == own.tolist()


def test_a_decoder_keeps_its_residual_stream(gpt2: LanguageModel) -> None:
    assert steering_vector(gpt2, [CLEAN], [CORRUPTED]).site == "residual_out"
    found = activation_patching(gpt2, CLEAN, CORRUPTED, lambda run: run.logits[0, -1, 3])
    assert "residual_out" in found.title
    short = activation_patching(gpt2, CLEAN, CORRUPTED, lambda logits: logits[-1, 3])
    torch.testing.assert_close(found.values, short.values)


def test_causal_tracing_takes_a_metric_of_each_noise() -> None:
    module, _ = made("masked")
    model = LanguageModel(module)
    by_answer = causal_tracing(model, CLEAN, [1], 9, samples=3)
    by_metric = causal_tracing(
        model, CLEAN, [1], metric=lambda run: run.logits[0, -1].softmax(-1)[9], samples=3
    )
    torch.testing.assert_close(by_metric.values, by_answer.values, rtol=1e-4, atol=1e-6)
    assert by_metric.axis("site").labels == ("block_out",)
    with pytest.raises(OptionError, match="`answer`.*or `metric`"):
        causal_tracing(model, CLEAN, [1])


@pytest.mark.thorough
def test_circuits_are_measured_by_logits(gpt2: LanguageModel) -> None:
    prompts = (CLEAN, CORRUPTED)
    edges = edge_attribution(gpt2, *prompts, lambda run: run.logits[0, -1, 3])
    short = edge_attribution(gpt2, *prompts, lambda logits: logits[-1, 3])
    torch.testing.assert_close(edges.values, short.values, equal_nan=True)
    found = discover_circuit(gpt2, *prompts, lambda run: run.logits[0, -1, 3], edges=5)
    assert run_circuit(gpt2, *prompts, lambda run: run.logits[0, -1, 3], found).sizes
    with pytest.raises(OptionError, match=r"`run\.output` cannot be read here"):
        run_circuit(gpt2, *prompts, lambda run: run.output.logits[0, -1, 3], found)


def test_what_a_metric_cannot_be_is_said() -> None:
    model = LanguageModel(made("encoder")[0])
    with pytest.raises(OptionError, match=r"BertModel gives no logits.*lambda run"):
        activation_patching(model, CLEAN, CORRUPTED, lambda logits: logits[-1, 3])
    with pytest.raises(ShapeError, match=r"shape \(1, 32\)"):
        activation_patching(model, CLEAN, CORRUPTED, lambda run: run.output.last_hidden_state[:, 0])


def test_a_classifier_has_the_vocabulary_of_its_embedding() -> None:
    model = LanguageModel(made("classifier")[0])
    assert model.vocab_size == 60
    with model.trace(CLEAN):
        logits = model.logits.save()
    torch.testing.assert_close(logits.value, returned(model.module, CLEAN).logits)


@pytest.mark.parametrize("name", ["bert", "t5", "llama", "gpt2"])
def test_block_out_is_what_a_plain_hook_sees(name: str) -> None:
    module: Any = module_of(name)
    model = LanguageModel(module)
    block = model.blocks[-1]
    seen: list[torch.Tensor] = []
    hook = block.module.register_forward_hook(
        lambda m, a, out: seen.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    with model.trace([5, 6, 7]):
        value = block.block_out.save()
        there = "residual_out" in list(block.role)
        if there:
            stream = block.residual_out.save()
    hook.remove()
    assert torch.equal(value.value, seen[-1])
    assert not there or torch.equal(stream.value, value.value)


def test_block_out_is_written_to() -> None:
    module, blocks = made("encoder")
    model = LanguageModel(module)
    with model.trace(CLEAN):
        model.blocks[1].block_out[:, 2] = 0
        after = model.output.last_hidden_state.save()

    def zero(_: Any, __: Any, out: Any) -> Any:
        hidden = out if isinstance(out, torch.Tensor) else out[0]
        hidden[:, 2] = 0
        return hidden if isinstance(out, torch.Tensor) else (hidden, *out[1:])

    hook = blocks[1].register_forward_hook(zero)
    with torch.no_grad():
        expected = returned(module, CLEAN).last_hidden_state
    hook.remove()
    torch.testing.assert_close(after.value, expected)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.filterwarnings("error")
def test_a_cache_of_all_keeps_it_once_and_says_nothing(name: str) -> None:
    model = LanguageModel(module_of(name))
    cache = model.run_with_cache([5, 6, 7])
    kept = [key for key in cache if key.endswith(("block_out", "residual_out"))]
    assert len(kept) == model.n_layers
    assert cache["block_out", 1].shape == (1, 3, model.d_model)
    assert ("pattern", 0) in cache
    if name == "gpt2":
        assert torch.equal(cache["block_out", 1], cache["residual_out", 1])
    asked = model.run_with_cache([5, 6, 7], "block_out")
    torch.testing.assert_close(asked.stack("block_out")[1], cache["block_out", 1])
