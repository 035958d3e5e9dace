"""Tuples and outputs that are used as tensors: the error names the part to take, and that works."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from insitu import InsituError, LanguageModel, OperationError
from tests.conftest import hooked, hooked_hidden

TEXT = "The Louvre is in the city of"


@pytest.fixture(scope="module")
def eiffel() -> LanguageModel:
    """One that these tests share and leave as it is."""
    return LanguageModel("insitu/eiffel", device_map="cpu")


def layer(model: LanguageModel) -> Any:
    return model.transformer.h[2]


USES: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "index": (lambda m: layer(m).output, lambda _, x: x[:, -1]),
    "last": (lambda m: layer(m).output, lambda _, x: x[0, -1]),
    "ellipsis": (lambda m: layer(m).output, lambda _, x: x[..., 0]),
    "module": (lambda m: layer(m).output, lambda m, x: m.lm_head(x)),
    "norm": (lambda m: layer(m).output, lambda m, x: m.transformer.ln_f(x)),
    "size": (lambda m: layer(m).output, lambda _, x: x.size(-1)),
    "mean": (lambda m: layer(m).output, lambda _, x: x.mean()),
    "attention": (lambda m: layer(m).attn.output, lambda _, x: x[:, -1]),
    "sum of attention": (lambda m: layer(m).attn.output, lambda _, x: x + 1),
    "output": (lambda m: m.output, lambda _, x: x[0, -1]),
}


@pytest.mark.parametrize("name", USES)
def test_the_part_that_is_named_works_in_its_place(eiffel: LanguageModel, name: str) -> None:
    read, use = USES[name]
    with pytest.raises(InsituError) as caught:
        with eiffel.trace(TEXT):
            use(eiffel, read(eiffel)).save()
    location = caught.value.location
    assert location is not None and location.file == __file__
    found = re.search(r"write `(.*?)`", str(caught.value))
    assert found is not None and "not a tensor" in str(caught.value)
    line = found[1] if found[1].startswith("model.") else f"model.{found[1]}"
    with eiffel.trace(TEXT):
        part = eval(line, {"model": eiffel})
        result = use(eiffel, part)
        value = result if name == "size" else result.save()
    ids = eiffel.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    if "attn" in line:
        plain = hooked(eiffel.module, "transformer.h.2.attn", ids)[0]
    elif "logits" in line:
        plain = eiffel.module(ids).logits
    else:
        plain = hooked_hidden(eiffel.module, "transformer.h.2", ids)
    expected = use(eiffel.module, plain)
    if name == "size":
        assert value == expected
    else:
        torch.testing.assert_close(value.value, expected.detach())


@pytest.mark.parametrize("use", [lambda y: y[:, -1], lambda y: y + 1, lambda y: y.size(-1)])
def test_a_saved_tuple_says_the_same(eiffel: LanguageModel, use: Callable[[Any], Any]) -> None:
    with eiffel.trace(TEXT):
        saved = layer(eiffel).output.save()
    with pytest.raises(
        OperationError, match=r"is a tuple, not a tensor: write `.*\[0\]`"
    ) as caught:
        use(saved)
    assert __file__ in str(caught.value)
    use(saved[0])


def test_sizes_of_a_tensor_are_as_before(eiffel: LanguageModel) -> None:
    with eiffel.trace(TEXT):
        hidden = layer(eiffel).output[0]
        assert hidden.size() == (1, 7, 128) and hidden.size(-1) == 128
        assert layer(eiffel).output.shape == ((1, 7, 128),)


def test_what_only_eager_attention_gives_is_said(eiffel: LanguageModel) -> None:
    if transformers.__version__.startswith("4"):
        pytest.skip("Transformers 4 takes eager attention by itself where these are asked for")
    with pytest.raises(InsituError, match="attn_implementation=.eager."):
        with eiffel.trace(TEXT, output_attentions=True):
            eiffel.output.attentions[0].save()
    model = LanguageModel("insitu/eiffel", attn_implementation="eager")
    with model.trace(TEXT, output_attentions=True):
        given, named = model.output.attentions[0].save(), model.blocks[0].attention.pattern.save()
    torch.testing.assert_close(given.value, named.value)


def test_what_was_not_asked_for_is_said(eiffel: LanguageModel) -> None:
    with pytest.raises(InsituError, match="output_hidden_states=True"):
        with eiffel.trace(TEXT):
            eiffel.output.hidden_states[0].save()
    with eiffel.trace(TEXT, output_hidden_states=True):
        given = eiffel.output.hidden_states[3].save()
        named = eiffel.blocks[2].residual_out.save()
    torch.testing.assert_close(given.value, named.value)


def test_the_entries_of_a_mapping_are_named_where_one_is_not_there(eiffel: LanguageModel) -> None:
    entries = r"`transformer.h\[2\].inputs\[1\]` has 'encoder_attention_mask', 'use_cache'"
    with pytest.raises(InsituError, match=entries), eiffel.trace(TEXT):
        layer(eiffel).inputs[1]["nothing"].save()


@pytest.mark.parametrize("shape", [False, True])
def test_data_of_a_tensor_says_what_to_write(eiffel: LanguageModel, shape: bool) -> None:
    with pytest.raises(InsituError, match=r"'data' that can be read: write `value.detach\(\)`"):
        with eiffel.trace(TEXT):
            found = layer(eiffel).output[0].data
            found.save()
            if shape:
                _ = found.shape
    with eiffel.trace(TEXT):
        layer(eiffel).output[0].detach()[:] = 1
        written = layer(eiffel).output[0].save()
    assert bool((written == 1).all())


def test_a_tensor_of_values_is_a_stack(eiffel: LanguageModel) -> None:
    with eiffel.trace(TEXT):
        one, two = layer(eiffel).output[0][0, 0, :2]
        with pytest.raises(InsituError, match=r"`torch.stack\(\[x, y\]\)` makes one tensor"):
            torch.tensor([one, two])
        both = torch.stack([one, two]).save()
        parts = layer(eiffel).output[0][0, 0, :2].save()
    assert torch.equal(both, parts)


@pytest.mark.parametrize("given", ["unpacked", "items", "keys"])
def test_a_block_runs_again_with_the_arguments_of_its_first_run(
    language_model: LanguageModel, given: str
) -> None:
    model, ids = language_model, torch.tensor([[3, 14, 15, 92, 65]])
    with model.trace(ids):
        block = model.blocks[1]
        args, named = block.inputs
        if given == "items":
            named = dict(named.items())
        elif given == "keys":
            names = named.keys()
            named = {name: named[name] for name in names}
        again = first_of(block(block.residual_out, *args[1:], **named)).save()
        entries = len(block.inputs[1].values())

    found: list[torch.Tensor] = []

    def repeat(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not found:
            found.append(first_of(output))
            named = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            found.append(first_of(module(found[0], *args[1:], **named)))
            found.append(torch.tensor(len(kwargs)))

    hook = model.blocks[1].module.register_forward_hook(repeat, with_kwargs=True)
    with torch.no_grad():
        model.module(ids, use_cache=False)
    hook.remove()
    assert torch.allclose(again, found[1], atol=1e-6)
    assert not torch.allclose(found[0], found[1], atol=1e-4)
    assert entries == found[2]


def first_of(output: Any) -> Any:
    """The hidden states that a block returns, bare or in a tuple with others."""
    whole = output.shape if hasattr(output, "shape") else output
    return output if isinstance(whole, torch.Size) else output[0]


@pytest.mark.parametrize("name", ["keys", "items", "values"])
def test_what_is_no_mapping_has_no_items(eiffel: LanguageModel, name: str) -> None:
    refused = pytest.raises(OperationError, match=rf"`.{name}\(\)` is not an operation")
    with refused, eiffel.trace(TEXT):
        getattr(layer(eiffel).output[0], name)()
