"""Edges are attributed by the gradient of what their receiver reads, times the sender's change."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from insitu import LanguageModel
from insitu.graph.errors import OptionError, PromptError
from insitu.methods import edge_attribution, kl_divergence, logit_difference
from insitu.methods.survey import wiring_of
from tests.conftest import tiny_gpt2, tiny_llama
from tests.fidelity.zoo import module_of
from tests.methods.edges_by_hand import CLEAN, CORRUPTED, circuit, compute, linear_gpt2, slopes
from tests.thinning import sampled

MODELS: dict[str, Callable[[], nn.Module]] = {"gpt2": tiny_gpt2, "llama": tiny_llama}


def difference(logits: Tensor) -> Tensor:
    return logits[-1, 3] - logits[-1, 50]


def loud(make: Callable[[], nn.Module]) -> nn.Module:
    """A model whose weights are large, so that nothing in it is nearly linear."""
    module = make()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return module


def by_hand(
    module: nn.Module, metric: Callable[[Tensor], Tensor], steps: int
) -> dict[tuple[str, str], float]:
    with torch.no_grad():
        clean, corrupted = compute(module, CLEAN), compute(module, CORRUPTED)
    first, last = corrupted.added["input"], clean.added["input"]
    starts = [first + (last - first) * k / steps for k in range(1, steps + 1)] or [last]
    runs = [slopes(module, metric, start) for start in starts]
    return {
        (sender, receiver): float(
            sum(
                ((corrupted.added[sender] - clean.added[sender]) * run[receiver]).sum()
                for run in runs
            )
        )
        / len(runs)
        for receiver, senders in clean.upstream.items()
        for sender in senders
    }


def scores_of(result) -> dict[tuple[str, str], float]:
    return {(c.labels["sender"], c.labels["receiver"]): c.value for c in result.cells()}


def assert_same(found: dict, expected: dict, scale: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    values = torch.tensor([[found[edge], expected[edge]] for edge in expected])
    assert values[:, 1].abs().max() > 1e-3
    torch.testing.assert_close(
        values[:, 0], values[:, 1], rtol=1e-3, atol=scale * float(values.abs().max())
    )


@pytest.mark.parametrize("steps", sampled([0, 3], [0]))
@pytest.mark.parametrize("name", sampled(MODELS, ["llama"]))
def test_scores_are_those_of_a_computation_by_hand(name: str, steps: int) -> None:
    module = loud(MODELS[name])
    metric = logit_difference(3, 50)
    result = edge_attribution(LanguageModel(module), CLEAN, CORRUPTED, metric, steps=steps)
    assert_same(scores_of(result), by_hand(module, difference, steps))
    with torch.no_grad():
        ends = [difference(compute(module, ids).logits) for ids in (CLEAN, CORRUPTED)]
    torch.testing.assert_close(result.details["clean"], ends[0])
    torch.testing.assert_close(result.details["corrupted"], ends[1])


@pytest.mark.parametrize("steps", sampled([0, 1, 4], [1]))
def test_in_a_linear_model_a_score_is_the_effect_of_the_edge(steps: int) -> None:
    module = linear_gpt2()
    result = edge_attribution(LanguageModel(module), CLEAN, CORRUPTED, difference, steps=steps)
    found = scores_of(result)
    clean = difference(circuit(module, lambda sender, receiver: True))
    effects = {
        edge: float(difference(circuit(module, lambda *other, e=edge: other != e)) - clean)
        for edge in found
    }
    assert sum(abs(effect) > 1e-3 for effect in effects.values()) > 10
    assert_same(found, effects)


@pytest.mark.thorough
def test_with_many_steps_the_edges_of_the_input_add_up_to_the_change_of_the_metric() -> None:
    module = loud(tiny_gpt2)
    with torch.no_grad():
        change = compute(module, CORRUPTED).logits[-1] - compute(module, CLEAN).logits[-1]
    token = int(change.abs().argmax())
    result = edge_attribution(
        LanguageModel(module), CLEAN, CORRUPTED, lambda logits: logits[-1, token], steps=40
    )
    assert abs(change[token]) > 0.1
    assert result.values[0].nansum() == pytest.approx(float(change[token]), rel=0.05)


@pytest.mark.thorough
def test_a_divergence_has_no_gradient_in_the_clean_run_and_has_one_with_steps() -> None:
    module = loud(tiny_llama)
    model = LanguageModel(module)
    with torch.no_grad():
        clean = compute(module, CLEAN).logits[-1].log_softmax(-1)
    flat = edge_attribution(model, CLEAN, CORRUPTED, kl_divergence())
    assert flat.values.nan_to_num().abs().max() < 1e-4

    def divergence(logits: Tensor) -> Tensor:
        return (clean.exp() * (clean - logits[-1].log_softmax(-1))).sum()

    result = edge_attribution(model, CLEAN, CORRUPTED, kl_divergence(), steps=2)
    assert_same(scores_of(result), by_hand(module, divergence, 2))


@pytest.mark.thorough
def test_prompts_are_apart() -> None:
    model = LanguageModel(loud(tiny_gpt2))
    both = edge_attribution(
        model,
        [CLEAN.tolist(), [1, 2, 3]],
        [CORRUPTED.tolist(), [1, 9, 3]],
        logit_difference([3, 7], [50, 8]),
    )
    assert [axis.name for axis in both.axes] == ["prompt", "sender", "receiver"]
    assert_same(scores_of(both.select(prompt=0)), by_hand(model.module, difference, 0))
    assert both.details["clean"].shape == (2,)


# On other architectures: what a part reads is changed by plain hooks on the norm before it.

HOOKED = {  # the norms of attention and of the MLP, and what each adds
    "gemma2": ("input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm",
               "post_feedforward_layernorm", "model.layers", "model.norm"),
    "gpt-neox": ("input_layernorm", "post_attention_layernorm", "attention.dense", "mlp",
                 "gpt_neox.layers", "gpt_neox.final_layer_norm"),
}  # fmt: skip


@pytest.mark.parametrize("name", sampled(HOOKED, ["gpt-neox"]))
def test_post_norms_and_parallel_blocks_against_plain_hooks(name: str) -> None:
    module = module_of(name)
    norm_1, norm_2, attention, mlp, stack, final = HOOKED[name]
    blocks = list(module.get_submodule(stack))
    reading = {f"a{n}": block.get_submodule(norm_1) for n, block in enumerate(blocks)}
    reading |= {f"m{n}": block.get_submodule(norm_2) for n, block in enumerate(blocks)}
    reading["logits"] = module.get_submodule(final)
    adding = {f"a{n}": block.get_submodule(attention) for n, block in enumerate(blocks)}
    adding |= {f"m{n}": block.get_submodule(mlp) for n, block in enumerate(blocks)}

    def added(ids: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        handles = [
            part.register_forward_hook(lambda _, args, out, n=n: found.update({n: out[0]}))
            for n, part in adding.items()
        ]
        handles.append(
            blocks[0].register_forward_pre_hook(lambda _, args: found.update(input=args[0][0]))
        )
        with torch.no_grad():
            module(ids[None])
        for handle in handles:
            handle.remove()
        return found

    clean, corrupted = added(CLEAN), added(CORRUPTED)
    leaves = {n: torch.zeros_like(clean["input"], requires_grad=True) for n in reading}
    handles = [
        part.register_forward_pre_hook(lambda _, args, n=n: (args[0] + leaves[n],))
        for n, part in reading.items()
    ]
    loss = difference(module(CLEAN[None]).logits[0])
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    for handle in handles:
        handle.remove()

    result = edge_attribution(LanguageModel(module), CLEAN, CORRUPTED, difference)
    found: dict[tuple[str, str], float] = {}
    for (sender, receiver), score in scores_of(result).items():  # of all heads together
        edge = (sender.partition(".")[0], receiver.partition(".")[0])
        found[edge] = found.get(edge, 0.0) + score
    parallel = name == "gpt-neox"
    order = ["input", *(f"{letter}{n}" for n in range(len(blocks)) for letter in "am")]
    expected = {
        (sender, receiver): float(((corrupted[sender] - clean[sender]) * gradients[receiver]).sum())
        for receiver in reading
        for sender in order[: order.index(receiver) if receiver in order else None]
        if not (parallel and sender[0] == "a" and receiver == f"m{sender[1:]}")
    }
    assert_same(found, expected)
    assert ("a0" in result.axis("sender").labels) == (name == "gemma2")


class Gated(nn.Module):
    """Attention whose output is weighted with something else that it reads."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.gate = attention, nn.Linear(16, 16)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        out, *rest = self.attention(hidden_states=hidden_states, **kwargs)
        return out * self.gate(hidden_states).sigmoid(), *rest


@pytest.mark.thorough
def test_attention_with_a_gate_is_read_as_a_whole() -> None:
    module = tiny_llama()
    module.model.layers[1].self_attn = Gated(module.model.layers[1].self_attn).eval()
    wiring = wiring_of(LanguageModel(module), CLEAN)
    assert [name for name in wiring.receivers if name.startswith("a1")] == ["a1"]
    assert [name for name in wiring.senders if name.startswith("a1")] == ["a1"]
    assert "a0.q3" in wiring.receivers
    assert "a2.h3" in wiring.senders


@pytest.mark.thorough
def test_what_cannot_be_attributed_says_why() -> None:
    model = LanguageModel(tiny_gpt2())
    with pytest.raises(PromptError, match="5 tokens, and the corrupted one 3"):
        edge_attribution(model, CLEAN, CORRUPTED[:3], difference)
    with pytest.raises(OptionError, match="`steps`"):
        edge_attribution(model, CLEAN, CORRUPTED, difference, steps=-1)
    bert = LanguageModel(module_of("bert"))
    with pytest.raises(OptionError, match="Block 0 has no residual stream"):
        edge_attribution(bert, CLEAN, CORRUPTED, difference)
    t5 = LanguageModel(module_of("t5"))
    with pytest.raises(OptionError, match="states of an encoder"):
        edge_attribution(t5, CLEAN, CORRUPTED, difference)
    edge_attribution(model, CLEAN, CORRUPTED, difference)
