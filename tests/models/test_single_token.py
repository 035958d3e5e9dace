"""The id of one token, whatever a tokenizer puts before a prompt."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from insitu import InsituError, LanguageModel, LoadError, PromptError
from tests.conftest import tiny_gpt2

WORDS = {"<s>": 0, "The": 1, " Paris": 2, " Rome": 3, " in": 4, " is": 5}


def with_a_first_token() -> LanguageModel:
    """A model whose tokenizer puts a token before every text."""
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    return LanguageModel(tiny_gpt2(), fast)


def test_a_first_token_is_not_the_id_of_every_word() -> None:
    model = with_a_first_token()
    assert model.tokenizer(" Paris").input_ids == [0, 2]
    assert [model.token_id(word) for word in WORDS] == list(WORDS.values())
    with pytest.raises(PromptError, match=r"'The is' is 2 tokens \('The', ' ?is'\), not one"):
        model.token_id("The is")


def test_lines_for_token_ids_are_of_the_token_that_is_asked_for() -> None:
    model = with_a_first_token()
    names = {"model": model, "prompt": "The is in", "token": " is"}
    expected = {
        "to_single_token": 5,
        "get_token_position": 2,
        "to_tokens": [0, 1, 5, 4],
        "to_str_tokens": [model.tokenizer.decode(one) for one in [0, 1, 5, 4]],
    }
    for name, value in expected.items():
        with pytest.raises(InsituError) as caught:
            getattr(model, name)
        line = str(caught.value).partition("write `")[2].partition("`")[0]
        assert eval(line, names) == value, line
    assert expected["to_str_tokens"][0] == "<s>"


def test_without_a_tokenizer_text_is_an_error_and_an_id_is_none() -> None:
    model = LanguageModel(tiny_gpt2())
    assert model.token_id(7) == 7
    with pytest.raises(LoadError, match="no tokenizer"):
        model.token_id(" Paris")
