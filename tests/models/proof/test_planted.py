"""Wrong structure that is planted into what is found is refused: each name is proven by value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import IBertConfig, IBertForMaskedLM, XmodConfig, XmodForMaskedLM

from insitu import LanguageModel, PathError
from insitu.models import body as bodies
from insitu.models.parts import Block, Feedforward, Heads, Spot
from insitu.tracing.forms import Split, Swapped
from insitu.tracing.vocabulary import Missing
from tests.fidelity.every.models import small_model
from tests.fidelity.zoo import ZOO, module_of
from tests.thinning import sampled

pytestmark = pytest.mark.no_wire  # what is sent does not depend on it

Plant = Callable[[Block], Block]


def of_heads(change: Callable[[Heads, str], dict[str, Any]]) -> Plant:
    def plant(block: Block) -> Block:
        heads = block.attention
        assert heads is not None
        return replace(block, attention=replace(heads, **change(heads, block.path)))

    return plant


def of_mlp(change: Callable[[Feedforward, str], dict[str, Any]]) -> Plant:
    def plant(block: Block) -> Block:
        mlp = block.mlp
        assert mlp is not None
        return replace(block, mlp=replace(mlp, **change(mlp, block.path)))

    return plant


def of_stream(**names: str) -> Plant:
    """Gives names of the residual stream the spots of others."""

    def plant(block: Block) -> Block:
        spots = {**block.stream, **block.added}
        stream = {name: spots[names.get(name, name)] for name in block.stream}
        added = {name: spots[names.get(name, name)] for name in block.added}
        return replace(block, stream=stream, added=added)

    return plant


def before_the_gate(mlp: Feedforward, path: str) -> dict[str, Any]:
    post = mlp.post
    assert post is not None
    return {"post": Spot(f"{path}.mlp.act_fn", "output", 0, (), post.shape)}


def of_another_layer(heads: Heads, path: str) -> dict[str, Any]:
    """The pattern of the first layer, in all of them."""
    stack = path.rpartition(".")[0]

    def first(spot: Spot | None) -> Spot | None:
        return spot and replace(spot, path=spot.path.replace(path, f"{stack}.0"))

    return {"scores": first(heads.scores), "pattern": first(heads.pattern)}


def unscaled(block: Block) -> Block:
    """What attention returns, for what is made of it before it is added."""
    found = {
        name: replace(spot, path=f"{block.path}.self_attn", item=(0,), call=0)
        for name, spot in block.added.items()
        if name in ("attention_out", "mixer_out")
    }
    return replace(block, added={**block.added, **found})


PLANTED: dict[str, tuple[str, Plant, tuple[str, ...]]] = {
    "half as many heads": (
        "llama", of_heads(lambda heads, _: {"count": 2, "size": 8}), ("attention",),
    ),
    "twice as many heads": (
        "llama", of_heads(lambda heads, _: {"count": 8, "size": 2}), ("attention",),
    ),
    "queries for keys": (
        "gpt2", of_heads(lambda heads, _: {"q": heads.k, "k": heads.q}), ("attention.q",),
    ),
    "keys for values": ("llama", of_heads(lambda heads, _: {"v": heads.k}), ("attention.v",)),
    "queries before rotary embeddings": (
        "llama", of_heads(lambda heads, _: {"q": heads.raw["q"]}), ("attention.q", "attention.k"),
    ),
    "values for heads": (
        "gpt2",
        of_heads(
            lambda heads, path: {"z": Spot(f"{path}.mlp.c_fc", "input", 0, (), heads.z.shape)}
        ),
        ("attention.z", "attention.result"),
    ),
    "scores for the pattern": (
        "gpt2",
        of_heads(lambda heads, _: {"pattern": heads.scores}),
        ("attention.pattern", "attention.scores"),
    ),
    "another layer's pattern": (
        "gpt2", of_heads(of_another_layer), ("attention.pattern", "attention.z"),
    ),
    "another output projection": (
        "llama",
        of_heads(lambda heads, path: {"out": f"{path}.self_attn.q_proj"}),
        ("attention.result", "attention.W_O"),
    ),
    "the matrix of keys for that of queries": (
        "phi",
        of_heads(
            lambda heads, _: {
                "projections": {**heads.projections, "q": heads.projections["k"]},
            }
        ),
        ("attention.W_Q",),
    ),
    "attention for the MLP": (
        "gpt2", of_stream(attention_out="mlp_out", mlp_out="attention_out"),
        ("attention_out", "mlp.post"),
    ),
    "what enters for what is in between": (
        "gpt2", of_stream(residual_mid="residual_in"), ("residual_mid",),
    ),
    "what leaves for what enters": (
        "gpt2", of_stream(residual_in="residual_out"), ("residual_in", "residual_out"),
    ),
    "what is added, once too often": (
        "llama", of_stream(attention_out="mlp_out"), ("residual_out", "mlp_out"),
    ),
    "attention for the MLP, where sums are normalised": (
        "bert", of_stream(attention_out="mlp_out", mlp_out="attention_out"),
        ("attention_out", "mlp_out"),
    ),
    "what goes into attention's last layer for what it adds": (
        "bert",
        lambda block: replace(
            block,
            added={
                **block.added,
                "attention_out": replace(
                    block.added["attention_out"],
                    path=f"{block.path}.attention.output.dense",
                    kind="input",
                ),
            },
        ),
        ("attention_out", "mlp_out"),
    ),
    "a norm that the sum does not go into": (
        "bert",
        lambda block: replace(
            block, summed=[replace(one, norm=block.summed[-1].norm) for one in block.summed]
        ),
        ("attention_out", "mlp_out"),
    ),
    "attention for the MLP, where the stream is scaled": (
        "doge", of_stream(attention_out="mlp_out", mlp_out="attention_out"), ("residual_mid",),
    ),
    "what is added, without its factor": (
        "minimax", unscaled, ("mixer_out", "mlp_out"),
    ),
    "what is added twice, where the stream is scaled": (
        "doge", of_stream(attention_out="mlp_out"), ("residual_in", "mlp_out"),
    ),
    "what enters for the middle, where the stream is scaled": (
        "doge", of_stream(residual_mid="residual_in"), ("residual_mid",),
    ),
    "post before the gate": ("llama", of_mlp(before_the_gate), ("mlp.post", "mlp.W_out")),
    "the gate for what it is multiplied with": (
        "llama",
        of_mlp(lambda mlp, _: {"into": mlp.gate, "gate": mlp.into}),
        ("mlp.W_in", "mlp.W_gate"),
    ),
    "pre of what is no nonlinearity": (
        "gpt2",
        of_mlp(lambda mlp, path: {"pre": Spot(f"{path}.mlp.c_fc", "input", 0, (), (2, 7, 16))}),
        ("mlp.pre",),
    ),
    "another last layer": (
        "llama",
        of_mlp(lambda mlp, path: {"out": f"{path}.self_attn.o_proj"}),
        ("mlp.post", "mlp.W_out"),
    ),
    "the router's scores for its weights": (
        "mixtral", of_mlp(lambda mlp, _: {"weights": mlp.router}), ("experts.weights",),
    ),
}  # fmt: skip


def made(name: str) -> nn.Module:
    """A small model of an architecture, of those that are tested in depth or of the others."""
    return module_of(name) if name in ZOO else small_model("causal", name)


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_PROOFS", "off")
    monkeypatch.setattr("insitu.models.proof.given.recall", lambda key: None)


def entry_of(model: LanguageModel, block: str, key: str) -> Any:
    role, _, name = key.rpartition(".")
    if not role:
        return model.vocabulary.entry(block, "", name)
    owner = model.vocabulary.entry(block, "", role)
    if isinstance(owner, Missing):
        return owner
    with model.vocabulary.quiet():
        return model.vocabulary.entry(owner.path, owner.part, name)


# One of each of the parts that are proven: heads, the stream, a gate, experts.
USUAL = (
    "half as many heads",
    "queries for keys",
    "another output projection",
    "post before the gate",
    "what leaves for what enters",
    "what is added, once too often",
    "the router's scores for its weights",
)


@pytest.mark.parametrize(
    "planted", sampled(PLANTED, ["queries for keys", "what leaves for what enters"])
)
def test_what_is_planted_is_refused(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, plant, keys = PLANTED[planted]
    plain = LanguageModel(made(name))
    last = plain.blocks[-1].path
    for key in keys:
        assert not isinstance(entry_of(plain, last, key), Missing), key
    find = bodies.block_of
    monkeypatch.setattr(bodies, "block_of", lambda *args: plant(find(*args)))
    model = LanguageModel(made(name))
    for key in keys:
        found = entry_of(model, last, key)
        assert isinstance(found, Missing) and found.reason.endswith("."), key


@pytest.mark.parametrize("form", [Split, Swapped])
def test_heads_in_another_order_are_refused(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, restored = form.shown, form.restored
    monkeypatch.setattr(form, "shown", lambda *args: shown(*args).flip(1))
    monkeypatch.setattr(
        form, "restored", lambda self, value, *rest: restored(self, value.flip(1), *rest)
    )
    model = LanguageModel(module_of("bert"))
    found = entry_of(model, "bert.encoder.layer.1", "attention.z")
    assert isinstance(found, Missing) is (form is Split)


@pytest.mark.parametrize(
    "planted", sampled(["half as many heads", "twice as many heads"], ["twice as many heads"])
)
def test_a_number_of_heads_that_contradicts_the_config_is_not_replaced_by_it(
    planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, plant, _ = PLANTED[planted]
    assert LanguageModel(module_of(name)).n_heads == 4
    find = bodies.block_of
    monkeypatch.setattr(bodies, "block_of", lambda *args: plant(find(*args)))
    model = LanguageModel(module_of(name))
    with pytest.raises(PathError, match="heads are seen in it, where its config has 4"):
        _ = model.n_heads


def test_weights_in_another_order_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from insitu.models.weights import Weights

    found = Weights.of_heads

    def flipped(self: Any, *args: Any) -> Any:
        weight = found(self, *args)
        return weight.flip(0) if isinstance(weight, torch.Tensor) else weight

    monkeypatch.setattr(Weights, "of_heads", flipped)
    model = LanguageModel(module_of("llama"))
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        assert isinstance(entry_of(model, "model.layers.1", f"attention.{name}"), Missing), name


@pytest.mark.parametrize(
    "mixed",
    [
        pytest.param(lambda q, k: q + q.roll(1, 2), marks=pytest.mark.thorough),
        lambda q, k: q + k.repeat_interleave(q.shape[1] // k.shape[1], 1),
    ],
    ids=["other positions", "keys"],
)
def test_a_projection_that_only_goes_into_queries_has_no_name(
    mixed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama as llama

    rotated = llama.apply_rotary_pos_emb

    def apply(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return rotated(mixed(q, k), k, *args, **kwargs)

    monkeypatch.setattr(llama, "apply_rotary_pos_emb", apply)
    model = LanguageModel(module_of("llama"))
    refused = entry_of(model, "model.layers.1", "attention.W_Q")
    assert isinstance(refused, Missing)
    assert "is made of other positions, or of other layers, too" in refused.reason
    for name in ("W_K", "W_V", "W_O"):
        found = entry_of(model, "model.layers.1", f"attention.{name}")
        assert not isinstance(found, Missing), name


def test_a_module_that_gives_no_tensor_has_no_matrix() -> None:
    """I-BERT's layers give what they make, and its scale."""
    config = IBertConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=40,
    )  # fmt: skip
    model = LanguageModel(IBertForMaskedLM(config).eval())
    for name in ("W_in", "W_out"):
        with pytest.raises(PathError, match="gives no tensor|no nonlinearity|no linear layer"):
            model.blocks[0].role["mlp"].role[name]


def test_an_adapter_behind_an_mlp_is_not_taken_for_it() -> None:
    """It is a small MLP itself, of a width that the config does not speak of."""
    config = XmodConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=40, languages=["en_XX", "de_DE"],
        default_language="en_XX",
    )  # fmt: skip
    model = LanguageModel(XmodForMaskedLM(config).eval())
    weight = model.blocks[0].role["mlp"].role["W_out"]
    layer = model.module.roberta.encoder.layer[0].output.dense
    assert torch.equal(weight, layer.weight.T)
    with model.trace([5, 6, 7], lang_ids=torch.tensor([0])):
        added = model.blocks[0].role["mlp_out"].save()
        more = model.blocks[0].role["extra_out"].save()
        made = model.blocks[0]["output"].dense.output.save()
    assert torch.equal(added.value, made.value) and more.value.shape == made.value.shape
