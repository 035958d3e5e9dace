from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from insitu import LanguageModel, Model, PathError
from insitu.models.blocks import block_views
from tests.conftest import hooked_hidden, tiny_gpt2
from tests.fidelity.every.models import small_model

IDS = torch.tensor([[3, 14, 15, 92, 65]])


def blocks(model: LanguageModel):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def test_a_block_gives_a_tuple_with_the_hidden_states(language_model: LanguageModel) -> None:
    with language_model.trace(IDS):
        outputs = [block.output.save() for block in blocks(language_model)]
        assert language_model_shape(language_model) == (torch.Size([1, 5, 16]),)
    for layer, output in enumerate(outputs):
        path = blocks(language_model)[layer].path
        assert type(output.value) is tuple and len(output.value) == 1
        assert torch.equal(output.value[0], hooked_hidden(language_model.module, path, IDS))


def language_model_shape(model: LanguageModel):
    return blocks(model)[0].output.shape


def test_with_a_cache_the_second_element_is_key_and_value(language_model: LanguageModel) -> None:
    with language_model.trace(IDS, use_cache=True):
        output = blocks(language_model)[1].output
        shape = output.shape
        saved = output.save()
        values = output[1][1].save()
    with torch.no_grad():
        cache = language_model.module(IDS, use_cache=True).past_key_values
    layer = cache.layers[1]
    hidden, (key, value) = saved.value
    assert torch.equal(key, layer.keys) and torch.equal(value, layer.values)
    assert torch.equal(values, layer.values)
    assert shape == (hidden.shape, (key.shape, value.shape))


def test_in_a_generation_keys_and_values_are_those_of_the_prompt(
    language_model: LanguageModel,
) -> None:
    with language_model.generate(IDS, max_new_tokens=3):
        saved = blocks(language_model)[1].output.save()
    with torch.no_grad():
        layer = language_model.module(IDS, use_cache=True).past_key_values.layers[1]
    hidden, (key, value) = saved.value
    assert hidden.shape == (1, 5, 16)
    torch.testing.assert_close(key, layer.keys, atol=1e-6, rtol=0)
    torch.testing.assert_close(value, layer.values, atol=1e-6, rtol=0)


def test_every_other_module_gives_what_it_returns(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        attention = gpt2.transformer.h[0].attn.output.save()
        mlp = gpt2.transformer.h[0].mlp.output.save()
    assert type(attention.value) is tuple
    assert torch.is_tensor(mlp.value)


class Part(nn.Module):
    """Attention, an MLP: made of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(2, 2)


class Layer(nn.Module):
    def __init__(self, inner: nn.ModuleList | None = None) -> None:
        super().__init__()
        self.attention, self.mlp = Part(), Part()
        if inner is not None:
            self.parts = inner


class OtherLayer(Layer):
    pass


def listed(*modules: nn.Module) -> nn.ModuleList:
    return nn.ModuleList(modules)


def config(**given: Any) -> Any:
    return SimpleNamespace(get_text_config=lambda: None, **given)


@pytest.mark.parametrize(
    ("modules", "given", "expected"),
    [
        ({"h": listed(Layer(), Layer())}, config(n_layer=2), ["h.0", "h.1"]),
        ({"h": listed(Layer(), OtherLayer())}, config(num_layers=2), ["h.0", "h.1"]),
        ({"h": listed(Layer(), Layer())}, config(num_layers=3), []),
        (
            {"encoder": listed(Layer()), "decoder": listed(Layer(), Layer())},
            config(num_layers=1, num_decoder_layers=2),
            ["encoder.0", "decoder.0", "decoder.1"],
        ),
        (
            {"images": listed(Layer()), "h": listed(Layer(), Layer())},
            config(text=config(num_hidden_layers=2), vision=config(depth=1)),
            ["images.0", "h.0", "h.1"],
        ),
        # Of a block's own lists none is one of blocks, nor is one of what has no parts.
        (
            {"h": listed(Layer(listed(Layer(), Layer())), Layer())},
            config(n_layer=2),
            ["h.0", "h.1"],
        ),
        ({"h": listed(Part(), Part())}, config(n_layer=2), []),
        ({"h": listed(nn.Linear(2, 2), nn.Linear(2, 2))}, config(n_layer=2), []),
        # Stages of different width are shown as they are.
        ({"h": listed(Layer(), Layer())}, config(num_layers=2, depths=[1, 1]), []),
        ({"h": listed(Layer(), Layer())}, config(), []),
    ],
)
def test_blocks_are_found_by_structure(
    modules: dict[str, nn.Module], given: Any, expected: list[str]
) -> None:
    views = block_views(nn.ModuleDict(modules), given, cached=False)
    assert list(views) == expected
    assert [view.layer for view in views.values()] == [int(path[-1]) for path in expected]


def test_a_block_of_a_plain_model_gives_a_tuple_too() -> None:
    module = tiny_gpt2()
    model = Model(module)
    with model.trace(input_ids=IDS):
        bare = model.transformer.h[1].output.save()
    with model.trace(input_ids=IDS, use_cache=False):
        alone = model.transformer.h[1].output.save()
    hidden, (key, value) = bare.value
    assert torch.equal(hidden, hooked_hidden(module, "transformer.h.1", IDS))
    assert key.shape == value.shape == (1, 4, 5, 4)
    assert len(alone.value) == 1 and torch.equal(alone.value[0], hidden)


@pytest.mark.thorough
def test_a_block_that_attends_twice_has_no_one_attention() -> None:
    """Its config counts it as two layers; it has a residual stream all the same."""
    module: Any = small_model("causal", "longcat_flash")
    model = LanguageModel(module)
    assert model.n_layers == len(module.model.layers) == module.config.num_hidden_layers // 2
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = module.model.layers[1].register_forward_hook(
        lambda part, args, out: seen.append((args[0], out))
    )
    with model.trace(IDS):
        entering = model.blocks[1].residual_in.save()
        leaving = model.blocks[1].residual_out.save()
    handle.remove()
    assert torch.equal(entering.value, seen[-1][0])
    assert torch.equal(leaving.value, seen[-1][1])
    with pytest.raises(PathError, match="this block attends twice"):
        model.blocks[1].role["attention"]
