from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from insitu import InsituError, LanguageModel, OptionError
from tests.conftest import tiny_gpt2
from tests.thinning import sampled

IDS = torch.tensor([[3, 14, 15, 92, 65]])
RAGGED = [[3, 14, 15, 92, 65], [7, 8], [9, 10, 11]]


def generated(model: LanguageModel, rows: list[list[int]], **options: Any) -> torch.Tensor:
    """The oracle: Hugging Face's own `generate` on rows padded by hand, with what it pads with."""
    module: Any = model.module
    length, config = max(map(len, rows)), module.generation_config
    end = options.get("eos_token_id", config.eos_token_id)
    pad = next(one for one in (config.pad_token_id, end, model.traits.pad_id) if one is not None)
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return module.generate(ids, attention_mask=mask, **options)


def test_output_is_what_generate_returns(language_model: LanguageModel) -> None:
    with language_model.generate(max_new_tokens=5) as generator, generator.invoke(IDS) as invoker:
        pass
    expected = generated(language_model, IDS.tolist(), max_new_tokens=5)
    assert torch.equal(generator.output, expected) and torch.equal(invoker.output, expected)


@pytest.mark.parametrize("language_model", sampled(["gpt2", "llama"], ["gpt2"]), indirect=True)
def test_several_invocations_give_what_one_generate_on_all_returns(
    language_model: LanguageModel,
) -> None:
    with language_model.generate(max_new_tokens=5) as generator:
        invokers = []
        for row in RAGGED:
            with generator.invoke(row) as invoker:
                invokers.append(invoker)
    assert torch.equal(generator.output, generated(language_model, RAGGED, max_new_tokens=5))
    for row, invoker in zip(RAGGED, invokers, strict=True):
        assert torch.equal(invoker.output, generated(language_model, [row], max_new_tokens=5))


def test_an_invocation_that_ends_early_has_no_padding(gpt2: LanguageModel) -> None:
    alone = [generated(gpt2, [row], max_new_tokens=6, eos_token_id=None)[0] for row in RAGGED]
    end = int(alone[1][len(RAGGED[1]) + 2])  # ends the second prompt early
    options = {"max_new_tokens": 6, "eos_token_id": end}
    with gpt2.generate(**options) as generator:
        invokers = []
        for row in RAGGED:
            with generator.invoke(row) as invoker:
                invokers.append(invoker)
    lengths = set()
    for row, invoker in zip(RAGGED, invokers, strict=True):
        expected = generated(gpt2, [row], **options)
        assert torch.equal(invoker.output, expected)
        lengths.add(expected.shape[1] - len(row))
    assert len(lengths) > 1
    assert torch.equal(generator.output, generated(gpt2, RAGGED, **options))


@pytest.mark.parametrize("language_model", sampled(["gpt2", "llama"], ["gpt2"]), indirect=True)
def test_values_of_an_invocation_are_as_if_it_ran_alone(language_model: LanguageModel) -> None:
    """Every site of every module, in a batch of prompts of different length."""
    paths = []
    module = language_model.module
    handles = [
        part.register_forward_hook(lambda *_, path=path: paths.append(path))
        for path, part in module.named_modules()
    ]
    module.generate(IDS, max_new_tokens=1, pad_token_id=0)
    for handle in handles:
        handle.remove()

    def handle_of(path: str):
        found = language_model
        for part in path.split("."):
            found = found[int(part)] if part.isdigit() else found[part]
        return found

    leaves = sorted({path for path in paths if path} - {"model", "transformer"})
    leaves = [path for path in leaves if "rotary" not in path]
    for run in (language_model.trace, lambda: language_model.generate(max_new_tokens=2)):
        together, alone = [], []
        with run() as tracer:
            for row in RAGGED:
                with tracer.invoke(row):
                    together.append({path: handle_of(path).output.save() for path in leaves})
        for row in RAGGED:
            with run() as tracer, tracer.invoke(row):
                alone.append({path: handle_of(path).output.save() for path in leaves})
        for mine, theirs in zip(together, alone, strict=True):
            for path in leaves:
                torch.testing.assert_close(
                    mine[path].value, theirs[path].value, atol=1e-5, rtol=1e-5, msg=path
                )


@pytest.mark.no_wire  # it counts passes
def test_a_batch_is_one_pass(gpt2: LanguageModel) -> None:
    gpt2.trace([1, 2])  # not entered: nothing
    with gpt2.trace() as tracer:
        for row in RAGGED:
            with tracer.invoke(row) as invoker:
                invoker.output.logits.save()
                gpt2.transformer.h[1].attn.output[0].save()
    assert [one.rows for one in tracer.plan.passes] == [len(RAGGED)]


def test_sampling_depends_on_the_seed_of_the_invocation_alone(gpt2: LanguageModel) -> None:
    options = {"max_new_tokens": 8, "do_sample": True, "eos_token_id": None}

    def sample(seeds: list[int]) -> list[list[int]]:
        torch.manual_seed(99)
        with gpt2.generate(**options) as generator:
            invokers = []
            for seed in seeds:
                with generator.invoke(IDS, seed=seed) as invoker:
                    invokers.append(invoker)
        assert generator.output.shape == (len(seeds), 13)
        return [invoker.output[0].tolist() for invoker in invokers]

    first, second = sample([1, 2])
    assert sample([2, 1, 3])[:2] == [second, first]
    assert first != second
    torch.manual_seed(1)
    expected = gpt2.module.generate(
        IDS, attention_mask=torch.ones_like(IDS), pad_token_id=gpt2.traits.pad_id, **options
    )
    assert first == expected[0].tolist()
    state = torch.get_rng_state()
    with gpt2.generate(IDS, seed=5, **options):
        pass
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("steps", [0, -1, 1.5, "3", True])
def test_a_number_of_tokens_that_is_none_is_refused_at_once(gpt2, steps) -> None:
    with pytest.raises(OptionError, match="at least 1") as caught:
        gpt2.generate(max_new_tokens=steps)
    assert __file__ in str(caught.value)


def test_options_belong_to_generate(gpt2: LanguageModel) -> None:
    with gpt2.generate(max_new_tokens=1) as generator:
        with pytest.raises(OptionError, match="give it to `generate`"):
            generator.invoke(IDS, temperature=2)
        generator.invoke(IDS)
    with gpt2.trace() as tracer:
        with pytest.raises(OptionError, match="`top_k`: it is an option of `generate`"):
            tracer.invoke(IDS, top_k=2)
        tracer.invoke(IDS)


def test_beams_and_dictionaries_come_through(gpt2: LanguageModel) -> None:
    options = {"max_new_tokens": 3, "num_beams": 3, "num_return_sequences": 2, "eos_token_id": None}
    with gpt2.generate(**options) as generator:
        with generator.invoke(IDS) as first:
            hidden = gpt2.transformer.h[0].output[0].save()
        with generator.invoke([[7, 8]]) as second:
            pass
    assert torch.equal(first.output, generated(gpt2, IDS.tolist(), **options))
    assert torch.equal(second.output, generated(gpt2, [[7, 8]], **options))
    assert generator.output.shape == (4, 8) and hidden.shape == (3, 5, 16)
    with gpt2.generate(IDS, max_new_tokens=2, return_dict_in_generate=True) as generator:
        pass
    assert generator.output.sequences.shape == (1, 7)
    with pytest.raises(InsituError, match="return_dict_in_generate"):
        with gpt2.generate(
            max_new_tokens=2, num_beams=2, return_dict_in_generate=True
        ) as generator:
            for row in RAGGED:
                with generator.invoke(row):
                    pass


@pytest.mark.no_wire  # it counts passes
def test_a_model_in_training_mode_runs_its_invocations_one_by_one(gpt2: LanguageModel) -> None:
    gpt2.module.train()
    shapes = []
    gpt2.module.transformer.h[0].register_forward_pre_hook(
        lambda mod, args: shapes.append(tuple(args[0].shape))
    )
    with pytest.warns(UserWarning, match="one by one"), gpt2.trace() as tracer:
        for row in RAGGED:
            with tracer.invoke(row):
                gpt2.transformer.h[0].output[0].save()
    assert shapes == [(1, 5, 16), (1, 2, 16), (1, 3, 16)]


def test_without_a_cache_a_block_gives_its_hidden_states_only(gpt2: LanguageModel) -> None:
    gpt2.module.generation_config.use_cache = False
    with gpt2.generate(IDS, max_new_tokens=2):
        output = gpt2.transformer.h[0].output
        assert output.shape == ((1, 5, 16),)
        output = output.save()
    assert len(output.value) == 1


def test_a_total_length_counts_no_padding(gpt2: LanguageModel) -> None:
    options = {"max_length": 9, "eos_token_id": None}
    with gpt2.generate(**options) as generator:
        invokers = []
        for row in RAGGED:
            with generator.invoke(row) as invoker:
                invokers.append(invoker)
    for row, invoker in zip(RAGGED, invokers, strict=True):
        assert torch.equal(invoker.output, generated(gpt2, [row], **options))


@pytest.mark.parametrize("way", sampled(["option", "config", "the model's own config"], ["config"]))
def test_what_ended_is_padded_with_the_id_that_is_set(way: str) -> None:
    model = LanguageModel(tiny_gpt2())
    module: Any = model.module
    rows = [*RAGGED, [9, 8]]
    alone = [generated(model, [row], max_new_tokens=6, eos_token_id=None)[0] for row in rows]
    options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": int(alone[1][3])}
    if way == "option":
        options["pad_token_id"] = 7
    elif way == "config":
        options["generation_config"] = GenerationConfig(pad_token_id=7)
    else:
        module.generation_config.pad_token_id = 7
    length = max(map(len, rows))
    ids = torch.tensor([[7] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    expected = module.generate(ids, attention_mask=mask, **options)
    assert (expected[1, length:] == 7).any()
    with model.generate(**options) as generator:
        for row in rows:
            with generator.invoke(row):
                pass
    assert torch.equal(generator.output, expected)
