import torch

from insitu import LanguageModel
from tests.conftest import hooked_hidden

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
