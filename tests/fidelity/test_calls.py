"""Later calls of a module, skipping and stopping, against plain PyTorch hooks and forwards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from insitu import (
    BlockError,
    CausalityError,
    LanguageModel,
    Model,
    NeverRanError,
    NoValueError,
    OperationError,
    ShapeError,
)
from tests.fidelity.test_writing import IDS, OTHER, SHORT, block_paths, blocks, logits
from tests.thinning import sampled, thinned

X = torch.arange(8.0).reshape(2, 4)


def is_fake(value: Any) -> bool:
    """Whether a hook was called by a run on fake tensors, which looks up shapes and order."""
    return type(value) is not torch.Tensor


def outputs_of(module: nn.Module, part: nn.Module, **kwargs: Any) -> list[torch.Tensor]:
    """What a part of a module returns in each of its calls."""
    found: list[torch.Tensor] = []
    handle = part.register_forward_hook(lambda m, a, output: found.append(output.clone()))
    try:
        with torch.no_grad():
            module(**kwargs)
    finally:
        handle.remove()
    return found


def test_each_call_of_a_module_is_a_site_of_its_own(twice: Model) -> None:
    with twice.trace(x=X):
        second = twice.shared.call(1).output.save()
        first = twice.shared.output.save()
        argument = twice.shared.call(1).input.save()
    expected = outputs_of(twice.module, twice.shared.module, x=X)
    assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])
    assert torch.equal(argument, expected[0])


def test_a_later_call_is_written_and_the_first_is_not(twice: Model) -> None:
    with twice.trace(x=X):
        twice.shared.call(1).output = twice.shared.call(1).output * 0 + 3
        result = twice.output.save()
    expected = outputs_of(twice.module, twice.shared.module, x=X)
    assert torch.equal(result["first"], expected[0])
    assert torch.equal(result["second"], torch.full((2, 4), 3.0))


def test_what_the_first_call_returns_can_go_into_the_second_but_not_back(twice: Model) -> None:
    with twice.trace(x=X):
        twice.shared.call(1).output = twice.shared.output
        result = twice.output.save()
    assert torch.equal(result["second"], result["first"].relu())
    with pytest.raises(CausalityError, match=r"shared.call\(1\).output"), twice.trace(x=X):
        twice.shared.output = twice.shared.call(1).output


def test_a_call_that_never_happens_is_an_error_that_says_how_many_there_were(twice: Model) -> None:
    with pytest.raises(NeverRanError, match="`shared` was called 2 times.*call") as caught:
        with twice.trace(x=X):
            twice.shared.call(2).output.save()  # too many
    assert "too many" in str(caught.value)
    with twice.trace(x=X):
        missing = twice.shared.call(2).output.sum().save(optional=True)
        there = twice.shared.call(1).output.save(optional=True)
    assert missing.value is None and there.value is not None


def test_the_shape_of_a_later_call_is_known(twice: Model) -> None:
    with twice.trace(x=X):
        assert twice.shared.call(1).output.shape == (2, 4)
    with pytest.raises(NeverRanError, match="called 2 times"), twice.trace(x=X):
        print(twice.shared.call(5).output.shape)


def test_a_block_that_is_skipped_does_not_run(language_model: LanguageModel) -> None:
    model, path = language_model, blocks(language_model)[1].path
    ran: list[Any] = []
    handle = model.module.get_submodule(path + ".mlp").register_forward_hook(
        lambda m, a, output: None if is_fake(output) else ran.append(output)
    )
    with model.trace(IDS):
        blocks(model)[1].skip(blocks(model)[0].output[0])
        stands = blocks(model)[1].output[0].save()
        result = model.lm_head.output.save()
    handle.remove()
    assert not ran
    kept: list[torch.Tensor] = []
    before = blocks(model)[0].path

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        kept.append(hidden)
        return hidden

    expected = logits(model, {before: keep, path: lambda _: kept[0]}, IDS)
    assert torch.equal(result, expected) and torch.equal(stands, kept[0])
    assert "forward" not in vars(model.module.get_submodule(path))


def test_any_module_can_be_skipped_with_a_constant_or_its_input(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        gpt2.transformer.h[2].mlp.skip(torch.zeros(1, 6, 16))
        gpt2.transformer.ln_f.skip(gpt2.transformer.ln_f.input)
        result = gpt2.lm_head.output.save()
    plain: list[torch.Tensor] = []
    handle = gpt2.module.transformer.ln_f.register_forward_pre_hook(
        lambda m, args: plain.append(args[0])
    )
    edits = {
        "transformer.h.2.mlp": torch.zeros_like,
        "transformer.ln_f": lambda _: plain[-1],
    }
    expected = logits(gpt2, edits, IDS)
    handle.remove()
    assert torch.equal(result, expected)


def test_skipping_in_one_invocation_leaves_the_others_as_they_are(gpt2: LanguageModel) -> None:
    with gpt2.trace() as tracer:
        with tracer.invoke(IDS):
            gpt2.transformer.h[3].skip(gpt2.transformer.h[2].output)
            skipped = gpt2.lm_head.output.save()
        with tracer.invoke(SHORT):
            plain = gpt2.lm_head.output.save()
    assert torch.equal(plain, logits(gpt2, {}, SHORT))
    assert not torch.equal(skipped, logits(gpt2, {}, IDS))


@pytest.mark.parametrize(
    ("value", "found"),
    [(torch.zeros(1, 5, 16), r"\(1, 6, 16\)"), (torch.zeros(1, 6, 16).double(), "dtype")],
)
def test_what_stands_for_a_skipped_module_is_checked(
    gpt2: LanguageModel, value: torch.Tensor, found: str
) -> None:
    with pytest.raises(ShapeError, match=found) as caught, gpt2.trace(IDS):
        gpt2.transformer.h[1].skip(value)  # does not fit
        gpt2.lm_head.output.save()
    assert "does not fit" in str(caught.value) and "h[1].output" in str(caught.value)
    assert "forward" not in vars(gpt2.module.transformer.h[1])


@pytest.mark.no_wire  # it counts runs
def test_reading_what_a_skip_prevents_is_an_error_before_the_run(gpt2: LanguageModel) -> None:
    calls: list[Any] = []
    handle = gpt2.module.transformer.wte.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(NeverRanError, match=r"h\[1\].mlp.output.*skip") as caught:
        with gpt2.trace(IDS):
            gpt2.transformer.h[1].mlp.output.save()  # inside of it
            gpt2.transformer.h[1].skip(gpt2.transformer.h[0].output)
    assert "inside of it" in str(caught.value)
    with pytest.raises(OperationError, match="used before") as caught, gpt2.trace(IDS):
        gpt2.transformer.h[1].output[0].save()
        gpt2.transformer.h[1].skip(gpt2.transformer.h[0].output)
    with pytest.raises(CausalityError), gpt2.trace(IDS):
        gpt2.transformer.h[1].skip(gpt2.transformer.h[2].output)
    calls.clear()
    with gpt2.trace(IDS):
        gpt2.lm_head.output.save()
    handle.remove()
    assert calls == [1]


@pytest.mark.no_wire  # it counts calls
def test_nothing_runs_after_a_stop(gpt2: LanguageModel) -> None:
    ran: list[int] = []
    handles = [
        block.register_forward_hook(
            lambda m, args, out, layer=layer: None if is_fake(args[0]) else ran.append(layer)
        )
        for layer, block in enumerate(gpt2.module.transformer.h)
    ]
    with gpt2.trace(IDS):
        gpt2.transformer.h[1].stop()
        first = gpt2.transformer.h[0].output[0].save()
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]
    assert torch.equal(first, outputs_of_block(gpt2, 0))


def outputs_of_block(model: LanguageModel, layer: int) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    block = model.module.transformer.h[layer]

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = block.register_forward_hook(keep)
    with torch.no_grad():
        model.module(IDS, use_cache=False)
    handle.remove()
    return kept[0]


def test_reading_what_comes_after_a_stop_is_an_error_before_the_run(gpt2: LanguageModel) -> None:
    with pytest.raises(NeverRanError, match=r"h\[2\].output.*ends after `transformer.h\[1\]`"):
        with gpt2.trace(IDS):
            gpt2.transformer.h[2].output[0].save()
            gpt2.transformer.h[1].stop()


def test_a_stopped_generation_has_no_output_and_says_so(gpt2: LanguageModel) -> None:
    with gpt2.generate(IDS, max_new_tokens=3) as generator:
        hidden = gpt2.transformer.h[1].output[0].save()
        gpt2.transformer.h[1].stop()
    assert hidden.value.shape == (1, 6, 16)
    with pytest.raises(NoValueError, match="stop"):
        print(generator.output)


def test_skip_and_stop_belong_into_a_block(gpt2: LanguageModel) -> None:
    with pytest.raises(BlockError):
        gpt2.transformer.h[0].stop()
    with pytest.raises(BlockError):
        gpt2.transformer.h[0].skip(OTHER)


def test_a_module_is_skipped_after_its_arguments_were_written(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        norm = gpt2.transformer.ln_f
        norm.inputs = ((norm.inputs[0][0] * 2,), {})
        norm.skip(norm.inputs[0][0])
        result = gpt2.lm_head.output.save()
    last: list[torch.Tensor] = []
    handle = gpt2.module.transformer.ln_f.register_forward_pre_hook(
        lambda m, args: last.append(args[0] * 2)
    )
    expected = logits(gpt2, {"transformer.ln_f": lambda _: last[-1]}, IDS)
    handle.remove()
    assert torch.equal(result, expected)
    with pytest.raises(OperationError, match="is what `skip` was given"), gpt2.trace(IDS):
        gpt2.transformer.h[1].skip(gpt2.transformer.h[0].output)
        gpt2.transformer.h[1].output = torch.zeros(1, 6, 16)


def test_the_value_of_a_skip_can_be_written_in_place(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        gpt2.transformer.h[1].skip(gpt2.transformer.h[0].output[0] * 2)
        gpt2.transformer.h[1].output[0][:, 2] = 0
        result = gpt2.lm_head.output.save()
    kept: list[torch.Tensor] = []

    def instead(_: torch.Tensor) -> torch.Tensor:
        value = kept[0] * 2
        value[:, 2] = 0
        return value

    edits = {"transformer.h.0": lambda h: kept.append(h) or h, "transformer.h.1": instead}
    assert torch.equal(result, logits(gpt2, edits, IDS))


WHERE: dict[str, Callable[[Any], Any]] = {
    "block": lambda block: block,
    "mlp": lambda block: block.mlp,
    "norm": lambda block: block.ln_1 if hasattr(block, "ln_1") else block.input_layernorm,
}


@pytest.mark.parametrize("language_model", sampled(["gpt2", "llama"], ["llama"]), indirect=True)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    "steps", thinned([(0,), (1,), (2,), (0, 1, 2), "every"], [(1,), "every"]), ids=str
)
@pytest.mark.parametrize("cached", sampled([True, False], [True]))
def test_any_step_may_skip_and_later_steps_find_the_keys_and_values_that_they_need(
    language_model: LanguageModel, where: str, steps: Any, cached: bool
) -> None:
    model = language_model
    module: Any = WHERE[where](model.module.get_submodule(block_paths(model)[1]))
    part = WHERE[where](blocks(model)[1])
    options: dict[str, Any] = {"max_new_tokens": 3, "eos_token_id": None, "use_cache": cached}
    logits: list[torch.Tensor] = []

    def instead(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if steps == "every" or len(logits) in steps:
            given = args[0] if args else kwargs["hidden_states"]
            return (given * 2, *output[1:]) if isinstance(output, tuple) else given * 2
        return None

    handles = [
        module.register_forward_hook(instead, with_kwargs=True),
        model.module.register_forward_hook(lambda *args: logits.append(args[2].logits[:, -1])),
    ]
    mask = torch.ones_like(IDS)
    expected = model.module.generate(IDS, attention_mask=mask, pad_token_id=0, **options)
    for handle in handles:
        handle.remove()
    with model.generate(IDS, **options) as generator:
        if steps == "every":
            with generator.every_step():
                part.skip(part.input * 2)
        for step in () if steps == "every" else steps:
            with generator.step(step):
                part.skip(part.input * 2)
        found = [generator.logits(step).save() for step in range(3)]
    assert torch.equal(generator.output, expected)
    for one, other in zip(found, logits, strict=True):
        torch.testing.assert_close(one.value, other)


def test_a_skip_of_a_later_step_is_checked_by_the_sizes_of_that_step(gpt2: LanguageModel) -> None:
    with pytest.raises(ShapeError, match=r"\(1, 1, 16\), and this is \(1, 6, 16\)") as caught:
        with gpt2.generate(IDS, max_new_tokens=2, eos_token_id=None) as generator:
            with generator.step(1):
                gpt2.transformer.h[1].mlp.skip(torch.zeros(1, 6, 16))  # does not fit
    assert "does not fit" in str(caught.value)


SMALL: dict[str, Any] = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
RETURNING_MORE: dict[str, Callable[[], Any]] = {
    "bloom": lambda: BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=2, n_head=2, **SMALL)),
    "gpt_neo": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global"], 2]],
            max_position_embeddings=64,
            **SMALL,
        )
    ),
    "t5": lambda: T5ForConditionalGeneration(  # later blocks use the first one's position bias
        T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, **SMALL)
    ),
}


@pytest.mark.parametrize("kind", RETURNING_MORE)
@pytest.mark.parametrize("cached", sampled([True, False], [True]))
def test_of_a_block_that_returns_more_hidden_states_will_do(kind: str, cached: bool) -> None:
    torch.manual_seed(0)
    module = RETURNING_MORE[kind]().eval()
    model = LanguageModel(module)
    options: dict[str, Any] = {"use_cache": cached}
    if kind == "t5":
        options["decoder_input_ids"] = torch.tensor([[0, 13, 14]])
    first = model.blocks[0]

    def instead(part: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden * 2, *output[1:]) if isinstance(output, tuple) else hidden * 2

    hook = module.get_submodule(first.path).register_forward_hook(instead, with_kwargs=True)
    with torch.no_grad():
        expected = module(IDS, **options).logits
    hook.remove()
    with model.trace(IDS, **options):
        first.skip(first.input * 2)
        found = model.logits.save()
    assert torch.equal(found.value, expected)
