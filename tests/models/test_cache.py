"""`run_with_cache`, against plain PyTorch hooks and what Hugging Face returns."""

import re
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from insitu import (
    ActivationCache,
    BlockError,
    InsituError,
    LanguageModel,
    NotCachedError,
    OptionError,
    ShapeError,
)
from tests.conftest import hooked_hidden, tiny_gpt2, tiny_llama
from tests.fidelity.architectures import spread_out
from tests.thinning import sampled

IDS = torch.tensor([[5, 17, 42, 8, 23]])


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    module = tiny_gpt2() if request.param == "gpt2" else tiny_llama()
    spread_out(module)
    module.set_attn_implementation("eager")
    return LanguageModel(module)


def outputs(model: LanguageModel, ids: torch.Tensor, **kwargs: object) -> object:
    with torch.no_grad():
        return model.module(
            input_ids=ids,
            use_cache=False,
            output_hidden_states=True,
            output_attentions=True,
            **kwargs,
        )


def paths(module: nn.Module) -> tuple[str, str]:
    """Of the blocks, and of what makes the output of their attention."""
    if hasattr(module, "transformer"):
        return "transformer.h", "attn.c_proj"
    return "model.layers", "self_attn.o_proj"


@pytest.mark.parametrize("model", sampled(["gpt2", "llama"], ["gpt2"]), indirect=True)
def test_it_holds_what_the_model_returns(model: LanguageModel) -> None:
    cache = model.run_with_cache(IDS)
    theirs = outputs(model, IDS)
    assert torch.equal(cache.logits, theirs.logits)
    layers = len(theirs.attentions)
    for layer in range(layers):
        torch.testing.assert_close(cache["residual_in", layer], theirs.hidden_states[layer])
        assert torch.equal(cache[f"blocks.{layer}.attention.pattern"], theirs.attentions[layer])
    torch.testing.assert_close(cache["final_norm.output"], theirs.hidden_states[-1])
    assert cache.stack("residual_in").shape == (layers, 1, 5, 16)
    torch.testing.assert_close(cache.stack("residual_in"), torch.stack(theirs.hidden_states[:-1]))


def test_values_are_those_of_plain_hooks(model: LanguageModel) -> None:
    cache = model.run_with_cache(IDS, "blocks.*")
    blocks, projection = paths(model.module)
    seen: list[torch.Tensor] = []
    part = model.module.get_submodule(f"{blocks}.1.{projection}")
    handle = part.register_forward_pre_hook(lambda part, args: seen.append(args[0]))
    out = hooked_hidden(model.module, f"{blocks}.1", IDS)
    handle.remove()
    assert torch.equal(cache["residual_out", 1], out)
    z = seen[0].unflatten(-1, (4, 4))
    assert torch.equal(cache["z", 1], z.transpose(1, 2))
    assert torch.equal(cache["blocks.1.attn.hook_z"], z)
    total = sum(cache[name, 1] for name in ("residual_in", "attention_out", "mlp_out"))
    torch.testing.assert_close(cache["residual_out", 1], total)
    torch.testing.assert_close(
        cache["result", 1].sum(1) + (0 if part.bias is None else part.bias),
        cache["attention_out", 1],
    )


@pytest.mark.parametrize("model", sampled(["gpt2", "llama"], ["gpt2"]), indirect=True)
def test_every_kind_of_filter_asks_for_the_same(model: LanguageModel) -> None:
    expected = [f"blocks.{layer}.residual_mid" for layer in range(len(model.blocks))]
    for names in (
        "residual_mid",
        "blocks.*.residual_mid",
        re.compile(r"mid$"),
        lambda name: "mid" in name,
        expected,
        [*expected[:1], "residual_mid"],
    ):
        assert list(model.run_with_cache(IDS, names)) == expected


def test_patterns_are_tried_on_standard_names_first(model: LanguageModel) -> None:
    hooks = model.run_with_cache(IDS, lambda name: name.endswith("hook_z"))
    assert list(hooks) == [f"blocks.{layer}.attn.hook_z" for layer in range(len(model.blocks))]
    assert not any("hook" in key for key in model.run_with_cache(IDS, lambda name: True))
    # In short a value has one order of axes, whichever name has asked for it.
    last = len(model.blocks) - 1
    assert torch.equal(hooks["z", -1], model.run_with_cache(IDS, "z")["z", -1])
    assert torch.equal(hooks[f"blocks.{last}.attention.z"], hooks["z", -1])
    assert torch.equal(hooks["z", -1, "attn"], hooks["z", -1].transpose(1, 2))
    assert torch.equal(hooks.stack("z")[-1], hooks["z", -1])


def test_a_value_of_the_same_last_word_is_not_taken_for_a_standard_one() -> None:
    """TransformerLens's queries are those before the rotation, ours those that are compared."""
    model = LanguageModel(tiny_llama())
    cache = model.run_with_cache(IDS, lambda name: name.endswith("hook_q"))
    assert cache["q", 1, "attn"].shape[2] == model.n_heads
    assert ("q", 1) not in cache
    with pytest.raises(NotCachedError, match=r"write `cache\['q', 1, 'attn'\]`"):
        cache["q", 1]
    with pytest.raises(NotCachedError, match=r"write `cache\['q', 0, 'attn'\]`"):
        cache.stack("q")


@pytest.mark.no_wire
def test_a_run_ends_with_the_last_value(model: LanguageModel) -> None:
    blocks, _ = paths(model.module)
    model.run_with_cache(IDS, "residual_out")  # after which it is known what the model is
    ran: list[int] = []
    stack = model.module.get_submodule(blocks)
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(stack)
    ]
    cache = model.run_with_cache(IDS, ["blocks.1.residual_out"])
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]
    with pytest.raises(NotCachedError, match="'logits' is not in the cache"):
        _ = cache.logits


def test_it_is_a_mapping(model: LanguageModel) -> None:
    cache = model.run_with_cache(IDS, ["residual_out", "logits"])
    count = len(model.blocks)
    assert isinstance(cache, ActivationCache) and len(cache) == count + 1
    assert dict(cache).keys() == cache.keys() and "logits" in cache
    assert ("residual_out", -1) in cache and ("residual_out", count) not in cache
    assert "blocks.0.hook_resid_post" in cache and 3 not in cache
    assert cache["resid_post", 0] is cache["residual_out", 0]
    with pytest.raises(KeyError, match="nearest: 'blocks.0.residual_out'"):
        cache["blocks.0.residual_ou"]
    with pytest.raises(NotCachedError, match="'z' is not in the cache"):
        cache["z", 0]
    with pytest.raises(NotCachedError, match="'z' is not in the cache"):
        cache.stack("z")
    lines = repr(cache).splitlines()
    assert lines[0].startswith(f"ActivationCache of 1 x 5 tokens: {count + 1} values, ")
    assert lines[1].split() == f"blocks.0-{count - 1}.residual_out (1, 5, 16) float32".split()


def test_values_of_different_shapes_are_not_stacked() -> None:
    values = {f"blocks.{n}.mlp.pre": torch.zeros(1, 2, n + 3) for n in range(2)}
    cache = ActivationCache(values, torch.zeros(1, 2), torch.ones(1, 2), 2, {})
    with pytest.raises(ShapeError, match="not the same shape in all blocks"):
        cache.stack("pre")


def test_they_are_kept_in_another_dtype_and_elsewhere(model: LanguageModel) -> None:
    plain = model.run_with_cache(IDS, "residual_out")
    cache = model.run_with_cache(IDS, "residual_out", to="cpu", dtype=torch.bfloat16)
    for key, value in cache.items():
        assert torch.equal(value, plain[key].to(torch.bfloat16))


def test_prompts_of_different_length_are_rows_with_padding(model: LanguageModel) -> None:
    cache = model.run_with_cache([[5, 17, 42], [8, 23, 9, 11, 6]], ["residual_out", "logits"])
    assert cache.mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert cache.ids.shape == (2, 5)
    alone = outputs(model, torch.tensor([[5, 17, 42]]))
    torch.testing.assert_close(cache.logits[:1, 2:], alone.logits)
    torch.testing.assert_close(cache["residual_out", 0][:1, 2:], alone.hidden_states[1])


def test_edits_hold_in_it(model: LanguageModel) -> None:
    with model.edit() as edited:
        edited.blocks[1].residual_out[:, -1] = 0
    assert (
        float(edited.run_with_cache(IDS, "residual_out")["residual_out", 1][:, -1].abs().max()) == 0
    )
    assert (
        float(model.run_with_cache(IDS, "residual_out")["residual_out", 1][:, -1].abs().max()) > 0
    )


def test_what_nobody_knows_is_an_error_at_the_line(model: LanguageModel) -> None:
    with pytest.raises(OptionError, match=r"called 'blocks.1.residual_ou' \(nearest: 'blocks.1"):
        model.run_with_cache(IDS, ["blocks.1.residual_ou"])
    with pytest.raises(OptionError, match="No value has a name like 'block.*'") as caught:
        model.run_with_cache(IDS, "block.*")
    assert caught.value.location is not None and caught.value.location.file == __file__
    with pytest.raises(OptionError, match="has no `blocks.0.experts.router`: there are no experts"):
        model.run_with_cache(IDS, ["blocks.0.experts.router"])
    with pytest.raises(OptionError, match="not 3"):
        model.run_with_cache(IDS, [3])
    assert list(model.run_with_cache(IDS, "*.experts.*")) == []


def test_in_a_session_it_is_refused(model: LanguageModel) -> None:
    with pytest.raises(BlockError, match="runs the model at once"):
        with model.session():
            model.run_with_cache(IDS)


def test_eager_attention_is_used_where_it_has_to_be_and_said_to_who_names_it(
    gpt2: LanguageModel,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = gpt2.run_with_cache(IDS, "*.z")
        cache = gpt2.run_with_cache(IDS)  # who asks for all need not be told
    with pytest.warns(UserWarning, match="eager attention only"):
        gpt2.run_with_cache(IDS, "*.pattern")
    torch.testing.assert_close(cache["pattern", 0].sum(-1), torch.ones(1, 4, 5))
    torch.testing.assert_close(cache["z", 0], plain["z", 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpt2.run_with_cache(IDS)


def test_of_the_bundled_model_it_holds_what_is_said_of_it(eiffel: LanguageModel) -> None:
    cache = eiffel.run_with_cache("The Louvre is in the city of", ["residual_out", "logits"])
    assert eiffel.tokenizer.decode(cache.logits[0, -1].argmax()) == " Paris"
    lens = eiffel.module.lm_head(eiffel.module.transformer.ln_f(cache.stack("residual_out")))
    torch.testing.assert_close(lens[-1], cache.logits)


@pytest.mark.parametrize("model", sampled(["gpt2", "llama"], ["gpt2"]), indirect=True)
@pytest.mark.parametrize("name", ["resid_post", "hook_z", "attn_scores", "hook_q"])
def test_short_names_of_hooks_are_kept_of_all_blocks(model: LanguageModel, name: str) -> None:
    kept = model.run_with_cache(IDS, name)
    assert len(kept) == model.n_layers
    full = next(key for key in kept if key.startswith("blocks.1."))
    with model.trace(IDS):
        expected = model.hook(full).output.save()
    assert torch.equal(kept[full], expected.value)


def test_a_function_that_is_true_of_nothing_is_an_error(model: LanguageModel) -> None:
    with pytest.raises(OptionError, match="true of no name"):
        model.run_with_cache(IDS, lambda name: name.endswith("hook_zz"))
    nothing = model.run_with_cache(IDS, "experts.router")
    with pytest.raises(NotCachedError, match="no experts"):
        nothing["router", 0]


def test_a_hook_of_a_block_that_there_is_not_says_how_many_there_are(model: LanguageModel) -> None:
    for use in (model.hook, partial(model.run_with_cache, IDS)):
        with pytest.raises(InsituError, match=f"the model has {model.n_layers}, 0 to"):
            use("blocks.12.attn.hook_z")


def test_a_short_name_of_a_value_of_the_model_is_in_the_cache(model: LanguageModel) -> None:
    cache = model.run_with_cache(IDS, "embed")
    for key in ("embed", ("embed",), "hook_embed", "embedding.output"):
        assert key in cache
        assert torch.equal(cache[key], model.module.get_input_embeddings()(IDS))
    assert "pos_embed" not in cache and "z" not in cache
