"""How prompts of one batch choose their tokens, against a plain `generate` of each alone."""

from typing import Any

import pytest
import torch

from insitu import IndexOutOfRangeError, Job, LanguageModel, OptionError
from tests.conftest import tiny_gpt2
from tests.fidelity.architectures import make, tiny_t5
from tests.fidelity.test_steps_together import alone, assert_alike, prompts_of
from tests.models import kinds
from tests.thinning import sampled

NEW = 8
PLAIN: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": None, "do_sample": False}
DRAWN = {"do_sample": True}

pytestmark = pytest.mark.no_wire  # they count passes

OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {**DRAWN, "temperature": 3.0, "top_k": 0},
    "nuclei": {**DRAWN, "temperature": 2.0, "top_k": 20, "top_p": 0.8},
    "others that cut": {**DRAWN, "min_p": 0.02, "typical_p": 0.9, "epsilon_cutoff": 0.001},
    "eta": {**DRAWN, "eta_cutoff": 0.01, "renormalize_logits": True},
    "repetitions": {"repetition_penalty": 1.8},
    "repetitions that are drawn": {**DRAWN, "repetition_penalty": 1.8, "top_k": 5},
    "n-grams": {"no_repeat_ngram_size": 2},
    "a word": {"bad_words_ids": [[22], [3, 14]]},
    "least length": {"eos_token_id": [22, 67, 5], "min_length": 9},
    "least new": {"eos_token_id": [22, 67, 5], "min_new_tokens": 3},
    "a forced end": {"forced_eos_token_id": 7},
    "decay": {"eos_token_id": 22, "exponential_decay_length_penalty": (2, 1.5)},
    "suppressed": {"suppress_tokens": [22, 5], "begin_suppress_tokens": [67, 1]},
    "a bias": {"sequence_bias": [[[22], -4.0], [[3, 67], 6.0]]},
    "a length in all": {"max_length": 12},
    "what no number is": {"remove_invalid_values": True},
}


def compare(
    model: LanguageModel,
    prompts: list[torch.Tensor],
    options: dict[str, Any],
) -> list[torch.Tensor]:
    """Compares the tokens of a batch with those of each prompt alone, and returns them."""
    invokers = []
    state = torch.get_rng_state()
    with model.generate(**options) as generator:
        for seed, ids in enumerate(prompts):
            with generator.invoke(ids, seed=seed) as invoker:
                invokers.append(invoker)
    assert torch.equal(state, torch.get_rng_state())
    assert len(generator.plan.passes) == 1, generator.plan.explain()
    for seed, (ids, invoker) in enumerate(zip(prompts, invokers, strict=True)):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            mask = torch.ones_like(ids)
            expected: Any = model.module.generate(ids, attention_mask=mask, **options)
        assert torch.equal(invoker.output, expected), (seed, invoker.output, expected)
    return [invoker.output for invoker in invokers]


@pytest.mark.parametrize(
    "option",
    sampled(OPTIONS, ["temperature", "repetitions"]),
)
def test_each_prompt_chooses_as_it_does_alone(option: str) -> None:
    model = LanguageModel(tiny_gpt2())
    options = {**PLAIN, **OPTIONS[option]}
    if "max_length" in options:
        del options["max_new_tokens"]
    prompts = [*prompts_of(model, (4, 1, 9, 6)), *prompts_of(model, (5,), rows=2)]
    found = compare(model, prompts, options)
    if option not in ("what no number is", "a length in all"):  # the option does something here
        plain = [alone(model, ids, "lm_head", **PLAIN)[0] for ids in prompts]
        assert any(not torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"encoder_repetition_penalty": 3.0},
        pytest.param({"encoder_no_repeat_ngram_size": 1}, marks=pytest.mark.thorough),
        pytest.param(
            {"forced_bos_token_id": 9, "no_repeat_ngram_size": 1}, marks=pytest.mark.thorough
        ),
        pytest.param({"repetition_penalty": 2.0, "do_sample": True}, marks=pytest.mark.thorough),
        {"max_length": 6},
    ],
)
def test_decoders_choose_as_they_do_alone(options: dict[str, Any]) -> None:
    model = LanguageModel(kinds.ready(tiny_t5))
    plain = {**PLAIN, **options}
    if "max_length" in plain:
        del plain["max_new_tokens"]
    compare(model, prompts_of(model), plain)


def test_prompts_of_one_length_choose_as_they_do_alone() -> None:
    model = LanguageModel(tiny_gpt2())
    options = {**PLAIN, **DRAWN, "repetition_penalty": 1.8, "temperature": 1.5}
    compare(model, prompts_of(model, (5, 5, 5)), options)


def test_padding_of_a_prompt_of_several_rows_is_what_its_processors_see_alone() -> None:
    model = LanguageModel(tiny_gpt2())
    options = {**PLAIN, "no_repeat_ngram_size": 1}
    ragged = [[5, 6, 7, 8], [9, 10]]
    with pytest.warns(UserWarning, match="counts padding"), model.generate(**options) as generator:
        with generator.invoke(ragged) as several:
            pass
        with generator.invoke([[3, 4, 5, 6, 7, 8]]) as one:
            pass
    assert len(generator.plan.passes) == 1
    ids = torch.tensor([[5, 6, 7, 8], [model.traits.pad_id, model.traits.pad_id, 9, 10]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    plain: Any = model.module
    given = {**options, "pad_token_id": model.traits.pad_id}
    assert torch.equal(several.output, plain.generate(ids, attention_mask=mask, **given))
    long = torch.tensor([[3, 4, 5, 6, 7, 8]])
    assert torch.equal(
        one.output, plain.generate(long, attention_mask=mask.new_ones(1, 6), **given)
    )


@pytest.mark.parametrize("ends", sampled([None, 0], [None]))
def test_strings_end_each_prompt_for_itself(ends: int | None) -> None:
    model = make("eiffel")
    texts = ["The Eiffel Tower is in the city of", "Rome is in", "The Louvre is in the city of"]
    options = {**PLAIN, "eos_token_id": ends, "stop_strings": ["Paris", "aly."]}
    options["tokenizer"] = model.tokenizer
    invokers, chosen = [], []
    with model.generate(**options) as generator:
        for text in texts:
            with generator.invoke(text) as invoker, generator.every_step():
                chosen.append(invoker.tokens().save())
            invokers.append(invoker)
    assert len(generator.plan.passes) == 1
    lengths = set()
    for text, invoker, tokens in zip(texts, invokers, chosen, strict=True):
        given = model.tokenizer(text, return_tensors="pt")
        plain: Any = model.module
        expected = plain.generate(**given, pad_token_id=model.traits.pad_id, **options)
        assert torch.equal(invoker.output, expected)
        new = expected[0, given.input_ids.shape[1] :].tolist()
        assert [int(token) for token in tokens.value] == new
        lengths.add(len(new))
    assert len(lengths) > 1 and max(lengths) <= NEW


def test_prompts_without_seeds_draw_what_one_plain_batch_draws() -> None:
    model = LanguageModel(tiny_gpt2())
    prompts = prompts_of(model)
    options = {**PLAIN, **DRAWN, "temperature": 1.5}
    torch.manual_seed(5)
    with model.generate(**options) as generator:
        for ids in prompts:
            with generator.invoke(ids):
                pass
    after = torch.get_rng_state()
    length = max(ids.shape[1] for ids in prompts)
    pads = [length - ids.shape[1] for ids in prompts]
    pad = torch.nn.functional.pad
    ids = torch.cat(
        [pad(i, (n, 0), value=model.traits.pad_id) for i, n in zip(prompts, pads, strict=True)]
    )
    mask = torch.cat([pad(torch.ones_like(i), (n, 0)) for i, n in zip(prompts, pads, strict=True)])
    torch.manual_seed(5)
    plain: Any = model.module
    expected = plain.generate(ids, attention_mask=mask, pad_token_id=model.traits.pad_id, **options)
    assert torch.equal(generator.output, expected)
    assert torch.equal(after, torch.get_rng_state())


def test_a_prompt_with_a_seed_draws_alike_beside_others_without() -> None:
    model = LanguageModel(tiny_gpt2())
    one, other = prompts_of(model, (3, 6))
    options = {**PLAIN, **DRAWN}
    found = []
    for _ in range(2):
        with model.generate(**options) as generator:
            with generator.invoke(other):
                pass
            with generator.invoke(one, seed=4) as invoker:
                found.append(invoker)
        assert len(generator.plan.passes) == 1
    torch.manual_seed(4)
    expected = alone(model, one, "lm_head", **options)[0]
    assert all(torch.equal(invoker.output, expected) for invoker in found)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"prompt_lookup_num_tokens": 2, "eos_token_id": 99}, "prompt_lookup_num_tokens"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"max_time": 100.0}, "max_time"),
        ({"logits_processor": [lambda ids, scores: scores]}, "logits_processor"),
        ({"stopping_criteria": [lambda ids, scores, **_: ids[:, -1] == 3]}, "stopping_criteria"),
    ],
)
@pytest.mark.parametrize("way", ["option", "config"])
def test_what_prompts_do_not_share_is_named_in_the_plan(
    options: dict[str, Any], why: str, way: str
) -> None:
    model = LanguageModel(tiny_gpt2())
    module: Any = model.module
    given = dict(PLAIN)
    if way == "config" and why not in ("logits_processor", "stopping_criteria"):
        for name, value in options.items():
            setattr(module.generation_config, name, value)
            given.pop(name, None)
    else:
        given |= options
    with model.generate(**given) as generator:
        for ids in prompts_of(model, (3, 5)):
            with generator.invoke(ids):
                pass
    assert len(generator.plan.passes) == 2
    assert f"with `{why}`" in generator.plan.explain()


def test_each_prompt_may_have_a_number_of_steps_of_its_own() -> None:
    model = LanguageModel(tiny_gpt2())
    prompts = prompts_of(model, (4, 1, 9, 6))
    counts = [3, 7, 1, None]
    invokers, saved, last = [], [], []
    with model.generate(**{**PLAIN, "max_new_tokens": 5, "no_repeat_ngram_size": 2}) as generator:
        for ids, count in zip(prompts, counts, strict=True):
            with generator.invoke(ids, max_new_tokens=count) as invoker:
                with invoker.every_step():
                    saved.append(model.lm_head.output[:, -1].save())
                with invoker.step((count or 5) - 1):
                    last.append(model.lm_head.output[:, -1].save())
                assert list(invoker.steps) == list(range(count or 5))
                with pytest.raises((IndexOutOfRangeError, OptionError)):
                    invoker.step(count or 5)
            invokers.append(invoker)
    assert len(generator.plan.passes) == 1
    for at, (ids, count) in enumerate(zip(prompts, counts, strict=True)):
        options = {**PLAIN, "max_new_tokens": count or 5, "no_repeat_ngram_size": 2}
        tokens, seen = alone(model, ids, "lm_head", **options)
        assert torch.equal(invokers[at].output, tokens)
        assert_alike(saved[at].value, [value[:, -1] for value in seen])
        torch.testing.assert_close(last[at].value, seen[-1][:, -1])
    width = 9 + max(len(values.value) for values in saved)
    assert generator.output.shape[0] == 4 and generator.output.shape[1] <= width
    for row, invoker, ids in zip(generator.output, invokers, prompts, strict=True):
        start = 9 - ids.shape[1]
        own = invoker.output[0]
        assert torch.equal(row[start : start + len(own)], own)
    with pytest.raises(OptionError, match="at least 1") as caught:
        with model.generate(**PLAIN) as generator:
            generator.invoke(prompts[0], max_new_tokens=0)  # the line to find
    assert "the line to find" in str(caught.value)


def test_edits_hold_in_every_step_of_a_prompt_with_more_steps_than_the_block() -> None:
    model = LanguageModel(tiny_gpt2())
    ids = prompts_of(model, (4,))[0]
    with model.edit() as edited:
        model.transformer.h[0].output[0][:] *= 0.5
    with edited.generate(**{**PLAIN, "max_new_tokens": 1}) as generator:
        with generator.invoke(ids, max_new_tokens=4) as invoker:
            pass
    halve = {"transformer.h.0": lambda step, value: value * 0.5}
    tokens, _ = alone(model, ids, "lm_head", halve, **{**PLAIN, "max_new_tokens": 4})
    assert torch.equal(invoker.output, tokens)


def test_a_row_that_has_ended_takes_no_position_that_there_is_not() -> None:
    model = LanguageModel(tiny_gpt2())
    context = model.config.n_positions
    long, short = prompts_of(model, (context - 2, 3))
    invokers = []
    with model.generate(**PLAIN) as generator:
        for ids, count in ((long, 2), (short, 9)):
            with generator.invoke(ids, max_new_tokens=count) as invoker:
                invokers.append(invoker)
    for ids, count, invoker in zip((long, short), (2, 9), invokers, strict=True):
        expected = alone(model, ids, "lm_head", **{**PLAIN, "max_new_tokens": count})[0]
        assert torch.equal(invoker.output, expected)


def test_a_batch_has_no_more_tokens_than_the_block_allows() -> None:
    model = LanguageModel(tiny_gpt2())
    prompts = prompts_of(model, (4, 9, 5, 10, 4))
    invokers = []
    with model.generate(**PLAIN, max_tokens_per_pass=3 * (5 + NEW)) as generator:
        for ids in prompts:
            with generator.invoke(ids) as invoker, generator.every_step():
                model.transformer.h[1].output[0][:, -1] *= 2.0
            invokers.append(invoker)
    assert [list(one.invocations) for one in generator.plan.passes] == [[0, 2, 4], [1, 3]]
    double = {
        "transformer.h.1": lambda step, value: torch.cat([value[:, :-1], value[:, -1:] * 2], 1)
    }
    outputs = [alone(model, ids, "lm_head", double, **PLAIN)[0] for ids in prompts]
    for invoker, expected in zip(invokers, outputs, strict=True):
        assert torch.equal(invoker.output, expected)
    for row, expected in zip(generator.output, outputs, strict=True):
        assert torch.equal(row[10 + NEW - expected.shape[1] :], expected[0])
    with pytest.raises(OptionError, match="whole number from 1"):
        model.generate(**PLAIN, max_tokens_per_pass=0)


@pytest.mark.thorough
def test_a_job_holds_each_prompts_own_steps_and_the_budget_of_the_block() -> None:
    model = LanguageModel(tiny_gpt2())
    prompts = prompts_of(model, (3, 5))
    options = {**PLAIN, "do_sample": True, "max_tokens_per_pass": 64}
    with model.scan(generate=True, **options) as generator:
        for number, ids in enumerate(prompts):
            with generator.invoke(ids, seed=number, max_new_tokens=number + 2) as invoker:
                with invoker.every_step():
                    model.lm_head.output[:, -1].save(f"of {number}")
    assert len(generator.plan.passes) == 1
    results = model.run(Job.from_bytes(generator.job.to_bytes()))
    del options["max_tokens_per_pass"]
    for number, ids in enumerate(prompts):
        torch.manual_seed(number)
        given = {**options, "max_new_tokens": number + 2}
        _, seen = alone(model, ids, "lm_head", **given)
        assert_alike(results[f"of {number}"], [value[:, -1] for value in seen])
