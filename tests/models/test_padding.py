"""Rows of one prompt are what they are alone, wherever the padding is."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForMaskedLM,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from insitu import Job, LanguageModel, PromptError
from tests.conftest import tiny_gpt2, tiny_llama
from tests.fidelity.zoo import ZOO, module_of, spread_out
from tests.thinning import sampled

ROWS = [[11, 12, 13, 14, 15, 16, 17, 18, 19], [21, 22, 23], [31]]
TEXTS = [name for name, one in ZOO.items() if one.takes_text and one.kind != "encoder-decoder"]
RIGHT = {"rwkv"}  # which has no mask
# With Transformers 4 padding changes its chunks, on either side.
IN_PIECES = {"zamba2"} if transformers.__version__.startswith("4.") else set[str]()
RIGHT |= IN_PIECES


def alone(module: Any, row: list[int]) -> torch.Tensor:
    """The oracle: what a plain forward of one row gives."""
    with torch.no_grad():
        return module(torch.tensor([row])).logits[0]


def at(model: LanguageModel, path: str) -> Any:
    """The handle of a module."""
    handle: Any = model
    for part in path.split("."):
        handle = handle[int(part)] if part.isdigit() else getattr(handle, part)
    return handle


def at_blocks(module: Any, paths: list[str], **inputs: Any) -> list[torch.Tensor]:
    """The oracle: what plain hooks see leave some modules."""
    seen: list[torch.Tensor] = []
    handles = [
        module.get_submodule(path).register_forward_hook(
            lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        for path in paths
    ]
    try:
        with torch.no_grad():
            module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.filterwarnings("ignore:.*does not hide padding", "ignore:The pieces of some layers")
@pytest.mark.parametrize("name", TEXTS)
def test_each_row_of_a_list_is_what_it_is_alone(name: str) -> None:
    module, one = module_of(name), ZOO[name]
    model = LanguageModel(module)
    paths = one.stacks_in(module)
    last = f"{paths[-1]}.{len(module.get_submodule(paths[-1])) - 1}"
    rows = [one.inputs(1, length, length)["input_ids"][0].tolist() for length in (9, 3, 1)]
    with model.trace(rows) as tracer:
        hidden = at(model, last).output[0].save()
        logits = model.output["logits"].save()
        final = model.output["logits"][:, -1].save()
    for number, row in enumerate(rows):
        own = tracer.mask[number].bool()
        inputs = {"input_ids": torch.tensor([row])}
        expected = at_blocks(module, [last], **inputs)[0][0]
        scale = float(expected.abs().max())
        limit = 1e-3 if name in IN_PIECES else 2e-5  # as the warning says
        assert (hidden.value[number][own] - expected).abs().max() <= limit * scale, number
        with torch.no_grad():
            expected = module(**inputs).logits[0]
        scale = float(expected.abs().max())
        assert (logits.value[number][own] - expected).abs().max() <= limit * scale, number
        if one.kind == "decoder" and tracer.mask[1, 0] == 0:
            assert (final.value[number] - expected[-1]).abs().max() <= limit * scale, number
    left = tracer.mask[1].tolist() == [0] * 6 + [1] * 3
    assert left == (one.kind == "decoder" and name not in RIGHT)


def test_a_model_that_cannot_be_padded_on_the_left_says_so_once() -> None:
    model = LanguageModel(module_of("rwkv"))
    with pytest.warns(UserWarning, match="does not hide padding before a prompt"):
        with model.trace(ROWS) as tracer:
            model.output["logits"].save()
    assert tracer.mask[1].tolist() == [1, 1, 1] + [0] * 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.trace(ROWS):
            model.output["logits"].save()


@pytest.mark.filterwarnings("ignore:RwkvForCausalLM does not hide padding")
def test_a_job_is_refused_by_a_model_that_pads_on_another_side(tmp_path: Path) -> None:
    module: Any = module_of("rwkv")
    module.save_pretrained(tmp_path)
    model = LanguageModel(tmp_path)
    with model.scan(ROWS) as tracer:  # without weights, by what its structure lets one suppose
        model.output["logits"].save("logits")
    job = Job.from_bytes(tracer.job.to_bytes())
    with pytest.raises(PromptError, match="padded on the left when it was recorded"):
        model.run(job)
    with model.trace(ROWS) as tracer:
        own = model.output["logits"].save("logits")
    torch.testing.assert_close(model.run(tracer.job)["logits"], own.value)


def test_trace_and_generate_agree_whatever_the_tokenizer_says() -> None:
    source = LanguageModel("insitu/eiffel")
    texts = ["The Louvre is in the city of", "To see the Hagia Sophia, you must visit"]
    for side in ("left", "right"):
        tokenizer = copy.deepcopy(source.tokenizer)
        tokenizer.padding_side = side
        model = LanguageModel(source.load(), tokenizer=tokenizer)
        expected = torch.stack([alone(model.module, tokenizer(t)["input_ids"])[-1] for t in texts])
        with model.trace(texts) as tracer:
            traced = model.lm_head.output[:, -1].save()
        with model.generate(texts, max_new_tokens=1) as generator:
            generated = model.lm_head.output[:, -1].save()
        cache = model.run_with_cache(texts, "logits")
        for found in (traced.value, generated.value, cache.logits[:, -1]):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert torch.equal(tracer.mask, generator.mask) and torch.equal(tracer.mask, cache.mask)
        assert tokenizer.padding_side == side


def encoded(side: str) -> BatchEncoding:
    length = max(map(len, ROWS))
    pads = [[0] * (length - len(row)) for row in ROWS]
    ids, mask = [], []
    for row, pad in zip(ROWS, pads, strict=True):
        ones = [1] * len(row)
        ids.append(pad + row if side == "left" else row + pad)
        mask.append(pad + ones if side == "left" else ones + pad)
    return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})


def opt() -> Any:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=100, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40, word_embed_proj_dim=16,
    )  # fmt: skip
    module = OPTForCausalLM(config).eval()
    spread_out(module)
    return module


def bert() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=40,
    )  # fmt: skip
    module = BertForMaskedLM(config).eval()
    spread_out(module)
    return module


@pytest.mark.parametrize(
    "dtype", sampled([torch.int64, torch.bool, torch.float32, torch.int32], [torch.int64])
)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", sampled([tiny_gpt2, tiny_llama, opt, bert], [tiny_llama, bert]))
def test_an_encoding_keeps_its_padding_and_gets_its_positions(
    make: Any, side: str, dtype: torch.dtype
) -> None:
    module, encoding = make(), encoded(side)
    model = LanguageModel(module)
    encoding["attention_mask"] = encoding["attention_mask"].to(dtype)
    mask = encoding["attention_mask"].bool()
    with model.trace(encoding) as tracer:
        whole = model.output["logits"].save()
    with model.trace(**encoding):
        by_keyword = model.output["logits"].save()
    with model.trace() as several:
        with several.invoke(**encoding):
            invoked = model.output["logits"].save()
        with several.invoke(encoding["input_ids"], attention_mask=encoding["attention_mask"]):
            beside = model.output["logits"].save()
    assert torch.equal(tracer.mask, mask.long())
    for found in (whole, by_keyword, invoked, beside):
        for number, row in enumerate(ROWS):
            expected = alone(module, row)
            torch.testing.assert_close(
                found.value[number][mask[number]], expected, atol=2e-5, rtol=1e-4
            )


def test_positions_of_the_user_stay() -> None:
    module, encoding = tiny_gpt2(), encoded("left")
    model = LanguageModel(module)
    positions = torch.arange(9).expand(3, 9) + 3
    with torch.no_grad():
        expected = module(**encoding, position_ids=positions).logits
    with model.trace(encoding, position_ids=positions):
        beside = model.lm_head.output.save()
    with model.trace(**encoding, position_ids=positions):
        keyword = model.lm_head.output.save()
    with model.trace({**encoding, "position_ids": positions}):
        inside = model.lm_head.output.save()
    for found in (beside, keyword, inside):
        torch.testing.assert_close(found.value, expected)


def test_what_a_mask_hides_between_tokens_shifts_nothing() -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[1, 0, 1, 1]])
    with torch.no_grad():
        expected = module(ids, attention_mask=mask).logits
    with model.trace(ids, attention_mask=mask):
        found = model.lm_head.output.save()
    torch.testing.assert_close(found.value, expected)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_lists_in_several_invocations_share_a_pass_and_see_no_neighbour(make: Any) -> None:
    module = make()
    model = LanguageModel(module)
    lists = [[[3, 4, 5], [6]], [[7, 8], [9, 10, 11, 12, 13, 14]], [[15, 16, 17, 18]]]
    saved, invokers = [], []
    with model.trace() as tracer:
        for rows in lists:
            with tracer.invoke(rows) as invoker:
                invokers.append(invoker)
                saved.append(model.lm_head.output.save())
    assert len(tracer.plan.passes) == 1
    for rows, invoker, logits in zip(lists, invokers, saved, strict=True):
        assert logits.value.shape[1] == max(map(len, rows))
        for number, row in enumerate(rows):
            own = logits.value[number][invoker.mask[number].bool()]
            torch.testing.assert_close(own, alone(module, row), atol=1e-5, rtol=1e-4)


def test_a_scan_pads_as_a_trace_does_and_loads_nothing() -> None:
    model = LanguageModel("insitu/eiffel")
    texts = ["The Louvre is in the city of", "Rome"]
    with model.scan(texts) as scanned:
        logits = model.lm_head.output[:, -1].save()
    assert not model.loaded and logits.value.shape[0] == 2
    with model.trace(texts) as tracer:
        model.lm_head.output.save()
    assert torch.equal(scanned.mask, tracer.mask) and tracer.mask[1, 0] == 0


def test_padding_is_found_out_of_a_model_in_training_mode_too() -> None:
    module = tiny_gpt2().train()
    model = LanguageModel(module)
    with pytest.warns(UserWarning, match="training mode"):
        with model.trace(ROWS) as tracer:
            model.lm_head.output.save()
    assert tracer.mask[2].tolist() == [0] * 8 + [1]
    assert all(part.training for part in module.modules())


def test_masks_that_say_something_else_are_errors() -> None:
    model = LanguageModel(tiny_gpt2())
    ids = torch.tensor([[5, 6, 7, 8]])
    for mask, reason in (
        (torch.tensor([[1, 1, 1]]), r"shape \(1, 3\), but the prompt has \(1, 4\)"),
        (torch.tensor([[0.0, 0.0, -1e9, 0.0]]), "1 for tokens and 0 for padding"),
    ):
        with pytest.raises(ValueError, match=reason), model.trace(ids, attention_mask=mask):
            pass
    with pytest.raises(ValueError, match="padded here"):
        with model.trace([[1, 2], [3]], attention_mask=torch.ones(2, 2)):
            pass


def roberta() -> Any:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    module = RobertaForMaskedLM(config).eval()
    spread_out(module)
    return module


@pytest.mark.parametrize("filler", [0, 1, 5])
def test_padding_is_hidden_whatever_id_a_tokenizer_fills_it_with(filler: int) -> None:
    """RoBERTa counts positions by what is its own padding id, 1."""
    module = roberta()
    model, row = LanguageModel(module), [21, 22, 23]
    ids = torch.tensor([ROWS[0], [filler] * 6 + row])
    mask = torch.tensor([[1] * 9, [0] * 6 + [1] * 3])
    with model.trace({"input_ids": ids, "attention_mask": mask}):
        found = model.output["logits"].save()
    assert torch.allclose(found[1, 6:], alone(module, row), atol=1e-5)
    assert ids[1, 0] == filler


class Uncounted(GPT2LMHeadModel):
    """Its `generate` gives no position ids, as that of some models gives none."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs.pop("position_ids", None)
        return inputs


def test_a_generation_that_shifts_padded_rows_says_so() -> None:
    config: Any = tiny_gpt2().config
    module: Any = Uncounted(config).eval()
    spread_out(module)
    model = LanguageModel(module)
    options: dict[str, Any] = {"max_new_tokens": 3, "eos_token_id": None}
    with pytest.warns(UserWarning, match="An `invoke` for each prompt gives each"):
        with model.generate(ROWS, **options):
            pass
    found = []
    with model.generate(**options) as generator:
        for row in ROWS:
            with generator.invoke(row) as invoker:
                found.append(invoker)
    for row, invoker in zip(ROWS, found, strict=True):
        ids = torch.tensor([row])
        mask = torch.ones_like(ids)
        expected = module.generate(ids, attention_mask=mask, pad_token_id=0, **options)
        assert torch.equal(invoker.output, expected)


class Unpadded(GPT2LMHeadModel):
    """Its `generate` refuses masks that hide something."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs["attention_mask"].all():
            raise ValueError("no padding, please")
        return super().generate(*args, **kwargs)


def test_the_reason_why_prompts_are_generated_one_by_one_is_what_the_model_raised() -> None:
    config: Any = tiny_gpt2().config
    module: Any = Unpadded(config).eval()
    model = LanguageModel(module)
    for _ in range(2):  # it is found out once
        with model.generate(max_new_tokens=3, eos_token_id=None) as generator:
            invokers = [generator.invoke(row) for row in ROWS]
            for invoker in invokers:
                with invoker:
                    pass
        assert "raised ValueError: no padding, please" in generator.plan.explain()
    for row, invoker in zip(ROWS, invokers, strict=True):
        ids = torch.tensor([row])
        options: dict[str, Any] = {"max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}
        expected = module.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert torch.equal(invoker.output, expected)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama, opt])
def test_a_generation_that_hides_padding_says_nothing(make: Any) -> None:
    model = LanguageModel(make())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with model.generate(ROWS, max_new_tokens=2):
            pass


def test_a_generation_behind_padding_says_so() -> None:
    model = LanguageModel(tiny_llama())
    with pytest.warns(UserWarning, match="goes on behind the padding"):
        with model.generate(encoded("right"), max_new_tokens=2):
            pass


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5, "max_new_tokens": 3},
        pytest.param({"no_repeat_ngram_size": 2, "max_new_tokens": 3}, marks=pytest.mark.thorough),
        {"min_length": 5, "max_new_tokens": 3},
        pytest.param({"max_length": 12}, marks=pytest.mark.thorough),
    ],
)
def test_a_generation_that_counts_padding_says_so(options: dict[str, Any]) -> None:
    module = tiny_llama()
    model = LanguageModel(module)
    options = {**options, "eos_token_id": 5}
    with pytest.warns(UserWarning, match=f"`{next(iter(options))}` counts padding as tokens"):
        with model.generate(ROWS, **options):
            pass
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with model.generate(ROWS[:1], **options):
            pass
        with model.generate(**options) as generator:
            with generator.invoke(ROWS[0]):
                pass
            with generator.invoke(ROWS[1]) as short:
                pass
    ids = torch.tensor(ROWS[1:2])
    options["pad_token_id"] = 0
    expected = module.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(short.output, expected)
