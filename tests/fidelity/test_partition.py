"""What one invocation asks of its pass changes nothing for the others: they share theirs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from insitu import CausalityError, LanguageModel, ShapeError, apply
from tests.conftest import hooked_hidden, tiny_gpt2
from tests.thinning import sampled

PROMPTS = [torch.tensor([ids]) for ids in ([5, 6, 7], [8, 9, 10, 11, 2], [3, 1], [4, 4, 9, 20])]
ASKING = 1  # the invocation that asks for something of its own
pytestmark = pytest.mark.filterwarnings("ignore:Attention scores and patterns")


def logits_alone(module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(ids, use_cache=False).logits[:, -1]


def hidden_of(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def shared(plan: Any) -> list[list[int]]:
    """The invocations of each pass that has several."""
    return [sorted(each.invocations) for each in plan.passes if len(each.invocations) > 1]


def a_gradient(model: LanguageModel) -> Any:
    grad = model.transformer.h[1].output[0].grad.save()
    model.lm_head.output[:, -1].sum().backward()
    return grad


def a_skip(model: LanguageModel) -> Any:
    block = model.transformer.h[1]
    block.skip(block.input)
    return model.transformer.h[2].input.save()


def a_stop(model: LanguageModel) -> Any:
    model.transformer.h[1].stop()
    return model.transformer.h[1].output[0].save()


def a_pattern(model: LanguageModel) -> Any:
    return model.blocks[1].attention.pattern.save()


def expected_of(asks: Callable[..., Any], module: nn.Module, ids: torch.Tensor) -> Any:
    """What the invocation that asks gets, by plain hooks on its prompt alone."""
    kept: list[torch.Tensor] = []
    block = module.get_submodule("transformer.h.1")
    if asks is a_pattern:
        implementation = module.config._attn_implementation
        module.set_attn_implementation("eager")
        with torch.no_grad():
            kept.append(module(ids, use_cache=False, output_attentions=True).attentions[1])
        module.set_attn_implementation(implementation)
        return kept[0]
    hook = block.register_forward_hook(lambda *seen: kept.extend([seen[1][0], seen[2]]))
    result = module(ids, use_cache=False)
    hook.remove()
    given, made = kept[0], hidden_of(kept[1])
    if asks is a_gradient:
        return torch.autograd.grad(result.logits[:, -1].sum(), made)[0]
    return given if asks is a_skip else made


@pytest.mark.parametrize(
    "asks", sampled([a_gradient, a_skip, a_stop, a_pattern], [a_gradient, a_stop])
)
def test_the_others_share_a_pass_and_each_has_what_it_has_alone(asks: Any) -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)
    found: list[Any] = []
    asked = None
    with model.trace() as tracer:
        for number, ids in enumerate(PROMPTS):
            with tracer.invoke(ids):
                if number == ASKING:
                    asked = asks(model)
                if number != ASKING or asks in (a_gradient, a_pattern):
                    found.append(model.lm_head.output[:, -1].save())
    others = [number for number in range(len(PROMPTS)) if number != ASKING]
    assert shared(tracer.plan) == [others]
    assert len(tracer.plan.passes) == 2
    told = [n for n in range(len(PROMPTS)) if n != ASKING or asks in (a_gradient, a_pattern)]
    for number, value in zip(told, found, strict=True):
        torch.testing.assert_close(value.value, logits_alone(module, PROMPTS[number]))
    torch.testing.assert_close(asked.value, expected_of(asks, module, PROMPTS[ASKING]).detach())


@pytest.mark.thorough
def test_what_asks_for_attention_shares_with_its_like() -> None:
    model = LanguageModel(tiny_gpt2())
    with model.trace() as tracer:
        for number, ids in enumerate(PROMPTS):
            with tracer.invoke(ids):
                if number % 2:
                    model.blocks[0].attention.pattern.save()
                model.lm_head.output.save()
    assert sorted(shared(tracer.plan)) == [[0, 2], [1, 3]]


def test_values_go_from_one_kind_of_invocation_to_another() -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)
    ids = [torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9, 10]]), torch.tensor([[3, 1, 4]])]
    with model.trace() as tracer:
        with tracer.invoke(ids[0]):
            first = model.transformer.h[0].output[0]
        with tracer.invoke(ids[1]):  # gradients, also of what comes from the first
            model.transformer.h[0].output = first
            second = model.transformer.h[1].output[0]
            grad = second.grad.save()
            (model.lm_head.output[:, -1] ** 2).sum().backward()
        with tracer.invoke(ids[2]):
            model.transformer.h[1].output = second
            last = model.lm_head.output.save()
    kept: dict[str, torch.Tensor] = {}
    blocks = module.transformer.h

    def run(ids: torch.Tensor, at: int, value: Any, name: str) -> torch.Tensor:
        def change(part: nn.Module, args: Any, output: Any) -> Any:
            if value is None:
                return None
            return (value, *output[1:]) if isinstance(output, tuple) else value

        def keep(part: nn.Module, args: Any, output: Any) -> None:
            kept[name] = hidden_of(output)

        hooks = [blocks[at].register_forward_hook(change)]
        hooks.append(blocks[min(at + 1, 1) if name == "second" else 0].register_forward_hook(keep))
        logits = module(ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        return logits

    run(ids[0], 0, None, "first")
    logits = run(ids[1], 0, kept["first"], "second")
    (expected,) = torch.autograd.grad((logits[:, -1] ** 2).sum(), kept["second"])
    torch.testing.assert_close(grad.value, expected)
    torch.testing.assert_close(last.value, run(ids[2], 1, kept["second"].detach(), "last").detach())


def swapped(model: LanguageModel, a: Any, b: Any) -> None:
    """Lets each of two invocations go on from the other's first block in its second."""
    with a:
        first = model.transformer.h[0].output[0]
    with b:
        model.transformer.h[1].output = first
        second = model.transformer.h[0].output[0]
    with a:
        model.transformer.h[1].output = second


@pytest.mark.thorough
def test_two_that_need_each_other_share_a_pass_in_which_attention_shows() -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)
    ids = [torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9, 10]])]
    with model.trace() as tracer:
        a, b = map(tracer.invoke, ids)
        swapped(model, a, b)
        with a:
            pattern = model.blocks[2].attention.pattern.save()
            logits = model.lm_head.output.save()
    assert shared(tracer.plan) == [[0, 1]]
    kept: list[torch.Tensor] = []
    blocks = module.transformer.h
    hook = blocks[0].register_forward_hook(lambda *seen: kept.append(hidden_of(seen[2])))
    with torch.no_grad():
        module(ids[1], use_cache=False)
    hook.remove()
    module.set_attn_implementation("eager")
    hook = blocks[1].register_forward_hook(
        lambda part, args, output: (kept[0], *output[1:]) if type(output) is tuple else kept[0]
    )
    with torch.no_grad():
        expected = module(ids[0], use_cache=False, output_attentions=True)
    hook.remove()
    torch.testing.assert_close(pattern.value, expected.attentions[2])
    torch.testing.assert_close(logits.value, expected.logits)


@pytest.mark.thorough
def test_without_weights_they_are_planned_as_they_will_run(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    model = LanguageModel(str(tmp_path), dtype="float32")
    with model.scan() as tracer:
        a, b = map(tracer.invoke, [[5, 6, 7], [8, 9, 10]])
        swapped(model, a, b)
        with a:
            for block in model.blocks:
                block.attention.pattern.save()
            model.lm_head.output.save()
    assert not model.loaded and shared(tracer.plan) == [[0, 1]]
    assert model.check(tracer.job).passes == 1 and not model.loaded


def test_two_that_need_each_other_and_ask_for_different_things_are_refused() -> None:
    model = LanguageModel(tiny_gpt2())
    with pytest.raises(CausalityError, match="what each of them asks for"), model.trace() as tracer:
        a, b, c = map(tracer.invoke, ([5, 6, 7], [8, 9, 10], [1, 2]))
        swapped(model, a, b)
        with b:
            model.transformer.h[2].skip(model.transformer.h[2].input)
        with c:
            model.lm_head.output.save()


def test_passes_without_gradients_record_none() -> None:
    model = LanguageModel(tiny_gpt2())
    recorded: dict[int, bool] = {}

    def look(value: torch.Tensor, number: int) -> torch.Tensor:
        recorded[number] = value.requires_grad
        return value

    with model.trace() as tracer:
        for number, ids in enumerate(PROMPTS):
            with tracer.invoke(ids):
                hidden = model.transformer.h[1].output[0]
                apply(look, hidden, number)
                if number == ASKING:
                    model.transformer.h[0].output[0].grad.save()
                    model.lm_head.output.sum().backward()
    assert recorded == {number: number == ASKING for number in range(len(PROMPTS))}


def left_out(module: nn.Module, path: str, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """The oracle: the logits where a module returns twice what it is given."""

    def instead(part: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        given = (args[0] if args else kwargs["hidden_states"]) * 2
        return (given, *output[1:]) if isinstance(output, tuple) else given

    hook = module.get_submodule(path).register_forward_hook(instead, with_kwargs=True)
    with torch.no_grad():
        logits = module(ids, **options).logits
    hook.remove()
    return logits


@pytest.mark.parametrize("language_model", sampled(["gpt2", "llama"], ["gpt2"]), indirect=True)
@pytest.mark.parametrize("name", ["block", "mlp", "norm"])
@pytest.mark.parametrize("cached", sampled([True, False], [True]))
def test_those_that_leave_out_the_same_share_a_pass(
    language_model: LanguageModel, name: str, cached: bool
) -> None:
    model = language_model
    block = model.blocks[1]
    norm = "ln_2" if "transformer" in dir(model) else "post_attention_layernorm"
    part = {"block": block, "mlp": block["mlp"], "norm": block[norm]}[name]
    found = []
    with model.trace(use_cache=cached) as tracer:
        for number, ids in enumerate(PROMPTS):
            with tracer.invoke(ids):
                if number:
                    part.skip(part.input * 2)
                found.append(model.lm_head.output.save())
    assert shared(tracer.plan) == [[1, 2, 3]]
    for number, (ids, logits) in enumerate(zip(PROMPTS, found, strict=True)):
        expected = (
            left_out(model.module, part.path, ids, use_cache=cached)
            if number
            else model.module(ids, use_cache=cached).logits.detach()
        )
        torch.testing.assert_close(logits.value, expected)


class Asking(nn.Module):
    """Asks what integers say before it goes on, as layers of experts do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        twice = bool((torch.arange(hidden.shape[1]) >= 0).all())
        return self.inner(hidden) * (2 if twice else 1)


@pytest.mark.thorough
def test_what_asks_integers_is_left_out_together() -> None:
    module = tiny_gpt2()
    module.transformer.h[1].mlp = Asking(module.transformer.h[1].mlp).eval()
    model = LanguageModel(module)
    block = model.transformer.h[1]
    found = []
    with model.trace() as tracer:
        for ids in PROMPTS:
            with tracer.invoke(ids):
                block.skip(block.input * 2)
                found.append(model.lm_head.output.save())
    assert shared(tracer.plan) == [[0, 1, 2, 3]]
    for ids, logits in zip(PROMPTS, found, strict=True):
        expected = left_out(model.module, block.path, ids, use_cache=False)
        torch.testing.assert_close(logits.value, expected)


def test_those_that_end_after_the_same_module_share_a_pass() -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)
    found = []
    with model.trace() as tracer:
        for number, ids in enumerate(PROMPTS):
            with tracer.invoke(ids):
                model.transformer.h[number % 2].stop()
                found.append(model.transformer.h[number % 2].output[0].save())
    assert sorted(shared(tracer.plan)) == [[0, 2], [1, 3]]
    for number, (ids, hidden) in enumerate(zip(PROMPTS, found, strict=True)):
        path = f"transformer.h.{number % 2}"
        torch.testing.assert_close(hidden.value, hooked_hidden(module, path, ids).detach())


def test_a_value_that_does_not_fit_in_the_place_of_one_prompts_module_is_found_at_its_line() -> (
    None
):
    model = LanguageModel(tiny_gpt2())
    with pytest.raises(ShapeError, match=r"\(1, 5, 16\), and this is \(1, 4, 16\)") as caught:
        with model.trace() as tracer:
            for ids in PROMPTS:
                with tracer.invoke(ids):
                    mlp = model.transformer.h[1].mlp
                    mlp.skip(mlp.input if ids.shape[1] < 5 else mlp.input[:, :4])  # wrong for one
                    model.lm_head.output.save()
    assert "wrong for one" in str(caught.value)


def test_what_is_skipped_for_equal_prompts_is_each_ones_own() -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)
    found = []
    ids = PROMPTS[0]
    with model.trace() as tracer:
        for scale in (1, 2, 3):
            with tracer.invoke(ids):
                mlp = model.transformer.h[1].mlp
                mlp.skip(mlp.input * scale)
                found.append(model.lm_head.output.save())
    assert shared(tracer.plan) == [[0, 1, 2]]
    for scale, logits in zip((1, 2, 3), found, strict=True):
        hook = module.transformer.h[1].mlp.register_forward_hook(
            lambda part, args, output, scale=scale: args[0] * scale
        )
        with torch.no_grad():
            expected = module(ids, use_cache=False).logits
        hook.remove()
        torch.testing.assert_close(logits.value, expected)
