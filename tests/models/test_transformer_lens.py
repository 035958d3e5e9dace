"""TransformerLens's hook names, against plain PyTorch hooks and closed forms.

What TransformerLens itself sees is compared by `make oracle`.
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from insitu import BlockError, LanguageModel, OperationError, PathError
from insitu.models.transformer_lens import OF_BLOCK
from tests.conftest import tiny_gpt2, tiny_llama
from tests.fidelity.architectures import spread_out
from tests.thinning import sampled

IDS = torch.tensor([[5, 17, 42, 8, 23, 61]])


def eager(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    module = make()
    spread_out(module)
    module.set_attn_implementation("eager")
    return module


@pytest.fixture
def gpt2() -> LanguageModel:
    return LanguageModel(eager(tiny_gpt2))


@pytest.fixture
def llama() -> LanguageModel:
    return LanguageModel(eager(tiny_llama))


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return request.getfixturevalue(request.param)


def read(model: LanguageModel, *names: str) -> list[torch.Tensor]:
    with model.trace(IDS):
        saved = [model.hook(name).output.save() for name in names]
    return [one.value for one in saved]


def run(model: LanguageModel, **hooks: Callable[..., object]) -> tuple[dict, torch.Tensor]:
    """What plain hooks see as input and output of modules, and the logits; a hook may write."""
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for path, part in model.module.named_modules():

        def after(part: nn.Module, args: tuple, output: object, path: str = path) -> object:
            if args and isinstance(args[0], torch.Tensor):
                seen[f"{path}.input"] = args[0].clone()
            value = output[0] if isinstance(output, tuple) else output
            if not isinstance(value, torch.Tensor):
                return None
            written = hooks[path](value) if path in hooks else value
            seen[path] = written.clone()
            return (written, *output[1:]) if isinstance(output, tuple) else written

        handles.append(part.register_forward_hook(after))
    with torch.no_grad():
        logits = model.module(input_ids=IDS, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return seen, logits


def test_gpt2_has_the_values_under_these_names(gpt2: LanguageModel) -> None:
    seen, logits = run(gpt2)
    h = "transformer.h.1"
    q, k, v = (part.unflatten(-1, (4, 4)) for part in seen[f"{h}.attn.c_attn"].split(16, dim=-1))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2
    hidden = torch.ones(6, 6).triu(1).bool()
    expected = {
        "hook_embed": seen["transformer.wte"],
        "hook_pos_embed": seen["transformer.wpe"],
        "blocks.1.hook_resid_pre": seen["transformer.h.0"],
        "blocks.1.ln1.hook_out": seen[f"{h}.ln_1"],
        "blocks.1.attn.hook_in": seen[f"{h}.ln_1"],
        "blocks.1.attn.hook_q": q,
        "blocks.1.attn.hook_k": k,
        "blocks.1.attn.hook_v": v,
        "blocks.1.attn.hook_pattern": scores.masked_fill(hidden, -torch.inf).softmax(-1),
        "blocks.1.attn.hook_z": seen[f"{h}.attn.c_proj.input"].unflatten(-1, (4, 4)),
        "blocks.1.hook_attn_out": seen[f"{h}.attn"],
        "blocks.1.hook_resid_mid": seen[f"{h}.ln_2.input"],
        "blocks.1.hook_mlp_in": seen[f"{h}.ln_2.input"],
        "blocks.1.mlp.hook_pre": seen[f"{h}.mlp.c_fc"],
        "blocks.1.mlp.hook_post": seen[f"{h}.mlp.act"],
        "blocks.1.hook_mlp_out": seen[f"{h}.mlp"],
        "blocks.1.mlp.hook_out": seen[f"{h}.mlp"],
        "blocks.1.hook_resid_post": seen[h],
        "ln_final.hook_in": seen["transformer.ln_f.input"],
        "unembed.hook_in": seen["lm_head.input"],
        "hook_unembed": logits,
    }
    for name, value in zip(expected, read(gpt2, *expected), strict=True):
        torch.testing.assert_close(value, expected[name], msg=name)
    (visible,) = read(gpt2, "blocks.1.attn.hook_attn_scores")
    torch.testing.assert_close(visible[:, :, ~hidden], scores[:, :, ~hidden])


def test_llama_has_queries_and_keys_before_and_after_rotation(llama: LanguageModel) -> None:
    seen, _ = run(llama)
    attn = "model.layers.1.self_attn"
    q, k = (seen[f"{attn}.{part}_proj"].unflatten(-1, (-1, 4)) for part in "qk")
    with torch.no_grad():
        cos, sin = llama.module.model.rotary_emb(q, torch.arange(6)[None])

    def rotated(heads: torch.Tensor) -> torch.Tensor:
        first, second = heads.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return heads * cos[:, :, None] + turned * sin[:, :, None]

    expected = {
        "blocks.1.attn.hook_q": q,
        "blocks.1.attn.hook_k": k,
        "blocks.1.attn.hook_v": seen[f"{attn}.v_proj"].unflatten(-1, (-1, 4)),
        "blocks.1.attn.hook_rot_q": rotated(q),
        "blocks.1.attn.hook_rot_k": rotated(k),
        "blocks.1.mlp.hook_pre": seen["model.layers.1.mlp.gate_proj"],
        "blocks.1.mlp.hook_pre_linear": seen["model.layers.1.mlp.up_proj"],
        "blocks.1.mlp.hook_post": seen["model.layers.1.mlp.down_proj.input"],
        "blocks.1.attn.hook_out": seen[attn],
    }
    for name, value in zip(expected, read(llama, *expected), strict=True):
        torch.testing.assert_close(value, expected[name], msg=name)


def norms(model: LanguageModel) -> dict[str, str]:
    if hasattr(model.module, "transformer"):
        return {
            "blocks.1.ln1": "transformer.h.1.ln_1",
            "blocks.1.ln2": "transformer.h.1.ln_2",
            "ln_final": "transformer.ln_f",
        }
    return {
        "blocks.1.ln1": "model.layers.1.input_layernorm",
        "blocks.1.ln2": "model.layers.1.post_attention_layernorm",
        "ln_final": "model.norm",
    }


def test_norms_divide_by_their_scale(model: LanguageModel) -> None:
    seen, _ = run(model)
    for hook, path in norms(model).items():
        given, norm = seen[f"{path}.input"], model.module.get_submodule(path)
        bias = getattr(norm, "bias", None)
        eps = norm.variance_epsilon if bias is None else norm.eps
        centred = given if bias is None else given - given.mean(-1, keepdim=True)
        scale = (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        found = read(model, f"{hook}.hook_scale", f"{hook}.hook_normalized", f"{hook}.hook_out")
        torch.testing.assert_close(found[0], scale)
        torch.testing.assert_close(found[1], centred / scale)
        torch.testing.assert_close(found[2], seen[path])


@pytest.mark.parametrize("model", sampled(["gpt2", "llama"], ["llama"]), indirect=True)
def test_writes_inside_of_a_norm_are_what_its_weights_make_of_them(model: LanguageModel) -> None:
    for hook, path in norms(model).items():
        norm = model.module.get_submodule(path)
        bias = 0 if getattr(norm, "bias", None) is None else norm.bias
        value = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))
        _, expected = run(model, **{path: lambda _: value * norm.weight + bias})  # noqa: B023
        with model.trace(IDS):
            model.hook(f"{hook}.hook_normalized").output = value
            logits = model.logits.save()
        torch.testing.assert_close(logits.value, expected.detach())
        _, expected = run(model, **{path: lambda out: (out - bias) / 2 + bias})  # noqa: B023
        with model.trace(IDS):
            scale = model.hook(f"{hook}.hook_scale").output
            model.hook(f"{hook}.hook_scale").output = scale * 2
            logits = model.logits.save()
        torch.testing.assert_close(logits.value, expected.detach())


def test_a_head_is_taken_out_by_its_third_axis(model: LanguageModel) -> None:
    hook = model.hook("blocks.1.attn.hook_z")
    projection = (
        model.module.transformer.h[1].attn.c_proj
        if hasattr(model.module, "transformer")
        else model.module.model.layers[1].self_attn.o_proj
    )

    def before(part: nn.Module, args: tuple) -> tuple:
        z = args[0].clone()
        z[..., 8:12] = 0
        return (z,)

    handle = projection.register_forward_pre_hook(before)
    _, expected = run(model)
    handle.remove()
    with model.trace(IDS):
        hook.output[:, :, 2] = 0
        in_place = model.logits.save()
    with model.trace(IDS):
        z = hook.output.clone()
        z[:, :, 2] = 0
        hook.output = z
        assigned = model.logits.save()
    with model.trace(IDS):
        model.hook("blocks.1.attn.hook_result").output[:, :, 2] = 0
        by_result = model.logits.save()
    torch.testing.assert_close(in_place.value, expected)
    torch.testing.assert_close(assigned.value, expected)
    torch.testing.assert_close(by_result.value, expected)


def test_gradients_have_the_axes_of_the_hook(model: LanguageModel) -> None:
    names = ("blocks.1.attn.hook_z", "blocks.1.attn.hook_result", "blocks.1.ln1.hook_normalized")
    with model.trace(IDS):
        z, result, normalised = (model.hook(name).output for name in names)
        plain = model.blocks[1].attention.z.grad.save()
        out = model.blocks[1].attention_out.grad.save()
        norm = model.blocks[1].norm_1.output.grad.save()
        found = [value.grad.save() for value in (z, result, normalised)]
        with pytest.raises(OperationError, match="has no gradient here"):
            _ = model.hook("blocks.1.ln1.hook_scale").output.grad
        model.logits[0, -1].max().backward()
    assert torch.equal(found[0].value, plain.value.transpose(1, 2))
    assert torch.equal(found[1].value, out.value[:, :, None].expand(-1, -1, 4, -1))
    weight = model.blocks[1].norm_1.module.weight.detach()
    torch.testing.assert_close(found[2].value, norm.value * weight)


@pytest.mark.parametrize("model", sampled(["gpt2", "llama"], ["gpt2"]), indirect=True)
def test_every_name_of_a_block_is_there_or_says_why_not(model: LanguageModel) -> None:
    lacking = {}
    for name in OF_BLOCK:
        try:
            hook = model.hook(f"blocks.0.{name}")
        except PathError as error:
            lacking[name] = str(error)
            continue
        with model.trace(IDS):
            value = hook.output.save()
        assert value.shape[0] == 1 and 6 in value.shape[1:], name
    assert all("The model has no `blocks.0." in message for message in lacking.values())
    rotated = "attn.hook_rot_q" not in lacking
    assert rotated is hasattr(model.module, "model")
    assert "norm_1.input" in lacking["hook_q_input"]


def test_errors_name_what_is_near(gpt2: LanguageModel) -> None:
    with pytest.raises(PathError, match="'blocks.1.attn.hook_zz' in this model .nearest: 'blocks"):
        gpt2.hook("blocks.1.attn.hook_zz")
    with pytest.raises(PathError, match="no hook 'blocks.9.attn.hook_z'"):
        gpt2.hook("blocks.9.attn.hook_z")
    with pytest.raises(PathError, match="nothing is done to it after its projection"):
        gpt2.hook("blocks.1.attn.hook_rot_q")
    hook = gpt2.hook("blocks.1.attn.hook_z")
    assert repr(hook) == "<hook blocks.1.attn.hook_z>" and hook.name == "blocks.1.attn.hook_z"
    with pytest.raises(BlockError, match="is a value of a run"):
        _ = hook.output
    with pytest.raises(BlockError, match="is a value of a run"):
        hook.output = torch.zeros(1)
