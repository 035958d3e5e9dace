"""Encoders with decoders: what the decoder is given, and steps, against plain Transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartForQuestionAnswering,
    BartForSequenceClassification,
    T5ForQuestionAnswering,
    T5ForSequenceClassification,
)

from insitu import LanguageModel
from tests.models.kinds import bart, outputs_of, t5
from tests.thinning import sampled

IDS = torch.tensor([[3, 14, 15, 92, 65], [7, 8, 9, 10, 11]])
CASES = {
    "t5": (t5, "encoder.block", "decoder.block"),
    "bart": (bart, "model.encoder.layers", "model.decoder.layers"),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, LanguageModel, Any]:
    make, encoder, decoder = CASES[request.param]
    module = make()
    module.save_pretrained(tmp_path)
    model = LanguageModel(tmp_path)
    return module, model, (handle(model, encoder), handle(model, decoder))


def handle(model: LanguageModel, path: str) -> Any:
    found: Any = model
    for name in path.split("."):
        found = found[name]
    return found


def start_of(module: Any, rows: int) -> torch.Tensor:
    return torch.full((rows, 1), module.config.decoder_start_token_id)


def run(module: Callable[..., Any], **kwargs: Any) -> Any:
    with torch.no_grad():
        return module(**kwargs)


def test_a_trace_gives_the_decoder_its_start_token(case: Any) -> None:
    module, model, (encoder, decoder) = case
    with model.trace(IDS):
        hidden = encoder[1].output[0]
        assert hidden.shape == (2, 5, 16)
        hidden, logits = hidden.save(), model.output.logits.save()
        late = decoder[1].output.save()
    kwargs = {"input_ids": IDS, "decoder_input_ids": start_of(module, 2)}
    assert torch.equal(logits.value, run(module, **kwargs).logits)
    assert torch.equal(hidden.value, outputs_of(module, encoder[1].path, module, **kwargs)[0])
    expected = outputs_of(module, decoder[1].path, module, **kwargs)[0]
    late = late.value[0] if isinstance(late.value, tuple) else late.value
    assert torch.equal(late, expected)


def test_what_the_decoder_is_given_goes_before_the_start_token(case: Any) -> None:
    module, model, _ = case
    given = torch.cat([start_of(module, 2), torch.tensor([[5, 7], [4, 6]])], 1)
    with model.trace(IDS, decoder_input_ids=given):
        logits = model.output.logits.save()
    assert torch.equal(logits.value, run(module, input_ids=IDS, decoder_input_ids=given).logits)
    with model.trace({"input_ids": IDS, "decoder_input_ids": given}):
        logits = model.output.logits.save()
    assert torch.equal(logits.value, run(module, input_ids=IDS, decoder_input_ids=given).logits)


def test_labels_are_what_the_decoder_is_given_shifted(case: Any) -> None:
    module, model, _ = case
    labels = torch.tensor([[5, 7], [4, 6]])
    with model.trace(IDS, labels=labels):
        loss, logits = model.output.loss.save(), model.output.logits.save()
    expected = run(module, input_ids=IDS, labels=labels)
    assert torch.equal(loss.value, expected.loss) and torch.equal(logits.value, expected.logits)


def test_a_generation_has_an_encoder_in_step_0_and_a_decoder_in_all(case: Any) -> None:
    module, model, (encoder, decoder) = case
    options = {"max_new_tokens": 4, "do_sample": False}
    with model.generate(IDS, **options) as generator:
        read = encoder[1].output[0]
        assert read.shape == (2, 5, 16)
        read = read.save()
        with generator.every_step():
            late = decoder[1].output.save()
            tokens, logits = generator.tokens().save(), generator.logits().save()
        with generator.step(2):
            third = decoder[1].output.save()
    expected = run(module.generate, input_ids=IDS, **options)
    assert torch.equal(generator.output, expected)
    assert torch.equal(torch.stack(tokens.value, 1), expected[:, 1:])
    assert len(logits.value) == expected.shape[1] - 1
    kwargs = {"input_ids": IDS, **options}
    seen = outputs_of(module, encoder[1].path, module.generate, **kwargs)
    assert len(seen) == 1 and torch.equal(read.value, seen[0])
    seen = outputs_of(module, decoder[1].path, module.generate, **kwargs)
    for own, plain in zip(late.value, seen, strict=True):
        assert torch.equal(own[0] if isinstance(own, tuple) else own, plain)
    own = third.value[0] if isinstance(third.value, tuple) else third.value
    assert torch.equal(own, seen[2])


def test_a_write_in_the_encoder_changes_the_generation(case: Any) -> None:
    module, model, (encoder, _) = case
    options = {"max_new_tokens": 4, "do_sample": False}
    with model.generate(IDS, **options) as generator:
        encoder[0].output[0][:, 1:] = torch.linspace(-3, 3, 16)
        with generator.step(1):
            logits = model.lm_head.output.save()

    def put(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, 1:] = torch.linspace(-3, 3, 16)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hook = module.get_submodule(encoder[0].path).register_forward_hook(put)
    kwargs = {"input_ids": IDS, **options}
    assert torch.equal(generator.output, run(module.generate, **kwargs))
    expected = outputs_of(module, "lm_head", module.generate, **kwargs)[1]
    hook.remove()
    assert torch.equal(logits.value, expected)
    plain = outputs_of(module, "lm_head", module.generate, **kwargs)[1]
    assert (expected - plain).abs().max() > 0.1


@pytest.mark.parametrize("case", sampled(CASES, ["bart"]), indirect=True)
@pytest.mark.parametrize("mode", ["trace", "generate"])
def test_prompts_of_different_length_share_a_pass_and_see_nothing_of_it(
    case: Any, mode: str
) -> None:
    module, model, (encoder, decoder) = case
    prompts = [IDS[:1], IDS[1:, :2], torch.tensor([[4, 5, 6, 7, 8, 9, 10]])]
    options = {"max_new_tokens": 3, "do_sample": False} if mode == "generate" else {}
    read, invokers = [], []
    with getattr(model, mode)(**options) as tracer:
        for ids in prompts:
            with tracer.invoke(ids) as invoker:
                read.append((encoder[1].output[0].save(), decoder[0].output.save()))
                invokers.append(invoker)
    assert len(tracer.plan.passes) == 1
    for ids, invoker, (hidden, late) in zip(prompts, invokers, read, strict=True):
        kwargs: dict[str, Any] = {"input_ids": ids, **options}
        call = module.generate
        if mode == "trace":
            kwargs, call = {**kwargs, "decoder_input_ids": start_of(module, 1)}, module
        else:
            assert torch.equal(invoker.output, run(call, **kwargs))
        plain = outputs_of(module, encoder[1].path, call, **kwargs)[0]
        torch.testing.assert_close(hidden.value, plain, atol=1e-5, rtol=0)
        plain = outputs_of(module, decoder[0].path, call, **kwargs)[0]
        late = late.value[0] if isinstance(late.value, tuple) else late.value
        torch.testing.assert_close(late, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", sampled(CASES, ["t5"]), indirect=True)
@pytest.mark.parametrize("begun", [True, False])
def test_a_generation_can_go_on_from_what_the_decoder_is_given(case: Any, begun: bool) -> None:
    module, model, _ = case
    given = torch.tensor([[5, 7]])
    if begun:
        given = torch.cat([start_of(module, 1), given], 1)
    options = {"max_new_tokens": 2, "do_sample": False, "decoder_input_ids": given}
    with model.generate(**options) as generator:
        with generator.invoke(IDS[:1]):
            logits = model.lm_head.output
            assert logits.shape == (1, 3, 100)
            logits = logits.save()
        with generator.invoke(IDS[1:, :3]) as other:
            pass
    assert logits.shape == (1, 3, 100)
    expected = [run(module.generate, input_ids=i, **options) for i in (IDS[:1], IDS[1:, :3])]
    assert torch.equal(generator.output, torch.cat(expected))
    assert torch.equal(other.output, expected[1])


def test_the_length_of_a_prompt_and_of_what_is_generated_are_two_things() -> None:
    module = bart()
    model = LanguageModel(module)
    ids = torch.full((1, 38), 5)  # of 40 positions that the encoder has
    with model.generate(ids, max_new_tokens=10, do_sample=False) as generator:
        pass
    expected = run(module.generate, input_ids=ids, max_new_tokens=10, do_sample=False)
    assert torch.equal(generator.output, expected)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (BartForSequenceClassification, bart().config),
        (BartForQuestionAnswering, bart().config),
        (T5ForSequenceClassification, t5().config),
        (T5ForQuestionAnswering, t5().config),
    ],
)
def test_the_decoder_of_a_classifier_reads_the_prompt(kind: Any, config: Any) -> None:
    torch.manual_seed(0)
    module = kind(config).eval()
    model = LanguageModel(module)
    end = module.config.eos_token_id
    name = "start_logits" if "Question" in kind.__name__ else "logits"
    prompts = [torch.tensor([[14, 15, 65, end]]), torch.tensor([[7, 8, 9, 10, 11, end]])]
    found = []
    with model.trace() as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                found.append(model.output[name].save())
    for prompt, logits in zip(prompts, found, strict=True):
        expected = run(module, input_ids=prompt)[name]
        assert torch.allclose(logits.value, expected, atol=1e-5)
