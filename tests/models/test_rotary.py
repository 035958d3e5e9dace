"""Rotary embeddings that depend on the longest row of a forward see no neighbours."""

from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from insitu import LanguageModel
from insitu.models.rotary import LengthDependence
from tests.thinning import sampled

NEW = int(transformers.__version__.split(".")[0]) > 4
SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def longrope() -> Any:
    rope: dict[str, Any] = {
        "type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0],
    }  # fmt: skip
    if NEW:
        rope["rope_type"] = "longrope"
    torch.manual_seed(0)
    config = Phi3Config(
        **SIZES, max_position_embeddings=64, original_max_position_embeddings=16, rope_scaling=rope
    )
    return Phi3ForCausalLM(config).eval()


def dynamic() -> Any:
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 4.0}
    config = LlamaConfig(**SIZES, max_position_embeddings=16, rope_scaling=rope)
    module = LlamaForCausalLM(config).eval()
    module.config.max_position_embeddings = 64  # what the rotary embedding has is 16
    return module


def prompt(length: int) -> list[int]:
    draw = torch.Generator().manual_seed(length)
    return torch.randint(3, 60, (length,), generator=draw).tolist()


MODELS = {"longrope": longrope, "dynamic": dynamic}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "lengths",
    sampled([(8, 28), (28, 8), (20, 30, 25), (12, 16, 17), (30, 20, 8, 12, 20)], [(28, 8)]),
)
def test_a_prompt_is_what_it_is_alone_beside_longer_ones(
    name: str, lengths: tuple[int, ...]
) -> None:
    model, saved = LanguageModel(MODELS[name]()), []
    with model.trace() as tracer:
        for length in lengths:
            with tracer.invoke(prompt(length)):
                saved.append(model.lm_head.output.save())
    for length, logits in zip(lengths, saved, strict=True):
        with torch.no_grad():  # a fresh model: "dynamic" remembers the longest row
            expected = MODELS[name]()(torch.tensor([prompt(length)]), use_cache=False).logits
        torch.testing.assert_close(logits.value, expected, atol=1e-5, rtol=1e-5)
    short = sum(length <= 16 for length in lengths)
    long = {length for length in lengths if length > 16}
    passes = (1 if long else 0) if name == "longrope" else len(long)
    assert len(tracer.plan.passes) == passes + bool(short)


@pytest.mark.parametrize("name", sampled(MODELS, ["dynamic"]))
@pytest.mark.parametrize("lengths", sampled([(4, 7), (14, 9), (15, 20), (20, 26)], [(15, 20)]))
def test_a_generation_is_what_it_is_alone_in_all_its_steps(
    name: str, lengths: tuple[int, ...]
) -> None:
    model, saved, outputs = LanguageModel(MODELS[name]()), [], []
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with model.generate(**options) as generator:
        for length in lengths:
            with generator.invoke(prompt(length)) as invoker:
                outputs.append(invoker)
                saved.append([model.logits[:, -1].save() for _ in invoker.steps])
    for length, invoker, steps in zip(lengths, outputs, saved, strict=True):
        module = MODELS[name]()
        expected = module.generate(
            torch.tensor([prompt(length)]),
            attention_mask=torch.ones(1, length, dtype=torch.int64),
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        assert torch.equal(invoker.output, expected.sequences)
        for found, logits in zip(steps, expected.logits, strict=True):
            torch.testing.assert_close(found.value, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_one_prompt_on_both_sides_are_warned_of(name: str) -> None:
    model = LanguageModel(MODELS[name]())
    with pytest.warns(UserWarning, match="depend on the longest row"):
        with model.trace([prompt(8), prompt(28)]):
            model.lm_head.output.save()
    with model.trace([prompt(8), prompt(12)]):  # a warning would be an error
        logits = model.lm_head.output[0, -1].save()
    with torch.no_grad():
        expected = MODELS[name]()(torch.tensor([prompt(8)]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(logits.value, expected, atol=1e-5, rtol=1e-5)


def test_a_run_leaves_the_frequencies_as_they_were() -> None:
    module = dynamic()
    with torch.no_grad():
        module(torch.tensor([prompt(30)]), use_cache=False)
    part = module.model.rotary_emb
    before = (int(part.max_seq_len_cached), part.inv_freq.clone())
    model = LanguageModel(module)
    with model.trace(prompt(20)):
        found = model.lm_head.output.save()
    assert (int(part.max_seq_len_cached), part.inv_freq.tolist()) == (before[0], before[1].tolist())
    with torch.no_grad():
        expected = dynamic()(torch.tensor([prompt(20)]), use_cache=False).logits
    torch.testing.assert_close(found.value, expected, atol=1e-5, rtol=1e-5)


def test_prompts_share_on_one_side_in_all_steps() -> None:
    longrope, dynamic = LengthDependence(frozenset([16])), LengthDependence(grows=16)
    assert longrope.sharing(8) == longrope.sharing(16) != longrope.sharing(17)
    assert longrope.sharing(17) == longrope.sharing(30)
    assert longrope.sharing(14, 3) == longrope.sharing(8, 3)
    assert longrope.sharing(14, 4) != longrope.sharing(8, 4)
    assert dynamic.sharing(8) == dynamic.sharing(16) != dynamic.sharing(17) != dynamic.sharing(18)
    assert LengthDependence().sharing(5) == LengthDependence().sharing(500)
