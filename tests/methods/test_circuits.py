"""Circuits run as a computation by hand does in which each receiver reads a stream of its own."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from insitu import LanguageModel
from insitu.graph.errors import LoadError, OptionError, PromptError
from insitu.methods import (
    Circuit,
    Edge,
    Result,
    completeness_curve,
    discover_circuit,
    edge_attribution,
    faithfulness_curve,
    kl_divergence,
    logit_difference,
    run_circuit,
)
from tests.conftest import tiny_gpt2, tiny_llama
from tests.fidelity.zoo import module_of
from tests.methods.edges_by_hand import CLEAN, CORRUPTED, Found, circuit, compute, linear_gpt2
from tests.thinning import sampled

MODELS: dict[str, Callable[[], nn.Module]] = {"gpt2": tiny_gpt2, "llama": tiny_llama}
DIFFERENCE = logit_difference(3, 50)


def difference(logits: Tensor) -> Tensor:
    return logits[-1, 3] - logits[-1, 50]


def loud(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return module


def plain(module: nn.Module, ids: Tensor = CLEAN) -> Found:
    with torch.no_grad():
        return compute(module, ids)


def edges_of(module: nn.Module) -> list[tuple[str, str]]:
    return [(sender, r) for r, senders in plain(module).upstream.items() for sender in senders]


def made_of(edges: list[tuple[str, str]]) -> Circuit:
    return Circuit("made up", "", tuple(Edge(*edge, 1.0) for edge in edges))


@pytest.mark.thorough
@pytest.mark.parametrize("name", sampled(MODELS, ["llama"]))
def test_circuits_and_complements_are_those_of_a_computation_by_hand(name: str) -> None:
    module = loud(MODELS[name]())
    model = LanguageModel(module)
    edges = edges_of(module)
    for share in (0.3, 0.8):
        chosen = random.Random(7).sample(edges, round(share * len(edges)))
        result = run_circuit(model, CLEAN, CORRUPTED, DIFFERENCE, made_of(chosen))
        kept = set(chosen)
        expected = [
            plain(module).logits,
            plain(module, CORRUPTED).logits,
            circuit(module, lambda *edge: edge in kept),  # noqa: B023
            circuit(module, lambda *edge: edge not in kept),  # noqa: B023
        ]
        numbers = torch.stack([difference(logits) for logits in expected])
        assert numbers.std() > 0.01
        torch.testing.assert_close(result.values, numbers, rtol=1e-4, atol=1e-4)
        assert result.axis("run").labels == ("clean", "corrupted", "circuit", "complement")
        clean, corrupted, inside, outside = numbers
        way = clean - corrupted
        torch.testing.assert_close(
            result.details["faithfulness"], (inside - corrupted) / way, rtol=1e-2, atol=1e-2
        )
        torch.testing.assert_close(
            result.details["completeness"], (clean - outside) / way, rtol=1e-2, atol=1e-2
        )


@pytest.mark.thorough
def test_a_circuit_without_one_edge_is_that_of_a_hook_on_a_model_with_post_norms() -> None:
    module = module_of("gemma2")
    model = LanguageModel(module)
    layers = module.model.layers
    adding = {
        "m0": layers[0].post_feedforward_layernorm,
        "a1": layers[1].post_attention_layernorm,
    }
    reading = {"m1": layers[1].pre_feedforward_layernorm, "logits": module.model.norm}
    all_edges = Circuit.of(edge_attribution(model, CLEAN, CORRUPTED, difference)).edges

    def added(ids: Tensor, sender: str) -> Tensor:
        values: list[Tensor] = []
        handle = adding[sender].register_forward_hook(lambda _, args, out: values.append(out))
        with torch.no_grad():
            module(ids[None])
        handle.remove()
        return values[0]

    for sender in adding:
        for receiver, part in reading.items():
            without = [edge for edge in all_edges if edge[:2] != (sender, receiver)]
            assert len(without) == len(all_edges) - 1
            change = added(CORRUPTED, sender) - added(CLEAN, sender)
            handle = part.register_forward_pre_hook(lambda _, args, c=change: (args[0] + c,))
            with torch.no_grad():
                expected = difference(module(CLEAN[None]).logits[0])
            handle.remove()
            result = run_circuit(
                model, CLEAN, CORRUPTED, difference, Circuit("", "", tuple(without))
            )
            assert abs(result.values[0] - expected) > 1e-4
            torch.testing.assert_close(result.values[2], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
def test_curves_are_of_the_largest_scores_and_prompts_are_apart() -> None:
    module = loud(tiny_gpt2())
    model = LanguageModel(module)
    other = torch.tensor([9, 9, 4]), torch.tensor([9, 6, 4])
    edges = edges_of(module)
    scores = torch.randn(len(edges), generator=torch.Generator().manual_seed(3)).tolist()
    whole = Circuit("", "", tuple(Edge(*e, s) for e, s in zip(edges, scores, strict=True)))
    prompts = [CLEAN.tolist(), other[0].tolist()], [CORRUPTED.tolist(), other[1].tolist()]
    curve = faithfulness_curve(model, *prompts, DIFFERENCE, whole, sizes=[0, 40, len(edges)])
    assert curve.sizes == {"prompt": 2, "edges": 3}
    order = sorted(range(len(edges)), key=lambda at: -abs(scores[at]))
    kept = {edges[at] for at in order[:40]}
    expected = difference(circuit(module, lambda *edge: edge in kept))
    torch.testing.assert_close(curve.details["metric"][0, 1], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(curve.values[:, 0], torch.zeros(2))
    torch.testing.assert_close(curve.values[:, 2], torch.ones(2))
    start, end = (difference(plain(module, ids).logits) for ids in (CORRUPTED, CLEAN))
    torch.testing.assert_close(
        curve.values[0, 1], (expected - start) / (end - start), rtol=1e-2, atol=1e-2
    )
    lost = completeness_curve(model, *prompts, DIFFERENCE, whole, sizes=[0, 40, len(edges)])
    without = difference(circuit(module, lambda *edge: edge not in kept))
    torch.testing.assert_close(lost.details["metric"][0, 1], without, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        lost.values[0, 1], (end - without) / (end - start), rtol=1e-2, atol=1e-2
    )
    torch.testing.assert_close(lost.values[:, [0, 2]], torch.tensor([[0.0, 1.0]] * 2))
    with pytest.raises(OptionError, match="the same of both"):
        faithfulness_curve(model, CLEAN, CLEAN, DIFFERENCE, whole)


def copying() -> nn.Module:
    """A model whose circuit is known: two heads copy one after the other, all else is in the way.

    Tokens are in dimensions 0 and 1. Head 0 of layer 0 copies them to 2 and 3, head 1 of layer 1
    these to 4 and 5, which are read as logits. What head 1 of layer 0 and the MLPs add is read by
    nothing.
    """
    module = linear_gpt2()
    base = module.transformer
    with torch.no_grad():
        base.wte.weight[:, 2:] = 0
        base.wpe.weight.zero_()
        for block in base.h:
            block.attn.c_attn.weight.zero_()
            block.attn.c_attn.bias.zero_()
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight[:, :7] = 0
        eye = torch.eye(2)
        base.h[0].attn.c_attn.weight[0:2, 16:18] = eye  # values of head 0
        base.h[0].attn.c_proj.weight[0:2, 2:4] = eye
        base.h[0].attn.c_attn.weight[0:2, 20:22] = eye  # of head 1
        base.h[0].attn.c_proj.weight[4:6, 6:8] = eye
        base.h[1].attn.c_attn.weight[2:4, 20:22] = eye
        base.h[1].attn.c_proj.weight[4:6, 4:6] = eye
        module.lm_head.weight = nn.Parameter(torch.zeros(100, 8))
        module.lm_head.weight[:, 4:6] = torch.randn(100, 2)
    return module


TRUE = {("input", "a0.v0"), ("a0.h0", "a1.v1"), ("a1.h1", "logits")}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"method": "acdc", "threshold": 1e-4}, marks=pytest.mark.thorough),
        {"method": "eap", "threshold": 1e-4},
        pytest.param({"method": "eap-ig", "edges": 3}, marks=pytest.mark.thorough),
    ],
    ids=lambda options: options["method"],
)
def test_a_circuit_that_is_known_is_found(options: dict) -> None:
    module = copying()
    model = LanguageModel(module)
    token = int((plain(module).logits - plain(module, CORRUPTED).logits)[-1].abs().argmax())

    def metric(logits: Tensor) -> Tensor:
        return logits[-1, token]

    found = discover_circuit(model, CLEAN, CORRUPTED, metric, **options)
    assert {edge[:2] for edge in found.edges} == TRUE
    assert found.nodes == ("input", "a0.h0", "a1.h1", "logits")
    effect = metric(plain(module, CORRUPTED).logits) - metric(plain(module).logits)
    for edge in found.edges:  # each is all of the way
        assert abs(edge.score) == pytest.approx(float(abs(effect)), rel=1e-3)
    details = run_circuit(model, CLEAN, CORRUPTED, metric, found).details
    assert details["faithfulness"] == pytest.approx(1, abs=1e-4)
    assert details["completeness"] == pytest.approx(1, abs=1e-4)


@pytest.mark.thorough
def test_acdc_removes_what_one_run_after_another_would() -> None:
    module = linear_gpt2()
    for block in module.transformer.h:
        block.mlp.act = nn.Tanh().eval()
    threshold = 1e-4
    clean = plain(module).logits[-1].log_softmax(-1)
    edges = edges_of(module)
    kept = set(edges)

    def divergence() -> float:
        logits = circuit(module, lambda *edge: edge in kept)[-1].log_softmax(-1)
        return float((clean.exp() * (clean - logits)).sum())

    now = divergence()
    receivers = list(plain(module).upstream)
    for receiver in reversed(receivers):
        for sender in reversed([s for s, r in edges if r == receiver]):
            kept.discard((sender, receiver))
            then = divergence()
            if then - now < threshold:
                now = then
            else:
                kept.add((sender, receiver))
    found = discover_circuit(
        LanguageModel(module),
        CLEAN,
        CORRUPTED,
        kl_divergence(),
        method="acdc",
        threshold=threshold,
    )
    assert 3 < len(kept) < len(edges) / 2
    assert {edge[:2] for edge in found.edges} == kept
    assert all(edge.score >= threshold for edge in found.edges)


@pytest.mark.thorough
def test_edges_that_lead_nowhere_are_left_out() -> None:
    module = copying()
    with torch.no_grad():  # what nothing reads is large
        module.transformer.h[0].attn.c_attn.weight[0:2, 20:22] *= 100
    found = discover_circuit(
        LanguageModel(module), CLEAN, CORRUPTED, DIFFERENCE, method="eap", edges=40
    )
    edges = {edge[:2] for edge in found.edges}
    assert edges >= TRUE and len(edges) < 40
    senders = {sender for sender, _ in edges}
    reading = {re.sub(r"\.[qkv]", ".h", receiver) for _, receiver in edges}
    assert senders <= reading | {"input"}  # each has something to send
    assert reading <= senders | {"logits"}  # and what is heard goes on


def test_a_circuit_is_kept_in_a_file(tmp_path: Path) -> None:
    edges = (Edge("m0", "logits", -2.5), Edge("input", "m0", 1.0), Edge("a0.h1", "m0", 0.25))
    found = Circuit("found", "change", edges)
    found.save(tmp_path / "circuit.safetensors")
    assert Circuit.load(tmp_path / "circuit.safetensors") == found
    assert found.nodes == ("input", "a0.h1", "m0", "logits")
    assert [edge.score for edge in found.top(2).edges] == [-2.5, 1.0]
    assert found.to_dict()["edges"][0] == {"sender": "m0", "receiver": "logits", "score": -2.5}
    Result("", "", torch.zeros(()), ()).save(tmp_path / "result.safetensors")
    with pytest.raises(LoadError, match="holds no circuit"):
        Circuit.load(tmp_path / "result.safetensors")


def test_what_is_no_circuit_of_the_model_says_so() -> None:
    model = LanguageModel(tiny_gpt2())
    run = (model, CLEAN, CORRUPTED, DIFFERENCE)
    with pytest.raises(OptionError, match=r"called 'a9.q0' \(nearest"):
        run_circuit(*run, made_of([("input", "a9.q0")]))
    with pytest.raises(OptionError, match="before that is added"):
        run_circuit(*run, made_of([("m1", "m0")]))
    with pytest.raises(OptionError, match="nearest: 'acdc'"):
        discover_circuit(*run, method="acdcc", threshold=1)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="threshold=0.01"):
        discover_circuit(*run, method="acdc", edges=5)
    with pytest.raises(OptionError, match="takes `edges`"):
        discover_circuit(*run, method="eap")
    for wrong in (0, -5, 2.5):
        with pytest.raises(OptionError, match="`edges` is a whole number from 1 on, not"):
            discover_circuit(*run, method="eap", edges=wrong)  # pyright: ignore
    scores = edge_attribution(*run)
    for use in (run_circuit, faithfulness_curve, completeness_curve):
        with pytest.raises(OptionError, match=r"not a Result: .*`Circuit.of\(result\)"):
            use(*run, scores)  # pyright: ignore
    for sizes in ([1.5], [True]):
        with pytest.raises(OptionError, match="A size is given as a number"):
            faithfulness_curve(*run, Circuit.of(scores), sizes=sizes)  # pyright: ignore
    every = Circuit.of(scores)
    for size in (-1, len(every) + 1):
        with pytest.raises(OptionError, match=rf"at most {len(every)}, and not \[{size}\]"):
            faithfulness_curve(*run, every, sizes=[size])
    with pytest.raises(OptionError, match="'sender' and 'receiver'"):
        Circuit.of(Result("", "", torch.zeros(()), ()))
    with pytest.raises(PromptError, match="equally long"):
        discover_circuit(model, CLEAN, CORRUPTED[:2], DIFFERENCE, edges=5)
