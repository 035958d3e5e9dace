"""TransformerLens as the oracle: at its hooks it sees what Insitu reads by their names.

Run by `make oracle`, which gives the Python of an environment with TransformerLens; it is no part
of the suite. The weights are the same, and as they were trained: nothing folded, nothing centred.
"""

from __future__ import annotations

import contextlib
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from insitu import LanguageModel, OptionError, PathError
from tests.fidelity.architectures import spread_out
from tests.oracle.peers import ask, write_models

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 100,
    "max_position_embeddings": 40,
}
GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 4, "vocab_size": 100, "n_positions": 40}
MODELS = {
    "gpt2": ("GPT2", GPT2),
    "llama": ("Llama", SIZES),
    "gemma": ("Gemma", SIZES),
    "gemma2": ("Gemma2", {**SIZES, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "qwen3": ("Qwen3", SIZES),
}
LIMIT = 1e-5

# Of all models. What is not here is compared only where Insitu has it.
COMMON = [
    *("hook_embed", "ln_final.hook_scale", "ln_final.hook_normalized", "hook_unembed"),
    *(
        f"blocks.{layer}.{name}"
        for layer in range(3)
        for name in (
            *("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out"),
            *("hook_mlp_out", "ln1.hook_scale", "ln1.hook_normalized", "ln2.hook_scale"),
            *("ln2.hook_normalized", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z"),
            *("attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_result"),
            *("mlp.hook_pre", "mlp.hook_post"),
        )
    ),
]
ROTATED = [f"blocks.{layer}.attn.hook_rot_{letter}" for layer in range(3) for letter in "qk"]
GATED = [f"blocks.{layer}.mlp.hook_pre_linear" for layer in range(3)]


@cache
def made(name: str) -> transformers.PreTrainedModel:
    kind, sizes = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**sizes, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    spread_out(module)  # so that a mistake shows
    return module


IDS = torch.randint(4, 100, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what TransformerLens says of each model."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, {name: made(name) for name in MODELS}, IDS)
    ask("INSITU_TRANSFORMER_LENS", "hooks_of_transformer_lens.py", folder)
    return folder


def difference(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    """How a value differs from theirs, None if it does not."""
    if found.shape != expected.shape:
        return f"shape {tuple(found.shape)}, theirs {tuple(expected.shape)}"
    least = torch.finfo(found.dtype).min / 2  # a mask hides what is less
    visible = expected > least
    if not torch.equal(found > least, visible):
        return "another mask"
    worst = float((found - expected)[visible].abs().max())
    scale = max(float(expected[visible].abs().max()), 1.0)
    return None if worst <= LIMIT * scale else f"off by {worst:.2g} of {scale:.2g}"


def differing(found: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, str]:
    several = {key: difference(value, theirs[key]) for key, value in found.items()}
    return {key: what for key, what in several.items() if what is not None}


@pytest.mark.parametrize("name", MODELS)
def test_hooks_see_the_same(name: str, told: Path) -> None:
    theirs = load_file(told / name / "hooks.safetensors")
    model = LanguageModel(made(name))
    wanted = [*COMMON, "logits", *(["hook_pos_embed"] if name == "gpt2" else ROTATED + GATED)]
    assert not set(wanted) - theirs.keys()
    found = dict(model.run_with_cache(IDS, wanted))
    assert found.keys() == set(wanted)
    for key in theirs.keys() - found.keys():
        with contextlib.suppress(OptionError):
            found[key] = model.run_with_cache(IDS, key)[key]
    assert len(found) > len(wanted) + 30
    for key in found.keys() & {"hook_pos_embed", "pos_embed.hook_out"}:  # one for all rows here
        found[key] = found[key].expand_as(theirs[key])
    assert not differing(found, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_caches_of_standard_names_know_the_hooks(name: str, told: Path) -> None:
    theirs = load_file(told / name / "hooks.safetensors")
    cache = LanguageModel(made(name)).run_with_cache(IDS)
    found = {key: cache[key] for key in theirs if key in cache}
    assert len(found) > 3 * 15
    assert not differing(found, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_writes_to_hooks_do_the_same(name: str, told: Path) -> None:
    theirs = load_file(told / name / "written.safetensors")
    plain = load_file(told / name / "hooks.safetensors")["logits"]
    model = LanguageModel(made(name))
    found = {}
    for key in theirs:
        with contextlib.suppress(PathError):
            hook = model.hook(key)
            with model.trace(IDS):
                value = hook.output.clone()
                value[:, 2] *= 0.5
                hook.output = value
                found[key] = model.logits.save()
    found = {key: saved.value for key, saved in found.items()}
    assert len(found) >= 30
    # There it is the input of the second norm, and writing it does not reach the stream; in
    # versions before 4 it does, as it does here.
    middle = found.pop("blocks.1.hook_resid_mid")
    assert difference(middle, theirs["blocks.1.ln2.hook_in"]) is not None
    assert not differing(found, theirs)
    without = [key for key, logits in theirs.items() if torch.equal(logits, plain)]
    assert not without  # each of them does something
