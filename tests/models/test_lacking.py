"""What is not in a cache: the error says the line that keeps it, or why the model lacks it."""

import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from insitu import InsituError, LanguageModel, NotCachedError
from insitu.models.cache import ActivationCache
from tests.conftest import tiny_gpt2, tiny_llama
from tests.fidelity.architectures import spread_out

IDS = torch.tensor([[5, 17, 42, 8, 23, 61]])


def of(make: Callable[[], nn.Module]) -> LanguageModel:
    module: Any = make()
    spread_out(module)
    module.set_attn_implementation("eager")
    return LanguageModel(module)


@pytest.fixture
def gpt2() -> LanguageModel:
    return of(tiny_gpt2)


@pytest.fixture
def llama() -> LanguageModel:
    return of(tiny_llama)


def message(use: Callable[[], object]) -> str:
    with pytest.raises(InsituError) as caught:
        use()
    return str(caught.value).splitlines()[0]


def as_it_says(model: LanguageModel, use: Callable[[], object]) -> ActivationCache:
    """The cache that the line in an error gives."""
    line = message(use).partition("write `")[2].partition("`")[0]
    return eval(line, {"model": model, "prompt": IDS, "torch": torch})


def seen(model: LanguageModel, path: str, of_input: bool = False) -> torch.Tensor:
    found: list[torch.Tensor] = []
    handle = model.module.get_submodule(path).register_forward_hook(
        lambda module, args, output: found.append(args[0] if of_input else output)
    )
    with torch.no_grad():
        model.module(input_ids=IDS, use_cache=False)
    handle.remove()
    return found[0]


def test_unrotated_queries_of_a_rotary_model_are_kept_by_name(llama: LanguageModel) -> None:
    cache = llama.run_with_cache(IDS)
    made = seen(llama, "model.layers.1.self_attn.q_proj").unflatten(-1, (4, 4))
    for key in ("blocks.1.attn.hook_q", ("q", 1, "attn")):
        kept = as_it_says(llama, lambda: cache[key])  # noqa: B023
        assert torch.equal(kept[key], made)
    assert not torch.equal(cache["q", 1].transpose(1, 2), made)  # ours is the rotated one


@pytest.mark.thorough
def test_scales_of_norms_are_kept_by_name(gpt2: LanguageModel, llama: LanguageModel) -> None:
    for model, norm, last in (
        (gpt2, "transformer.h.2.ln_1", "transformer.ln_f"),
        (llama, "model.layers.2.input_layernorm", "model.norm"),
    ):
        cache = model.run_with_cache(IDS)
        for key, path in ((("scale", 2, "ln1"), norm), ("ln_final.hook_scale", last)):
            kept = as_it_says(model, lambda: cache[key])  # noqa: B023
            x = seen(model, path, of_input=True)
            square = x.var(-1, correction=0) if model is gpt2 else x.square().mean(-1)
            eps = 1e-5 if model is gpt2 else model.config.rms_norm_eps
            assert torch.allclose(kept[key], (square + eps).sqrt()[..., None], atol=1e-5)


def test_results_of_heads_are_kept_by_name(gpt2: LanguageModel) -> None:
    cache = gpt2.run_with_cache(IDS)
    z = seen(gpt2, "transformer.h.1.attn.c_proj", of_input=True).unflatten(-1, (4, 4))
    w = gpt2.module.transformer.h[1].attn.c_proj.weight.detach().unflatten(0, (4, 4))
    expected = torch.einsum("bphd,hdm->bhpm", z, w)
    for use in (lambda: cache.stack("attention.result"), lambda: cache.stack("result")):
        kept = as_it_says(gpt2, use)
        assert torch.allclose(kept.stack("result")[1], expected, atol=1e-6)
    for name in ("stack_head_results", "compute_head_results"):
        found: Any = as_it_says(gpt2, lambda: getattr(cache, name))  # noqa: B023
        assert torch.allclose(found[1], expected, atol=1e-6)
    assert torch.allclose(as_it_says(gpt2, lambda: cache["result", 1])["result", 1], expected)


def test_what_was_not_asked_for_is_kept_by_name(gpt2: LanguageModel) -> None:
    cache = gpt2.run_with_cache(IDS, "z")
    kept = as_it_says(gpt2, lambda: cache["resid_post", 2])
    last: Any = seen(gpt2, "transformer.h.2")
    last = last[0] if isinstance(last, tuple) else last
    assert torch.equal(kept["resid_post", 2], last)
    kept = as_it_says(gpt2, lambda: cache.logits)
    assert torch.equal(kept.logits, seen(gpt2, "lm_head"))


def test_embeddings_have_their_short_names(gpt2: LanguageModel) -> None:
    cache = gpt2.run_with_cache(IDS)
    tokens = seen(gpt2, "transformer.wte")
    assert torch.equal(cache["embed"], tokens) and torch.equal(cache[("embed",)], tokens)
    for key in ("pos_embed", ("pos_embed",), "hook_pos_embed"):
        kept = as_it_says(gpt2, lambda: cache[key])  # noqa: B023
        assert torch.equal(kept[key], seen(gpt2, "transformer.wpe"))


def test_what_the_model_does_not_have_says_why(llama: LanguageModel) -> None:
    cache = llama.run_with_cache(IDS)
    assert "no such layer" in message(lambda: cache["pos_embed"])
    assert "no experts" in message(lambda: cache["experts.router", 0])
    assert "no block 7: the model has 3, 0 to 2" in message(lambda: cache["blocks.7.attn.hook_z"])


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_the_lines_for_decompositions_add_up(make: Callable[[], nn.Module]) -> None:
    model = of(make)
    cache = model.run_with_cache(IDS)
    names = {"cache": cache, "torch": torch}
    path = model.blocks[-1].path
    last: Any = seen(model, path)
    last = last[0] if isinstance(last, tuple) else last
    line = message(lambda: cache.decompose_resid).partition("write `")[2].partition("`")[0]
    parts = eval(line, names)
    assert len(parts) == 2 * model.n_layers + 1
    assert torch.allclose(parts.sum(0), last, atol=1e-5)
    line = message(lambda: cache.accumulated_resid).partition("write `")[2].partition("`")[0]
    streams = eval(line, names)
    assert len(streams) == model.n_layers + 1 and torch.equal(streams[-1], last)
    assert torch.equal(streams[1], cache["residual_out", 0])


@pytest.mark.thorough
def test_it_keeps_no_model_and_says_less_without_one() -> None:
    model = of(tiny_gpt2)
    module = weakref.ref(model.module)
    cache = model.run_with_cache(IDS, "z")
    other = pickle.loads(pickle.dumps(cache))
    assert torch.equal(other["z", 1], cache["z", 1])
    del model
    gc.collect()
    assert module() is None
    for one in (cache, other):
        with pytest.raises(NotCachedError, match="'residual_out' is not in the cache"):
            one["residual_out", 1]
