"""Path patching, beside sums on the residual stream and runs frozen with PyTorch's hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import FalconConfig, FalconForCausalLM

from insitu import LanguageModel
from insitu.graph.errors import OptionError, PromptError, ShapeError
from insitu.methods import logit_difference, path_patching
from tests.conftest import tiny_gpt2, tiny_llama
from tests.fidelity.architectures import spread_out
from tests.fidelity.zoo import module_of
from tests.thinning import sampled

CLEAN = [[5, 17, 3, 88, 41], [7, 9, 30, 2, 66, 12, 4]]
CORRUPTED = [[5, 18, 3, 80, 41], [7, 9, 31, 2, 66, 13, 4]]
METRIC = logit_difference(11, 23)
WIDTH = 4  # of a head
Tensor = torch.Tensor


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def language_model(request: pytest.FixtureRequest) -> LanguageModel:
    """Models in which each part matters, as it does not at random initialisations."""
    model = LanguageModel({"gpt2": tiny_gpt2, "llama": tiny_llama}[request.param]())
    spread_out(model.module)
    with torch.no_grad():
        for parts in parts_of(model.module):
            for owner in {owner for owner, _ in parts.projections.values()}:
                owner.weight *= 3  # so that it matters what queries and keys are
    return model


@dataclass
class Parts:
    """The modules of a block, by their role."""

    block: nn.Module
    norm: nn.Module
    out: nn.Module
    norm_2: nn.Module
    mlp: nn.Module
    projections: Mapping[str, tuple[nn.Module, int]]  # of q, k and v, and where each begins

    def output_of(self, z: torch.Tensor, head: int) -> torch.Tensor:
        """What the output projection makes of one head."""
        alone = torch.zeros_like(z)
        alone[..., slice_of(head)] = z[..., slice_of(head)]
        zero = torch.zeros_like(z)
        return self.out(alone) - self.out(zero)


def slice_of(head: int, begin: int = 0) -> slice:
    return slice(begin + head * WIDTH, begin + (head + 1) * WIDTH)


def parts_of(module: nn.Module) -> list[Parts]:
    if module.config.model_type == "gpt2":
        return [
            Parts(
                b, b.ln_1, b.attn.c_proj, b.ln_2, b.mlp,
                {name: (b.attn.c_attn, 16 * at) for at, name in enumerate("qkv")},
            )
            for b in module.transformer.h
        ]  # fmt: skip
    return [
        Parts(
            b, b.input_layernorm, b.self_attn.o_proj, b.post_attention_layernorm, b.mlp,
            {name: (getattr(b.self_attn, f"{name}_proj"), 0) for name in "qkv"},
        )
        for b in module.model.layers
    ]  # fmt: skip


def first(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


def final(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    norm = module.transformer.ln_f if module.config.model_type == "gpt2" else module.model.norm
    return module.lm_head(norm(hidden))[0]


Change = Callable[[torch.Tensor], "torch.Tensor | None"]


def run(
    module: nn.Module,
    ids: list[int],
    outputs: Mapping[nn.Module, Change] | None = None,
    inputs: Mapping[nn.Module, Change] | None = None,
) -> torch.Tensor:
    """The logits of a forward in which functions see what passes modules, and may change it."""
    with ExitStack() as stack:
        for owner, change in (outputs or {}).items():

            def after(module: nn.Module, args: Any, output: Any, change: Change = change) -> Any:
                changed = change(first(output))
                if changed is None:
                    return None
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            stack.enter_context(owner.register_forward_hook(after))
        for owner, change in (inputs or {}).items():

            def before(module: nn.Module, args: Any, change: Change = change) -> Any:
                changed = change(args[0])
                return None if changed is None else (changed, *args[1:])

            stack.enter_context(owner.register_forward_pre_hook(before))
        return module(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@dataclass
class Seen:
    """What passed in a run of a prompt, by layer."""

    given: list[torch.Tensor]
    middle: list[torch.Tensor]
    z: list[torch.Tensor]
    mlp: list[torch.Tensor]
    end: torch.Tensor
    logits: torch.Tensor


def seen(module: nn.Module, ids: list[int]) -> Seen:
    found: dict[Any, torch.Tensor] = {}
    parts = parts_of(module)

    def keep(key: Any) -> Change:
        return lambda value: found.__setitem__(key, value.clone())

    outputs: dict[nn.Module, Change] = {p.mlp: keep(("mlp", n)) for n, p in enumerate(parts)}
    outputs[parts[-1].block] = keep("end")
    inputs: dict[nn.Module, Change] = {}
    for n, p in enumerate(parts):
        inputs |= {
            p.block: keep(("given", n)),
            p.norm_2: keep(("middle", n)),
            p.out: keep(("z", n)),
        }
    logits = run(module, ids, outputs, inputs)
    lists = [
        [found[name, n] for n in range(len(parts))] for name in ("given", "middle", "z", "mlp")
    ]
    return Seen(*lists, found["end"], logits)


def metric(logits: torch.Tensor) -> float:
    return float(logits[-1, 11] - logits[-1, 23])


def written(value: torch.Tensor, part: slice, to: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    value[..., part] = to[..., part]
    return value


def received(
    module: nn.Module, ids: list[int], own: Seen, receiver: Any, more: torch.Tensor
) -> torch.Tensor:
    """The logits if more than in its own run reaches a receiver from the residual stream."""
    if receiver == "logits":
        return final(module, own.end + more)
    parts = parts_of(module)[receiver[1]]
    if receiver[0] == "mlp":
        to = parts.mlp(parts.norm_2(own.middle[receiver[1]] + more))
        return run(module, ids, {parts.mlp: lambda value: to})
    changed = parts.norm(own.given[receiver[1]] + more)
    if receiver[0] == "head":  # whatever heads share: what it gives of the changed input
        made = {owner: owner(changed) for owner, _ in parts.projections.values()}
        z: list[torch.Tensor] = []
        outputs: dict[nn.Module, Change] = {
            owner: lambda value, to=to: to for owner, to in made.items()
        }
        run(module, ids, outputs, {parts.out: lambda value: z.append(value.clone())})
        part = slice_of(receiver[2], 0)
        return run(module, ids, None, {parts.out: lambda value: written(value, part, z[0])})
    owner, offset = parts.projections[receiver[0]]
    part, to = slice_of(receiver[2], offset), owner(changed)
    return run(module, ids, {owner: lambda value: written(value, part, to)})


USUAL = [("logits", "noising"), (("q", -1, 1), "noising"), (("mlp", 1), "denoising")]
OTHERS = [
    *(("logits", "denoising"), (("k", 2, 1), "denoising"), (("v", 2, 0), "noising")),
    (("head", 2, 3), "noising"),
]
CASES = [*USUAL, *(pytest.param(*one, marks=pytest.mark.thorough) for one in OTHERS)]


@pytest.mark.parametrize("language_model", sampled(["gpt2", "llama"], ["llama"]), indirect=True)
@pytest.mark.parametrize(("receiver", "direction"), CASES, ids=str)
def test_heads_send_what_they_add_to_the_stream(
    language_model: LanguageModel, receiver: Any, direction: Any
) -> None:
    model, module = language_model, language_model.module
    layers = model.n_layers
    result = path_patching(
        model,
        CLEAN,
        CORRUPTED,
        METRIC,
        receivers=receiver,
        direction=direction,
        heads=[1, 2],
        normalised=False,
    )
    assert result.sizes == {"prompt": 2, "layer": layers, "head": 2}
    target = (
        receiver if receiver == "logits" else (receiver[0], receiver[1] % layers, *receiver[2:])
    )
    last = layers if target == "logits" else target[1] + (target[0] == "mlp")
    with torch.no_grad():
        for pair, (clean, corrupted) in enumerate(zip(CLEAN, CORRUPTED, strict=True)):
            ids, other_ids = (clean, corrupted) if direction == "noising" else (corrupted, clean)
            own, other = seen(module, ids), seen(module, other_ids)
            effects = 0
            for layer in range(layers):
                for at, head in enumerate((1, 2)):
                    parts = parts_of(module)[layer]
                    more = parts.output_of(other.z[layer], head)
                    more = more - parts.output_of(own.z[layer], head)
                    expected = metric(own.logits)
                    if layer < last:
                        expected = metric(received(module, ids, own, target, more))
                        effects += abs(expected - metric(own.logits)) > 5e-4
                    found = result.values[pair, layer, at].item()
                    assert found == pytest.approx(expected, rel=1e-4, abs=2e-5), (layer, head)
            assert effects
            assert result.details["clean"][pair].item() == pytest.approx(
                metric(seen(module, clean).logits), abs=1e-5
            )


@pytest.mark.parametrize("receiver", sampled(["logits", ("q", 2, 1)], ["logits"]), ids=str)
def test_mlps_send_at_some_positions(language_model: LanguageModel, receiver: Any) -> None:
    model, module = language_model, language_model.module
    result = path_patching(
        model, CLEAN, CORRUPTED, METRIC, senders="mlps", receivers=[receiver] if receiver !=
        "logits" else receiver, positions=[1, -1], layers=[1, 0], normalised=False,
    )  # fmt: skip
    assert result.sizes == {"prompt": 2, "layer": 2}
    assert result.axis("layer").labels == ("1", "0")
    with torch.no_grad():
        for pair, (clean, corrupted) in enumerate(zip(CLEAN, CORRUPTED, strict=True)):
            own, other = seen(module, clean), seen(module, corrupted)
            for at, layer in enumerate((1, 0)):
                more = torch.zeros_like(own.mlp[layer])
                for place in (1, -1):
                    more[:, place] = (other.mlp[layer] - own.mlp[layer])[:, place]
                expected = metric(received(module, clean, own, receiver, more))
                assert result.values[pair, at].item() == pytest.approx(expected, rel=1e-4, abs=2e-5)


def test_mlps_between_computed_anew(language_model: LanguageModel) -> None:
    """All heads frozen but the sender, and the queries of two heads of the last layer received."""
    model, module = language_model, language_model.module
    last = model.n_layers - 1
    receivers = [("q", last, 0), ("q", last, 2)]
    result = path_patching(
        model, CLEAN[0], CORRUPTED[0], METRIC, receivers=receivers, heads=[1, 3],
        through_mlps=True, normalised=False,
    )  # fmt: skip
    straight = path_patching(
        model, CLEAN[0], CORRUPTED[0], METRIC, receivers=receivers, heads=[1, 3], normalised=False
    )
    assert (result.values - straight.values).abs().max() > 5e-4
    parts = parts_of(module)
    owner, begin = parts[last].projections["q"]
    with torch.no_grad():
        own, other = seen(module, CLEAN[0]), seen(module, CORRUPTED[0])
        for layer in range(last):
            for at, head in enumerate((1, 3)):
                freeze: dict[nn.Module, Change] = {}
                for n, part in enumerate(parts):
                    z = own.z[n]
                    if n == layer:
                        z = written(z, slice_of(head), other.z[n])
                    freeze[part.out] = lambda value, z=z: z
                heard: list[torch.Tensor] = []
                run(module, CLEAN[0], {owner: lambda value: heard.append(value.clone())}, freeze)  # noqa: B023

                def hear(value: torch.Tensor, heard: torch.Tensor = heard[0]) -> torch.Tensor:
                    for number in (0, 2):
                        value = written(value, slice_of(number, begin), heard)
                    return value

                expected = metric(run(module, CLEAN[0], {owner: hear}))
                found = result.values[layer, at].item()
                assert found == pytest.approx(expected, rel=1e-4, abs=2e-5)


@pytest.mark.thorough
def test_state_space_layers_between_are_frozen_too() -> None:
    """In the second of three blocks is attention, in the others a state-space layer."""
    module = module_of("jamba")
    layers = module.model.layers
    adding = [(layers[n].feed_forward, layers[n].mamba if n != 1 else None) for n in range(3)]
    found = path_patching(
        LanguageModel(module), CLEAN[0], CORRUPTED[0], METRIC, senders="mlps", normalised=False
    )
    parts = [part for pair in adding for part in pair if part is not None]
    parts.append(layers[1].self_attn)

    def given(ids: list[int], frozen: Mapping[nn.Module, Any]) -> tuple[Tensor, dict[Any, Any]]:
        seen: dict[Any, Any] = {}

        def hook(part: nn.Module, args: Any, output: Any) -> Any:
            seen[part] = frozen.get(part, output)
            return seen[part]

        handles = [part.register_forward_hook(hook) for part in parts]
        with torch.no_grad():
            logits = module(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        for handle in handles:
            handle.remove()
        return logits[11] - logits[23], seen

    _, own = given(CLEAN[0], {})
    _, other = given(CORRUPTED[0], {})
    expected = [float(given(CLEAN[0], own | {sender: other[sender]})[0]) for sender, _ in adding]
    torch.testing.assert_close(found.values, torch.tensor(expected), rtol=1e-4, atol=2e-5)
    heads = path_patching(LanguageModel(module), CLEAN[0], CORRUPTED[0], METRIC)
    assert heads.axis("layer").labels == ("1",)


def test_positions_that_can_be_gone_through_once_are_those_of_every_prompt(
    language_model: LanguageModel,
) -> None:
    asked = (language_model, CLEAN, CORRUPTED, METRIC)
    options: Any = {"heads": 1, "layers": 0, "receivers": ("mlp", -1)}
    listed = path_patching(*asked, positions=[1, -1], **options)
    once = path_patching(*asked, positions=(number for number in (1, -1)), **options)
    assert torch.equal(once.values, listed.values) and bool((listed.values != 0).any())


def test_keys_are_counted_as_the_model_has_them() -> None:
    """Falcon's config says how many key heads there are in a way of its own: here there is one."""
    config = FalconConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, multi_query=True
    )
    module = FalconForCausalLM(config).eval()
    spread_out(module)
    before, (_, block) = module.transformer.h[0].self_attention.dense, module.transformer.h
    qkv, keys = block.self_attention.query_key_value, slice_of(4)  # behind four heads of queries
    with torch.no_grad():
        qkv.weight *= 3  # so that it matters what queries and keys are
    ids, other_ids = CLEAN[0], CORRUPTED[0]
    seen: list[torch.Tensor] = []
    kept: dict[nn.Module, Change] = {before: seen.append, block.input_layernorm: seen.append}
    with torch.no_grad():
        own = metric(run(module, ids, None, kept))
        run(module, other_ids, None, kept)
        z, given, other_z, _ = seen
        expected: list[float] = []
        for head in range(4):
            more = before(written(z, slice_of(head), other_z)) - before(z)
            to = qkv(block.input_layernorm(given + more))
            changed = {qkv: partial(written, part=keys, to=to)}
            expected.append(metric(run(module, ids, changed)))
    assert max(abs(one - own) for one in expected) > 1e-3
    model, options = LanguageModel(module), {"direction": "noising", "normalised": False}
    for head in (0, -1):
        receiver = ("k", 1, head)
        found = path_patching(model, ids, other_ids, METRIC, receivers=receiver, **options)
        assert found.values[0].tolist() == pytest.approx(expected, abs=1e-4)
    with pytest.raises(OptionError, match="no head 1"):
        path_patching(model, ids, other_ids, METRIC, receivers=("k", 1, 1))


def test_positions_of_a_prompt_are_none_of_a_decoder_behind_an_encoder() -> None:
    model = LanguageModel(module_of("t5"))
    with pytest.raises(OptionError, match="positions of the prompt are none"):
        path_patching(model, CLEAN[0], CORRUPTED[0], METRIC, senders="mlps", positions=[-1])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bert", "Block 0 has no residual stream"),
        ("zamba2", "not told apart"),
        pytest.param("mamba", "no attention", marks=pytest.mark.thorough),
    ],
)
def test_where_paths_are_not_known_it_says_so(name: str, said: str) -> None:
    with pytest.raises(OptionError, match=said) as caught:
        path_patching(LanguageModel(module_of(name)), CLEAN[0], CORRUPTED[0], METRIC)
    assert "test_path_patching.py" in str(caught.value)


def test_of_attention_alone_paths_add_up() -> None:
    """Without MLPs, norms and softmax between them, the logits are a sum of what is sent."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16, n_layer=1, n_head=4, vocab_size=100, n_positions=40, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    module = GPT2LMHeadModel(config).eval()
    spread_out(module)
    module.transformer.ln_f = nn.Identity().eval()
    block = module.transformer.h[0]
    nn.init.zeros_(block.mlp.c_proj.weight)
    nn.init.zeros_(block.mlp.c_proj.bias)
    same_end = [5, 18, 3, 80, 41]  # the last token's embedding is the same in both prompts
    result = path_patching(LanguageModel(module), CLEAN[0], same_end, METRIC)
    assert result.values.sum().item() == pytest.approx(1, abs=1e-4)
    assert result.quantity == "logit difference, share lost"


def test_shares_of_the_way(language_model: LanguageModel) -> None:
    given = {"receivers": ("mlp", 1), "layers": [0]}
    raw = path_patching(language_model, CLEAN, CORRUPTED, METRIC, normalised=False, **given)
    found = path_patching(language_model, CLEAN, CORRUPTED, METRIC, **given)
    clean, corrupted = found.details["clean"], found.details["corrupted"]
    expected = (raw.values - clean[:, None, None]) / (corrupted - clean)[:, None, None]
    torch.testing.assert_close(found.values, expected, rtol=1e-3, atol=1e-4)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a direction": ({"direction": "noise"}, OptionError, "'denoising' or 'noising'"),
    "senders": ({"senders": "neurons"}, OptionError, "'heads' or 'mlps'"),
    "heads of MLPs": ({"senders": "mlps", "heads": [0]}, OptionError, "MLPs are the senders"),
    "receivers": ({"receivers": "heads"}, OptionError, "`receivers` are"),
    "no receivers": ({"receivers": []}, OptionError, "`receivers` are"),
    "a receiver": ({"receivers": ("query", 1, 0)}, OptionError, "A receiver is"),
    "a receiver's head": ({"receivers": ("q", 1)}, OptionError, "A receiver is"),
    "no whole number": ({"receivers": ("q", 1.7, 0)}, OptionError, "A receiver is"),
    "a truth value": ({"receivers": [("mlp", True)]}, OptionError, "A receiver is"),
    "no number": ({"receivers": ("q", 1, "0")}, OptionError, "A receiver is"),
    "a layer": ({"receivers": ("mlp", 4)}, OptionError, "no layer 4"),
    "a head": ({"receivers": ("q", 1, 4)}, OptionError, "no head 4"),
    "a sender's layer": ({"layers": [7]}, OptionError, "no layer 7"),
    "a longer prompt": ({"corrupted": CORRUPTED[1]}, PromptError, "has 5 tokens, and"),
    "a metric of several": ({"metric": lambda found: found[-1]}, ShapeError, "one number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(gpt2: LanguageModel, name: str) -> None:
    changed, error, message = WRONG[name]
    given = {"clean": CLEAN[0], "corrupted": CORRUPTED[0], "metric": METRIC, **changed}
    with pytest.raises(error, match=message):
        path_patching(gpt2, **given)
