import pytest
import torch
from transformers import BatchEncoding

from insitu import LanguageModel, PromptError, PromptTypeError
from tests.thinning import sampled

TEXT = "The Eiffel Tower is in the city of"


def ids_of(model: LanguageModel, prompt: object, mode: str = "trace") -> torch.Tensor:
    run = model.trace(prompt) if mode == "trace" else model.generate(prompt, max_new_tokens=1)
    with run as tracer:
        assert torch.equal(tracer.mask, torch.ones_like(tracer.ids)) or isinstance(prompt, list)
        return tracer.ids


def test_every_form_of_one_prompt_means_the_same(eiffel: LanguageModel) -> None:
    ids = eiffel.tokenizer(TEXT)["input_ids"]
    forms = [
        TEXT,
        [TEXT],
        ids,
        [ids],
        torch.tensor(ids),
        torch.tensor([ids]),
        torch.tensor(ids, dtype=torch.int32),
        eiffel.tokenizer(TEXT),
        eiffel.tokenizer(TEXT, return_tensors="pt"),
        BatchEncoding({"input_ids": [ids], "attention_mask": [[1] * len(ids)]}),
        {"input_ids": torch.tensor([ids])},
    ]
    results = []
    for form in forms:
        with eiffel.trace(form):
            results.append(eiffel.lm_head.output[0, -1].save())
    for form, result in zip(forms, results, strict=True):
        assert torch.equal(result, results[0]), form


def test_a_chat_gets_the_generation_prompt(eiffel: LanguageModel) -> None:
    tokenizer = eiffel.tokenizer
    chat = [{"role": "user", "content": "Where is Rome?"}]
    with pytest.raises(PromptError, match="no chat template"):
        ids_of(eiffel, chat)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}. {% endfor %}"
        "{% if add_generation_prompt %}answer:{% endif %}"
    )
    assert tokenizer.decode(ids_of(eiffel, chat)[0]) == "user: Where is Rome?. answer:"


def test_prompts_of_different_length_in_one_invocation_are_padded_in_sight(
    gpt2: LanguageModel,
) -> None:
    rows = [[1, 2, 3], [4]]
    with gpt2.trace(rows) as tracer:
        hidden = gpt2.transformer.h[3].output[0].save()
    assert tracer.mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    with gpt2.generate(rows, max_new_tokens=1) as generator:
        pass
    assert generator.mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    with torch.no_grad():
        whole = gpt2.module(torch.tensor([[4]])).logits
    with gpt2.trace(rows) as tracer:
        logits = tracer.output.logits.save()
    assert hidden.shape == (2, 3, 16)
    torch.testing.assert_close(logits.value[1, -1:], whole[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", sampled(["trace", "generate"], ["trace"]))
@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ("", PromptError, "empty"),
        ([], PromptError, "empty"),
        ([[]], PromptError, "no tokens"),
        ([[1], []], PromptError, "no tokens"),
        (["", "a"], PromptError, "empty"),
        (torch.empty(0, dtype=torch.int64), PromptError, "empty"),
        (torch.ones(1, 3), PromptTypeError, "torch.float32"),
        (torch.ones(3, dtype=torch.bool), PromptTypeError, "torch.bool"),
        (torch.ones(1, 2, 3, dtype=torch.int64), PromptTypeError, r"(1, 2, 3)"),
        (3, PromptTypeError, "a int"),
        (b"text", PromptTypeError, "a bytes"),
        ([1.5], PromptTypeError, "a list of a float"),
        ([True], PromptTypeError, "a bool"),
        ([1, "a"], PromptTypeError, "a int, a str"),
        ([[1, 2.0]], PromptTypeError, "a list"),
        ([[[1]]], PromptTypeError, "a list"),
        ({"text": "a"}, PromptTypeError, "a dict"),
        (object(), PromptTypeError, "a object"),
        ([1, 5000], PromptError, "id 5000, but the model's ids go from 0 to"),
        ([1, -1], PromptError, "id -1"),
        (list(range(1)) * 300, PromptError, "300 tokens, but the model's context is 256"),
    ],
    ids=lambda value: repr(value)[:30] if type(value) is not object else "object",
)
def test_a_bad_prompt_is_a_clear_error_at_its_line(
    eiffel: LanguageModel, mode: str, prompt, error, words: str
) -> None:
    with pytest.raises(error) as caught:
        ids_of(eiffel, prompt, mode)
    assert words in str(caught.value)
    assert __file__ in str(caught.value)
    assert not eiffel.loaded
    with eiffel.trace(TEXT):
        pass


@pytest.mark.parametrize("mode", ["trace", "generate"])
@pytest.mark.parametrize(("bad", "words"), [(5000, "id 5000"), (-1, "id -1")])
def test_a_tensor_with_an_unknown_id_is_an_error_of_the_prompt(
    eiffel: LanguageModel, mode: str, bad: int, words: str
) -> None:
    with pytest.raises(PromptError, match=words) as caught:
        ids_of(eiffel, torch.tensor([1, bad]), mode)
    assert __file__ in str(caught.value)
    with pytest.raises(PromptError, match=words), eiffel.trace() as tracer:
        with tracer.invoke([1, 2, 3]):
            eiffel.transformer.h[0].output.save()
        with tracer.invoke(torch.tensor([1, bad])):
            eiffel.transformer.h[0].output.save()
    assert ids_of(eiffel, TEXT, mode).shape[0] == 1


def test_a_generation_past_the_context_is_an_error_of_the_prompt(gpt2: LanguageModel) -> None:
    gpt2.module.generation_config.eos_token_id = None
    with pytest.raises(PromptError, match="38 tokens and 5 are to be generated.*context is 40"):
        ids_of(gpt2, torch.ones(1, 38, dtype=torch.int64), "trace")
        with gpt2.generate(torch.ones(1, 38, dtype=torch.int64), max_new_tokens=5):
            pass
    with gpt2.generate(torch.ones(1, 38, dtype=torch.int64), max_new_tokens=3) as generator:
        pass
    assert generator.output.shape == (1, 41)


def test_a_scan_takes_a_generation_that_may_end_within_the_context() -> None:
    model = LanguageModel("insitu/eiffel")
    with model.scan(TEXT, generate=True, max_new_tokens=300) as generator:  # the context is 256
        pass
    assert not model.loaded
    assert model.run(generator.job).output.shape[1] < 256


def test_text_without_a_tokenizer_is_an_error_and_ids_are_fine(gpt2: LanguageModel) -> None:
    with pytest.raises(PromptError, match="no tokenizer"):
        ids_of(gpt2, "text")
    assert ids_of(gpt2, [1, 2]).tolist() == [[1, 2]]


def test_the_tokenizer_is_never_changed(eiffel: LanguageModel) -> None:
    tokenizer = eiffel.tokenizer
    before = tokenizer.padding_side, tokenizer.pad_token, len(tokenizer)
    with eiffel.generate(max_new_tokens=2) as generator:
        with generator.invoke([TEXT, "Rome"]):
            pass
        with generator.invoke("Rome is"):
            pass
    assert (tokenizer.padding_side, tokenizer.pad_token, len(tokenizer)) == before


def test_a_saved_value_of_another_block_can_be_the_prompt(gpt2: LanguageModel) -> None:
    with gpt2.trace([5, 6, 7]):
        best = gpt2.lm_head.output.argmax(-1).save()
    assert torch.equal(ids_of(gpt2, best), best.value)


def test_an_encoding_of_lists_keeps_its_mask(gpt2: LanguageModel) -> None:
    encoding = {
        "input_ids": [[3, 4, 5, 6], [9, 10, 0, 0]],
        "attention_mask": [[1] * 4, [1, 1, 0, 0]],
    }
    with gpt2.trace(encoding) as tracer:
        pass
    assert tracer.mask.tolist() == encoding["attention_mask"]
