"""Standard names of models that are made in unusual ways, against plain hooks and Hugging Face."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from insitu import LanguageModel, PathError
from insitu.models.keys import entry_of, keys
from insitu.tracing.named import Named
from tests.conftest import tiny_gpt2, tiny_llama
from tests.fidelity.named import stacks
from tests.fidelity.zoo import ZOO, module_of, spread_out
from tests.thinning import sampled

IDS = torch.tensor([[5, 17, 42, 8, 23], [9, 3, 77, 30, 12]])


@pytest.fixture(autouse=True)
def _eager_is_expected() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attention scores and patterns")
        yield


def with_heads_among_rows() -> nn.Module:
    """A model whose attention has one axis for rows and heads together."""
    torch.manual_seed(0)
    config = transformers.XGLMConfig(
        vocab_size=100, d_model=16, ffn_dim=40, num_layers=2, attention_heads=4,
        max_position_embeddings=64, pad_token_id=1,
    )  # fmt: skip
    module = transformers.XGLMForCausalLM(config).eval()
    spread_out(module)
    return module


def test_patterns_of_rows_and_heads_on_one_axis_are_shown_by_both() -> None:
    module = with_heads_among_rows()
    model = LanguageModel(module)
    with torch.no_grad():
        expected = module(IDS, output_attentions=True, use_cache=False).attentions[1]
    attention = model.blocks[1].attention
    with model.trace(IDS):
        scores, pattern = attention.scores.save(), attention.pattern.save()
    assert torch.equal(pattern.value, expected)
    torch.testing.assert_close(scores.value.softmax(-1), expected)


@pytest.mark.parametrize("form", ["assigned", "in place"])
def test_patterns_of_rows_and_heads_on_one_axis_are_written_by_both(form: str) -> None:
    """A head of the second row that looks at the first position only gives its value."""
    model = LanguageModel(with_heads_among_rows())
    attention = model.blocks[1].attention
    first = torch.eye(5)[0].expand(5, 5)
    with model.trace(IDS):
        untouched = attention.z.clone().save()
    with model.trace(IDS):
        v = attention.v.save()
        if form == "assigned":
            pattern = attention.pattern.clone()
            pattern[1, 2] = first
            attention.pattern = pattern
        else:
            attention.pattern[1, 2] = first
        z = attention.z.save()
    expected = untouched.value.clone()
    expected[1, 2] = v.value[1, 2, :1]
    torch.testing.assert_close(z.value, expected)
    assert not torch.allclose(expected, untouched.value)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_keys_of_modules_are_those_of_their_outputs(make: Any) -> None:
    module = make()
    model = LanguageModel(module)
    vocabulary = model.vocabulary
    there = [key for key in keys(vocabulary) if key.endswith(".output")]
    assert there[:2] == ["embedding.output", "blocks.0.norm_1.output"]
    assert there[-1] == "final_norm.output"
    for key in there:
        entry = entry_of(vocabulary, key)
        assert type(entry) is Named and entry.kind == "output", key
        assert entry.path in dict(module.named_modules()), key
    for key in (
        "final_norm.input",
        "blocks.0.attention.output.q",
        "logits.output",
        "blocks.output",
    ):
        assert type(entry_of(vocabulary, key)) is not Named, key
    seen: dict[str, torch.Tensor] = {}
    paths = {key: entry_of(vocabulary, key).path for key in there}  # pyright: ignore
    handles = [
        module.get_submodule(path).register_forward_hook(
            lambda part, args, output, key=key: seen.update({key: output})
        )
        for key, path in paths.items()
    ]
    with torch.no_grad():
        module(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    cache = model.run_with_cache(IDS, there)
    assert sorted(cache.keys()) == sorted(there)
    for key in there:
        assert torch.equal(cache[key], seen[key]), key


def test_attention_that_compiles_itself_is_understood_from_eager() -> None:
    eager, module = tiny_llama(), tiny_llama()
    for one, implementation in ((eager, "eager"), (module, "flex_attention")):
        vars(one.config)["_attn_implementation_internal"] = implementation
    model, same = LanguageModel(module), LanguageModel(eager)
    block, other = model.blocks[1], same.blocks[1]
    assert list(block.role) == list(other.role)
    assert list(block.attention.role) == list(other.attention.role)
    # Numbers of columns are read from a run, which here compiles nothing either.
    assert torch.equal(block.attention.W_V, other.attention.W_V)
    assert module.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize(
    "name", sampled([n for n in ("mixtral", "llama4", "gpt-oss") if n in ZOO], ["mixtral"])
)
def test_what_is_written_to_a_router_makes_the_choice(name: str) -> None:
    """Also where a module has chosen before it returns its scores."""
    model = LanguageModel(module_of(name))
    experts = model.blocks[-1].experts
    with model.trace(IDS):
        model.blocks[-1].experts.router[..., 2] = 1e3
        router, weights = experts.router.save(), experts.weights.save()
    assert bool((router.value[..., 2] == 1e3).all())
    assert bool((weights.value.amax(-1) > 0.999).all())
    with model.trace(IDS):
        plain = experts.weights.save()
    assert not torch.allclose(plain.value, weights.value)


def test_functions_have_the_same_numbers_with_a_cache_and_without() -> None:
    """A cache puts keys together with the function with which this model makes queries."""
    model = LanguageModel(module_of("deepseek-v3"))
    attention = model.blocks[1].attention
    with model.trace(IDS[:1]):
        q, k, v = attention.q.save(), attention.k.save(), attention.v.save()
    with model.generate(IDS[:1], max_new_tokens=1):
        others = [attention.q.save(), attention.k.save(), attention.v.save()]
    for found, expected in zip(others, (q, k, v), strict=True):
        torch.testing.assert_close(found.value, expected.value)


def test_a_nonlinearity_of_two_functions_is_one() -> None:
    """What goes into the squared ReLU of this model is what its layer gives."""
    model = LanguageModel(module_of("rwkv"))
    block = model.blocks[1]
    with model.trace(IDS):
        pre, post = block.mlp.pre.save(), block.mlp.post.save()
        key = block.feed_forward.key.output.save()
    assert torch.equal(pre.value, key.value) and float(pre.value.min()) < 0
    torch.testing.assert_close(post.value, pre.value.relu() ** 2)


def test_what_a_pattern_was_asked_for_before_changes_no_weights() -> None:
    """Blocks of DistilBERT return their pattern in front of hidden states, in Transformers 4."""
    model = LanguageModel(module_of("distilbert"))
    with model.trace([[5, 6, 7]]):
        model.blocks[0].attention.pattern.save()
    attention = model.blocks[0].attention
    heads, width = model.n_heads, model.d_model
    assert attention.W_Q.shape == attention.W_V.shape == (heads, width, width // heads)


def test_blocks_that_have_no_part_in_a_forward_of_text_say_so() -> None:
    model = LanguageModel(module_of("llava"))
    (tower,) = [stack for stack in stacks("llava", model) if "vision_tower" in stack[0].path]
    for block in tower:
        assert not list(block.role)
        for name in ("residual_out", "attention", "mlp_out"):
            with pytest.raises(PathError, match=f"has no `{name}`: .* has no part in that"):
                block.role[name]
        with pytest.raises(PathError, match="has no `residual_mid`: "):
            _ = block.residual_mid
