import pytest
import torch

from insitu import LanguageModel, OptionError, PromptError
from insitu.methods.prompts import read_prompts, words


@pytest.fixture(scope="module")
def eiffel() -> LanguageModel:
    return LanguageModel("insitu/eiffel")


def test_a_prompt_alone_has_no_axis_and_a_list_of_one_has(eiffel: LanguageModel) -> None:
    alone = read_prompts(eiffel, "The Louvre is in")
    assert (alone.many, alone.axis, len(alone)) == (False, (), 1)
    listed = read_prompts(eiffel, ["The Louvre is in"])
    assert listed.many
    assert [axis.name for axis in listed.axis] == ["prompt"]
    assert torch.equal(alone.ids[0], listed.ids[0])


@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
def test_ragged_prompts_are_apart_and_not_padded(eiffel: LanguageModel, as_ids: bool) -> None:
    texts = ["The Louvre is in", "Paris", "The Eiffel Tower is in the city of"]
    ids = [eiffel.tokenizer(text).input_ids for text in texts]
    prompts = read_prompts(eiffel, ids if as_ids else texts)
    assert [row.tolist() for row in prompts.ids] == ids
    assert prompts.lengths == tuple(map(len, ids))
    for row, tokens in zip(ids, prompts.tokens, strict=True):
        assert tokens == tuple(eiffel.tokenizer.decode([token]) for token in row)


def test_positions_are_tokens_where_all_prompts_have_the_same(eiffel: LanguageModel) -> None:
    same = read_prompts(eiffel, ["The Louvre is in"] * 2)
    assert same.positions("query").labels == same.tokens[0]
    other = read_prompts(eiffel, ["The Louvre is in", "Paris is"])
    assert other.positions().labels == tuple(map(str, range(max(other.lengths))))


def test_stacks_fill_positions_that_a_prompt_does_not_have_with_nan(eiffel: LanguageModel) -> None:
    prompts = read_prompts(eiffel, [[5, 6, 7], [8]])
    stacked = prompts.stacked([torch.ones(2, 3), torch.ones(2, 1)], 1)
    assert stacked.shape == (2, 2, 3)
    assert stacked.isnan().tolist()[1] == [[False, True, True]] * 2
    square = prompts.stacked([torch.ones(3, 3), torch.ones(1, 1)], -1, -2)
    assert square.isnan().sum() == 8
    assert prompts.stacked([torch.zeros(2), torch.ones(2)]).tolist() == [[0, 0], [1, 1]]
    assert read_prompts(eiffel, [5, 6]).stacked([torch.ones(2)], 0).shape == (2,)


def test_without_a_tokenizer_tokens_are_numbers(gpt2: LanguageModel) -> None:
    assert read_prompts(gpt2, [[3, 4], [5]]).tokens == (("3", "4"), ("5",))
    assert words(gpt2, [7]) == ("7",)


def test_a_token_is_its_id_or_a_text_of_just_one(eiffel: LanguageModel) -> None:
    wanted = eiffel.tokenizer(" Paris").input_ids
    assert len(wanted) == 1
    assert eiffel.token_id(" Paris") == eiffel.token_id(wanted[0]) == wanted[0]
    with pytest.raises(PromptError, match=r"'Colosseum' is 3 tokens .*' Colosseum', it is one"):
        eiffel.token_id("Colosseum")
    with pytest.raises(PromptError, match="no token 1336"):
        eiffel.token_id(1336)
    with pytest.raises(OptionError, match="as text or as its id, not as 1.5"):
        eiffel.token_id(1.5)  # pyright: ignore[reportArgumentType]


def test_prompts_that_the_model_cannot_have_are_refused(gpt2: LanguageModel) -> None:
    with pytest.raises(PromptError):
        read_prompts(gpt2, [[1, 2], [100]])
    with pytest.raises(PromptError):
        read_prompts(gpt2, [[1] * 41])


def test_what_goes_with_a_prompt_is_not_left_out(eiffel: LanguageModel) -> None:
    ids = torch.tensor([[5, 6, 7]])
    embeddings = eiffel.load().get_input_embeddings()(ids).detach()  # pyright: ignore
    for given, name in (
        (embeddings, "inputs_embeds"),
        ({"inputs_embeds": embeddings}, "inputs_embeds"),
        ({"input_ids": ids, "position_ids": torch.tensor([[4, 5, 6]])}, "position_ids"),
        ({"input_ids": ids, "token_type_ids": torch.tensor([[0, 0, 1]])}, "token_type_ids"),
    ):
        with pytest.raises(PromptError, match=f"`{name}` would be left out"):
            read_prompts(eiffel, given)
    hidden = {"input_ids": ids, "attention_mask": torch.tensor([[1, 0, 1]])}
    with pytest.raises(PromptError, match="hides tokens between others"):
        read_prompts(eiffel, hidden)
    with pytest.raises(PromptError, match="mask of prompt 0 hides all"):
        read_prompts(eiffel, {**hidden, "attention_mask": torch.zeros_like(ids)})
    for mask, left in (([0, 0, 1], [7]), ([0, 1, 1], [6, 7]), ([1, 1, 0], [5, 6])):
        padded = {"input_ids": ids, "attention_mask": torch.tensor([mask])}
        assert read_prompts(eiffel, padded).ids[0].tolist() == left
    said = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}
    assert torch.equal(read_prompts(eiffel, said).ids[0], ids[0])
