"""Patterns and scores of heads, beside what Hugging Face's models say of their attention."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from insitu import LanguageModel, OptionError, PromptError
from insitu.methods import Result, attention_patterns, head_scores
from insitu.methods.random_tokens import repeated_tokens
from tests.conftest import tiny_gpt2
from tests.fidelity.zoo import ZOO, module_of
from tests.thinning import sampled

pytestmark = [
    pytest.mark.no_wire,  # the methods write nothing that other tests do not send
    pytest.mark.filterwarnings("ignore:Attention scores and patterns"),
]

FIRST = [5, 17, 42, 5, 17, 23, 5]
SECOND = [31, 7, 31]
# The layers that have attention.
LAYERS = {"gpt2": None, "llama": None, "bert": None, "t5": None, "jamba": [1], "qwen3-next": [1]}
THERE = [name for name in LAYERS if name in ZOO]


@cache
def kept(name: str) -> LanguageModel:
    return LanguageModel(module_of(name))


@cache
def eager(name: str) -> Any:
    module = module_of(name)
    module.set_attn_implementation("eager")
    return module


def seen(module: Any, ids: list[int]) -> torch.Tensor:
    """Patterns as the model itself gives them, `(layer, head, query, key)`."""
    given: dict[str, Any] = {"input_ids": torch.tensor([ids]), "output_attentions": True}
    if module.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        output = module(**given)
    found = output.encoder_attentions if module.config.is_encoder_decoder else output.attentions
    return torch.cat([layer for layer in found if layer is not None])


@pytest.mark.parametrize("name", sampled(THERE, ["llama", "bert"]))
def test_patterns_are_those_of_hugging_face(name: str) -> None:
    module = eager(name)
    result = attention_patterns(kept(name), [FIRST, SECOND])
    assert [axis.name for axis in result.axes] == ["prompt", "layer", "head", "query", "key"]
    for row, ids in enumerate([FIRST, SECOND]):
        expected = seen(module, ids)
        found = result.values[row, ..., : len(ids), : len(ids)]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert result.values[1, ..., len(SECOND) :, :].isnan().all()
    assert result.values[1, ..., len(SECOND) :].isnan().all()
    numbers = LAYERS[name] or range(result.sizes["layer"])
    assert result.axis("layer").labels == tuple(map(str, numbers))


def test_layers_and_heads_are_chosen() -> None:
    module = eager("gpt2")
    result = attention_patterns(kept("gpt2"), FIRST, layers=[-1, 0], heads=[2, -1])
    last = len(seen(module, FIRST)) - 1
    expected = seen(module, FIRST)[[last, 0]][:, [2, 3]]
    torch.testing.assert_close(result.values, expected, rtol=1e-4, atol=1e-6)
    assert result.axis("layer").labels == (str(last), "0")
    assert result.axis("head").labels == ("2", "3")


def by_hand(pattern: torch.Tensor, ids: list[int], kind: str) -> tuple[float, int]:
    """The attention of a head that goes where a kind's does, and from how many queries."""
    total, queries = 0.0, 0
    for query in range(len(ids)):
        if kind == "previous token":
            keys = {query - 1} & set(range(query))
        else:
            shift = {"induction": 1, "duplicate token": 0}[kind]
            before = [key for key in range(query) if ids[key] == ids[query]]
            keys = {key + shift for key in before} & set(range(query))
        total += sum(float(pattern[query, key]) for key in keys)
        queries += bool(keys)
    return total, queries


@pytest.mark.parametrize(
    "name", sampled(["gpt2", "llama", "bert", "jamba"], ["gpt2", "llama", "bert"])
)
def test_scores_are_those_computed_by_hand(name: str) -> None:
    module = eager(name)
    result = head_scores(kept(name), [FIRST, SECOND])
    patterns = [seen(module, FIRST), seen(module, SECOND)]
    layers, heads = patterns[0].shape[:2]
    assert list(result.sizes.items()) == [("kind", 3), ("layer", layers), ("head", heads)]
    for row, kind in enumerate(result.axis("kind").labels):
        for layer in range(layers):
            for head in range(heads):
                pairs = [
                    by_hand(pattern[layer, head], ids, kind)
                    for pattern, ids in zip(patterns, [FIRST, SECOND], strict=True)
                ]
                total, queries = map(sum, zip(*pairs, strict=True))
                assert float(result.values[row, layer, head]) == pytest.approx(
                    total / queries, abs=1e-5
                )
                assert int(result.details["queries"][row]) == queries


def test_heads_that_do_one_thing_only_have_a_score_of_one() -> None:
    module = tiny_gpt2()
    module.config._attn_implementation = "eager"
    model = LanguageModel(module)
    ids = [5, 6, 7, 8, 5, 6, 7, 8]
    made = torch.zeros(1, 4, 8, 8)
    for query in range(8):
        made[0, 0, query, max(query - 1, 0)] = 1  # the token before
        made[0, 1, query, query - 3 if query > 3 else 0] = 1  # what came after the same
        made[0, 2, query, query - 4 if query > 3 else 0] = 1  # the same
        made[0, 3, query, : query + 1] = 1 / (query + 1)  # all alike
    with model.edit() as edited:
        model.blocks[2].attention.pattern = made
    scores = head_scores(edited, ids, layers=2)
    alike = [
        sum(1 / (query + 1) for query in range(4, 8)) / 4,
        sum(1 / (query + 1) for query in range(1, 8)) / 7,
        sum(1 / (query + 1) for query in range(4, 8)) / 4,
    ]
    expected = torch.tensor([[0, 1, 0, alike[0]], [1, 0, 0, alike[1]], [0, 0, 1, alike[2]]])
    # Position 1 can look at the first only, so the two others do what the first head does.
    expected[1, 1] = expected[1, 2] = 1 / 7
    torch.testing.assert_close(scores.values[:, 0], expected, rtol=1e-5, atol=1e-6)


def test_random_tokens_come_twice_and_are_the_same_for_a_seed(eiffel: LanguageModel) -> None:
    ids = repeated_tokens(eiffel, length=6, count=3, repeats=3, seed=1)
    assert ids.shape == (3, 18)
    assert torch.equal(ids[:, :6], ids[:, 6:12]) and torch.equal(ids[:, :6], ids[:, 12:])
    assert all(len(set(row.tolist())) == 6 for row in ids)
    assert not set(ids.flatten().tolist()) & set(eiffel.tokenizer.all_special_ids)
    assert torch.equal(ids, repeated_tokens(eiffel, length=6, count=3, repeats=3, seed=1))
    assert not torch.equal(ids, repeated_tokens(eiffel, length=6, count=3, repeats=3, seed=2))


@pytest.mark.thorough
def test_scores_of_the_bundled_model_are_those_of_its_own_patterns(eiffel: LanguageModel) -> None:
    found = head_scores(eiffel, kinds="induction", length=12, count=3, seed=4)
    module = LanguageModel("insitu/eiffel", attn_implementation="eager").load()
    totals = 0
    for row in repeated_tokens(eiffel, length=12, count=3, seed=4):
        pattern = seen(module, row.tolist())
        totals = totals + pattern.diagonal(-11, -2, -1)[..., 1:].sum(-1)
    torch.testing.assert_close(found.values, totals / 36, rtol=1e-4, atol=1e-5)
    assert int(found.details["queries"]) == 36


def test_one_kind_is_no_axis_and_heads_can_be_chosen() -> None:
    patterns = [seen(eager("llama"), FIRST), seen(eager("llama"), SECOND)]
    found = head_scores(kept("llama"), [FIRST, SECOND], kinds="induction", heads=[2, -4], layers=1)
    assert list(found.sizes.items()) == [("layer", 1), ("head", 2)]
    assert found.axis("head").labels == ("2", "0")
    for place, head in enumerate((2, 0)):
        pairs = [
            by_hand(pattern[1, head], ids, "induction")
            for pattern, ids in zip(patterns, [FIRST, SECOND], strict=True)
        ]
        total, queries = map(sum, zip(*pairs, strict=True))
        assert float(found.values[0, place]) == pytest.approx(total / queries, abs=1e-5)
    several = head_scores(kept("llama"), [FIRST, SECOND], kinds=["induction"], heads=2, layers=1)
    assert several.sizes == {"kind": 1, "layer": 1, "head": 1}
    assert several.select(kind="induction").values.item() == pytest.approx(
        found.values[0, 0].item()
    )
    assert several.details["queries"].tolist() == [int(found.details["queries"])]


def test_results_are_kept(eiffel: LanguageModel, tmp_path: Path) -> None:
    result = attention_patterns(eiffel, "The Eiffel Tower", layers=1)
    assert result.axis("query").labels == ("The", " Eiffel", " Tower")
    result.save(tmp_path / "patterns")
    assert torch.equal(Result.load(tmp_path / "patterns").values, result.values)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda model: attention_patterns(model, FIRST, layers=9), OptionError, "no layer 9"),
        (lambda model: attention_patterns(model, FIRST, heads=4), OptionError, "no head 4"),
        (lambda model: head_scores(model, kinds="indcution"), OptionError, "'induction'"),
        (lambda model: head_scores(model, kinds=[]), OptionError, "`kinds` is empty"),
        (lambda model: head_scores(model, kinds=["induction"] * 2), OptionError, "named once"),
        (lambda model: head_scores(model, heads=99), OptionError, "no head 99"),
        (lambda model: head_scores(model, [1, 2, 3]), PromptError, "'induction'"),
        (lambda model: head_scores(model, [1, 1], kinds="induction"), PromptError, "induction"),
        (lambda model: head_scores(model, length=1), OptionError, "`length`"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as raised:
        call(kept("gpt2"))
    assert Path(__file__).name in str(raised.value)


def test_layers_without_attention_say_so() -> None:
    model = kept("jamba")
    with pytest.raises(OptionError, match="there is no attention in this block"):
        attention_patterns(model, FIRST, layers=[0, 1])
    with pytest.raises(OptionError, match=r"No layer has `attention\.pattern`"):
        attention_patterns(LanguageModel(module_of("mamba")), FIRST)
