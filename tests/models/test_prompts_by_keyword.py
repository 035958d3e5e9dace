"""A prompt by keyword, as every forward takes it, with what goes with it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from insitu import InsituError, LanguageModel, OptionError, PromptError
from tests.conftest import tiny_gpt2, tiny_llama
from tests.models.kinds import bert, t5
from tests.thinning import sampled

IDS = torch.tensor([[11, 12, 13, 14, 15], [21, 22, 23, 24, 25]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
OPTIONS = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
KINDS: dict[str, Callable[[], Any]] = {"gpt2": tiny_gpt2, "llama": tiny_llama, "bert": bert}


def embeddings(module: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return module.get_input_embeddings()(ids).detach()


def logits_of(module: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return module(**inputs).logits


@pytest.mark.parametrize("name", sampled(KINDS, ["bert"]))
def test_it_is_what_a_plain_forward_makes_of_it(name: str) -> None:
    module = KINDS[name]()
    model, vectors, ones = LanguageModel(module), embeddings(module), torch.ones_like(IDS)
    types = {"token_type_ids": ones} if name == "bert" else {}
    for given in (
        {"input_ids": IDS},
        {"input_ids": IDS[0]},
        {"input_ids": IDS.tolist()},
        {"input_ids": IDS, "attention_mask": ones, **types},
        {"inputs_embeds": vectors},
        {"inputs_embeds": vectors[0]},
        {"inputs_embeds": vectors, "attention_mask": ones},
        {"inputs_embeds": vectors, "position_ids": torch.arange(5).expand(2, 5) + 2},
    ):
        plain = {key: torch.as_tensor(value) for key, value in given.items()}
        for key in ("input_ids", "inputs_embeds"):
            if key in plain and plain[key].ndim < (2 if key == "input_ids" else 3):
                plain[key] = plain[key][None]
        expected = logits_of(module, **plain)
        with model.trace(**given) as tracer:
            traced = tracer.output["logits"].save()
        with model.trace() as tracer, tracer.invoke(**given) as invoker:
            invoked = invoker.output["logits"].save()
        with model.scan(**given):
            scanned = model.output["logits"].save()
        cache = model.run_with_cache(**given, names="logits")
        assert scanned.value.shape == expected.shape
        for found in (traced.value, invoked.value, cache.logits):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", sampled([tiny_gpt2, tiny_llama, t5], [tiny_llama]))
@pytest.mark.parametrize("masked", sampled([False, True], [False]))
def test_it_is_generated_from_as_plain_generate_does(make: Any, masked: bool) -> None:
    module = make()
    model, vectors = LanguageModel(module), embeddings(module)
    with_it = {"attention_mask": MASK if masked else torch.ones_like(IDS)}
    for given in ({"input_ids": IDS}, {"inputs": IDS}, {"inputs_embeds": vectors}):
        expected = module.generate(**given, **with_it, **OPTIONS)
        with model.generate(**given, **with_it, **OPTIONS) as generator:
            hidden = model.output["logits"][:, -1].save()
        assert torch.equal(generator.output, expected)
        with model.generate(**OPTIONS) as generator:
            with generator.invoke(**given, **with_it) as invoker:
                pass
            with generator.invoke(**given, **with_it) as other:
                logits = model.output["logits"][:, -1].save()
        assert torch.equal(invoker.output, expected) and torch.equal(other.output, expected)
        assert torch.equal(generator.output, torch.cat([expected, expected]))
        torch.testing.assert_close(hidden.value, logits.value)


def test_embeddings_by_place_are_a_prompt_too() -> None:
    module = tiny_gpt2()
    model, vectors = LanguageModel(module), embeddings(module)
    expected = logits_of(module, inputs_embeds=vectors)
    with model.trace(vectors) as tracer:
        found = model.lm_head.output.save()
        with pytest.raises(ValueError, match="given as embeddings"):
            _ = tracer.ids
        assert tracer.mask.tolist() == [[1] * 5] * 2
    torch.testing.assert_close(found.value, expected)
    with pytest.raises(TypeError, match="Token ids are integers"), model.trace(torch.rand(2, 5)):
        pass
    with pytest.raises(TypeError, match="d_model=16"), model.trace(inputs_embeds=torch.rand(5, 3)):
        pass


def test_padded_embeddings_get_their_positions() -> None:
    module = tiny_gpt2()
    model, vectors = LanguageModel(module), embeddings(module)
    with model.trace(inputs_embeds=vectors, attention_mask=MASK):
        found = model.lm_head.output.save()
    for number, row in enumerate(IDS):
        expected = logits_of(module, input_ids=row[MASK[number].bool()][None])[0]
        torch.testing.assert_close(
            found.value[number][MASK[number].bool()], expected, atol=1e-5, rtol=1e-4
        )


def test_embeddings_are_read_written_and_have_gradients() -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)
    leaf = embeddings(module, IDS[:1]).requires_grad_()
    with model.trace(inputs_embeds=leaf):
        model.transformer.h[1].output[0][:, -1] *= 2
        loss = model.lm_head.output[0, -1, 7]
        loss.backward()
    found = leaf.grad.clone()
    other = leaf.detach().clone().requires_grad_()

    def doubled(_: Any, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        changed = torch.cat([hidden[:, :-1], hidden[:, -1:] * 2], 1)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.transformer.h[1].register_forward_hook(doubled)
    module(inputs_embeds=other).logits[0, -1, 7].backward()
    handle.remove()
    torch.testing.assert_close(found, other.grad)


def test_several_prompts_by_keyword_see_no_neighbour() -> None:
    module = tiny_llama()
    model, vectors = LanguageModel(module), embeddings(module)
    givens = [
        {"input_ids": IDS[:1], "labels": IDS[:1]},
        {"inputs_embeds": vectors[:, :3]},
        {"input_ids": IDS, "attention_mask": MASK},
        {"input_ids": torch.tensor([7, 8])},
    ]
    saved = []
    with model.trace() as tracer:
        for given in givens:
            with tracer.invoke(**given):
                saved.append(model.output["logits"].save())
    for given, found in zip(givens, saved, strict=True):
        plain = dict(given)
        if "input_ids" in plain and plain["input_ids"].ndim == 1:
            plain["input_ids"] = plain["input_ids"][None]
        expected = logits_of(module, **plain)
        own = given.get("attention_mask", torch.ones(expected.shape[:2])).bool()
        torch.testing.assert_close(found.value[own], expected[own], atol=1e-5, rtol=1e-4)


def test_an_encoder_with_its_decoder() -> None:
    module = t5()
    model = LanguageModel(module)
    labels = IDS[:, :2].contiguous()
    given = {"input_ids": IDS, "decoder_input_ids": labels, "labels": labels}
    with torch.no_grad():
        expected = module(**given)
    with model.trace(**given) as tracer:
        logits, loss = tracer.output["logits"].save(), tracer.output["loss"].save()
    with model.trace() as tracer, tracer.invoke(**given) as invoker:
        invoked = invoker.output["logits"].save()
    torch.testing.assert_close(logits.value, expected.logits)
    torch.testing.assert_close(invoked.value, expected.logits)
    torch.testing.assert_close(loss.value, expected.loss)


def test_a_saved_value_is_a_prompt() -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)
    with model.trace(IDS):
        vectors = model.transformer.wte.output.save()
        whole = model.lm_head.output.save()
    with model.trace(inputs_embeds=vectors):
        found = model.lm_head.output.save()
    torch.testing.assert_close(found.value, whole.value)


def test_what_does_not_go_together_is_an_error() -> None:
    model = LanguageModel(tiny_gpt2())
    vectors = torch.rand(1, 3, 16)
    for given, match in (
        ({"prompt": IDS, "input_ids": IDS}, "given twice"),
        ({"input_ids": IDS, "inputs_embeds": vectors}, "given twice"),
        ({"inputs_embeds": IDS}, "a tensor of floats"),
    ):
        with pytest.raises((ValueError, TypeError), match=match), model.trace(**given):
            pass
    with pytest.raises(OptionError, match="own `attention_mask`: give it to `invoke`"):
        model.trace(attention_mask=MASK)
    with model.trace() as tracer:
        with pytest.raises(TypeError, match=r"`tracer\.invoke\(\[first, second\]\)`"):
            tracer.invoke()
        with pytest.raises(TypeError, match="takes one prompt"):
            tracer.invoke(attention_mask=MASK)
        with pytest.raises(OptionError, match="option of the whole run"):
            tracer.invoke(IDS, use_cache=True)
        tracer.invoke(IDS)


def test_what_an_encoding_has_in_lists_goes_to_the_model() -> None:
    """Also where rows are of different length, so that they are padded here."""
    module = bert()
    model = LanguageModel(module)
    rows = [[5, 6, 7, 8], [9, 10]]
    types = [[0, 0, 1, 1], [0, 1]]
    with model.trace({"input_ids": rows, "token_type_ids": types}):
        ours = model.logits.save()
    for number, (row, kinds) in enumerate(zip(rows, types, strict=True)):
        with torch.no_grad():
            plain = module(torch.tensor([row]), token_type_ids=torch.tensor([kinds])).logits
        torch.testing.assert_close(ours.value[number : number + 1, : len(row)], plain)


@pytest.mark.parametrize("lists", [False, True])
def test_position_ids_of_an_encoding_are_those_of_the_run(lists: bool) -> None:
    module = tiny_gpt2()
    ids, positions = [[3, 14, 15]], [[4, 2, 7]]
    given = positions if lists else torch.tensor(positions)
    with LanguageModel(module).trace({"input_ids": ids, "position_ids": given}) as tracer:
        ours = tracer.output.logits.save()
    with torch.no_grad():
        # With a cache, Transformers takes positions that jump for one sequence, else for several.
        plain = module(
            torch.tensor(ids), position_ids=torch.tensor(positions), use_cache=False
        ).logits
    torch.testing.assert_close(ours.value, plain)


@pytest.mark.parametrize("of", [torch.tensor, list], ids=["tensor", "list"])
def test_token_types_of_zero_are_those_of_the_models_own_call(of: Any) -> None:
    """GPT-2 adds the embedding of token 0 for them. Llama takes none, and tokenizers make some."""
    encoding = {"input_ids": of([[3, 14, 15]]), "token_type_ids": of([[0, 0, 0]])}
    tensors = {name: torch.as_tensor(rows) for name, rows in encoding.items()}
    for name in ("gpt2", "llama", "bert"):
        module = KINDS[name]()
        model = LanguageModel(module)
        with model.trace(encoding):
            ours = model.logits.save()
        torch.testing.assert_close(ours.value, logits_of(module, **tensors))


@pytest.mark.parametrize(
    "beside",
    [
        *({"foo": 3}, {"foo": "text"}, {"foo": torch.ones(1, 3)}, {"use_cache": True}),
        *({"foo": [[1, 2, 3]]}, {"position_ids": [[0, 1]]}, {"token_type_ids": [0]}),
    ],
)
def test_what_means_nothing_in_an_encoding_is_an_error(beside: dict[str, Any]) -> None:
    model = LanguageModel(tiny_gpt2())
    with (
        pytest.raises(InsituError, match=f"`{next(iter(beside))}`"),
        model.trace({"input_ids": [[3, 14, 15]], **beside}),
    ):
        model.lm_head.output.save()


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids"])
@pytest.mark.parametrize("length", [2, 4])
def test_what_goes_with_each_token_is_as_long_as_the_prompt(name: str, length: int) -> None:
    model = LanguageModel(tiny_gpt2())
    for prompt in (
        {"input_ids": torch.tensor([[3, 14, 15]])},
        {"inputs_embeds": torch.ones(1, 3, 16)},
    ):
        with (
            pytest.raises(PromptError, match=rf"`{name}` has the shape \(1, {length}\)"),
            model.trace(**prompt, **{name: torch.zeros(1, length, dtype=torch.int64)}),
        ):
            model.lm_head.output.save()
