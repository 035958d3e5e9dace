"""Gradients of several prompts in one batch, against autograd on each prompt alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from insitu import ExecutionError, LanguageModel
from tests.conftest import tiny_gpt2
from tests.fidelity.test_partition import PROMPTS, hidden_of, shared
from tests.fidelity.test_writing import block_paths
from tests.thinning import sampled

Loss = Callable[[torch.Tensor], torch.Tensor]


def last(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1].logsumexp(-1).sum()


def squares(logits: torch.Tensor) -> torch.Tensor:
    return (logits**2).mean()


def gradient_alone(
    module: nn.Module, ids: torch.Tensor, path: str, loss: Loss, scale: float = 1.0
) -> torch.Tensor:
    """The oracle: at a module's output, with a hook that hands on a new tensor."""
    kept: list[torch.Tensor] = []

    def hook(part: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_of(output)
        hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
        kept.append(hidden.view_as(hidden))
        new = kept[0] * scale
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = module.get_submodule(path).register_forward_hook(hook)
    with torch.enable_grad():
        logits = module(ids, use_cache=False).logits
    handle.remove()
    return torch.autograd.grad(loss(logits), kept[0])[0]


def sites(model: LanguageModel) -> list[str]:
    """A block, parts of one, and what stands before all blocks."""
    blocks = block_paths(model)
    embedding = "transformer.wte" if "transformer" in dir(model) else "model.embed_tokens"
    norm = "ln_2" if "transformer" in dir(model) else "post_attention_layernorm"
    return [embedding, blocks[0], f"{blocks[1]}.mlp", f"{blocks[1]}.{norm}", blocks[-1]]


def gradient_of(model: LanguageModel, path: str) -> Any:
    handle: Any = model
    for name in path.split("."):
        handle = handle[int(name)] if name.isdigit() else handle[name]
    output = handle.output
    return (output[0] if path in block_paths(model) else output).grad.save()


@pytest.mark.parametrize("language_model", sampled(["gpt2", "llama"], ["llama"]), indirect=True)
@pytest.mark.parametrize("frozen", [False, True])
def test_prompts_of_any_length_share_a_forward_and_a_backward_pass(
    language_model: LanguageModel, frozen: bool
) -> None:
    model = language_model
    model.module.requires_grad_(not frozen)
    losses = [last, squares, last, squares]
    found: list[list[Any]] = []
    with model.trace() as tracer:
        for ids, loss in zip(PROMPTS, losses, strict=True):
            with tracer.invoke(ids):
                found.append([gradient_of(model, path) for path in sites(model)])
                loss(model.lm_head.output).backward()
    assert shared(tracer.plan) == [[0, 1, 2, 3]]
    for ids, loss, grads in zip(PROMPTS, losses, found, strict=True):
        for path, grad in zip(sites(model), grads, strict=True):
            right = gradient_alone(model.module, ids, path, loss)
            torch.testing.assert_close(grad.value, right, msg=path)
    assert all(weight.grad is None for weight in model.module.parameters())


def test_equal_prompts_have_gradients_of_their_own() -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)
    found = []
    with model.trace() as tracer:
        for power in (1, 2, 3):
            with tracer.invoke(PROMPTS[1]):
                found.append(model.transformer.h[1].output[0].grad.save())
                (model.lm_head.output[:, -1] ** power).sum().backward()
    assert shared(tracer.plan) == [[0, 1, 2]]
    for power, grad in zip((1, 2, 3), found, strict=True):
        right = gradient_alone(
            module, PROMPTS[1], "transformer.h.1", lambda x, n=power: (x[:, -1] ** n).sum()
        )
        torch.testing.assert_close(grad.value, right)


def test_what_one_loss_does_not_depend_on_is_an_error_though_anothers_does() -> None:
    model = LanguageModel(tiny_gpt2())
    with pytest.raises(ExecutionError, match="the loss does not depend on it") as caught:
        with model.trace() as tracer:
            for number, ids in enumerate(PROMPTS):
                with tracer.invoke(ids):
                    model.transformer.h[2].output[0].grad.save()  # of nothing, for one
                    end = model.transformer.h[1].output[0] if number == 1 else model.lm_head.output
                    end.sum().backward()
    assert "of nothing, for one" in str(caught.value)


def test_writes_before_and_after_the_line_count_as_alone() -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)
    before, after = [], []
    with model.trace() as tracer:
        for ids in PROMPTS:
            with tracer.invoke(ids):
                hidden = model.transformer.h[1].output[0]
                before.append(hidden.grad.save())
                model.transformer.h[1].output = hidden * 0.5
                after.append(model.transformer.h[1].output[0].grad.save())
                last(model.lm_head.output).backward()
    assert shared(tracer.plan) == [[0, 1, 2, 3]]
    for ids, one, other in zip(PROMPTS, before, after, strict=True):
        right = gradient_alone(module, ids, "transformer.h.1", last, 0.5)
        torch.testing.assert_close(one.value, right)
        torch.testing.assert_close(other.value, right * 2)


def test_a_leaf_that_all_use_gets_the_sum() -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)
    vector = torch.randn(16, requires_grad=True)
    with model.trace() as tracer:
        for ids in PROMPTS:
            with tracer.invoke(ids):
                model.transformer.h[1].output = model.transformer.h[1].output[0] + vector
                last(model.lm_head.output).backward()
    assert shared(tracer.plan) == [[0, 1, 2, 3]]
    found, vector.grad = vector.grad, None
    for ids in PROMPTS:
        hook = module.transformer.h[1].register_forward_hook(
            lambda part, args, output: (
                (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector
            )
        )
        last(module(ids, use_cache=False).logits).backward(inputs=[vector])
        hook.remove()
    torch.testing.assert_close(found, vector.grad)


def test_each_has_gradients_of_weights_of_its_own() -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)
    weight = module.transformer.h[0].mlp.c_fc.weight
    found = []
    with model.trace() as tracer:
        for ids in PROMPTS:
            with tracer.invoke(ids):
                (grad,) = last(model.lm_head.output).backward(inputs=[weight])
                found.append(grad.save())
    assert shared(tracer.plan) == []  # each backward pass would go through the whole batch
    assert "is not one with those of the others" in tracer.plan.explain()
    for ids, grad in zip(PROMPTS, found, strict=True):
        (right,) = torch.autograd.grad(last(module(ids, use_cache=False).logits), [weight])
        torch.testing.assert_close(grad.value, right)
    assert weight.grad is None


def test_two_passes_each() -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)
    found = []
    with model.trace() as tracer:
        for ids in PROMPTS:
            with tracer.invoke(ids):
                hidden, logits = model.transformer.h[1].output[0], model.lm_head.output
                last(logits).backward(retain_graph=True)
                one = hidden.grad.save()
                squares(logits).backward()
                found.append((one, hidden.grad.save()))
    assert shared(tracer.plan) == [[0, 1, 2, 3]]
    for ids, grads in zip(PROMPTS, found, strict=True):
        for grad, loss in zip(grads, (last, squares), strict=True):
            right = gradient_alone(module, ids, "transformer.h.1", loss)
            torch.testing.assert_close(grad.value, right)


def test_a_loss_of_several_prompts_goes_through_all() -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)
    with model.trace() as tracer:
        grads, losses = [], []
        for ids in PROMPTS:
            with tracer.invoke(ids):
                grads.append(model.transformer.h[1].output[0].grad.save())
                losses.append(last(model.lm_head.output))
        sum(losses[1:], losses[0]).backward()
    assert shared(tracer.plan) == [[0, 1, 2, 3]]
    for ids, grad in zip(PROMPTS, grads, strict=True):
        torch.testing.assert_close(grad.value, gradient_alone(module, ids, "transformer.h.1", last))


def test_what_a_batch_does_not_give_is_taken_one_by_one() -> None:
    model = LanguageModel(tiny_gpt2())
    with model.trace() as tracer:
        for number, ids in enumerate(PROMPTS):
            with tracer.invoke(ids):
                hidden = model.transformer.h[1].output[0]
                if number == 0:
                    hidden.save(keep_graph=True)
                elif number == 1:
                    hidden.grad = hidden.grad * 2
                grad = (model.transformer.wpe.output if number == 2 else hidden).grad
                grad.save()
                last(model.lm_head.output).backward()
    table = tracer.plan.explain()
    assert shared(tracer.plan) == []
    for why in ("saved with its graph", "changed on their way", "cannot be cut out"):
        assert why in table


def test_a_position_that_all_rows_share_has_a_gradient_for_each() -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)
    found = []
    with model.trace() as tracer:
        for ids in PROMPTS[1:3]:
            with tracer.invoke(ids):
                found.append(model.transformer.wpe.output.grad.save())
                last(model.lm_head.output).backward()
    for ids, grad in zip(PROMPTS[1:3], found, strict=True):
        torch.testing.assert_close(grad.value, gradient_alone(module, ids, "transformer.wpe", last))


def counted_backwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many losses each backward pass of autograd starts with, from now on."""
    found: list[int] = []
    plain = torch.autograd.grad

    def grad(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(len(outputs) if isinstance(outputs, list) else 1)
        return plain(outputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    return found


def in_one_block(
    monkeypatch: pytest.MonkeyPatch, lines: Callable[[LanguageModel, int], Any]
) -> tuple[nn.Module, list[list[int]], list[Any], list[int]]:
    """Runs lines for each prompt of a block.

    Returns the module, which prompts shared a pass, what the lines gave, and how many losses each
    backward pass started with.
    """
    module = tiny_gpt2()
    model = LanguageModel(module)
    found = []
    with model.trace() as tracer:
        for number, ids in enumerate(PROMPTS):
            with tracer.invoke(ids):
                found.append(lines(model, number))
        counts = counted_backwards(monkeypatch)
    monkeypatch.undo()
    return module, shared(tracer.plan), found, counts


@pytest.mark.parametrize("spelling", sampled(["retained", "named", "returned"], ["returned"]))
def test_passes_that_ask_for_the_same_run_as_one(
    spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each would go through the whole batch."""

    def taken(loss: Any, hidden: Any, retain: bool) -> Any:
        if spelling == "retained":
            loss.backward(retain_graph=retain)
            return hidden.grad.save()
        if spelling == "named":
            return loss.backward(inputs=[hidden], retain_graph=retain)[0].save()
        return torch.autograd.grad(loss, hidden, retain_graph=retain)[0].save()

    def lines(model: LanguageModel, _: int) -> Any:
        hidden, logits = model.transformer.h[1].output[0], model.lm_head.output
        one = taken(last(logits), hidden, True)
        return one, taken(squares(logits), hidden, False)

    module, together, found, counts = in_one_block(monkeypatch, lines)
    assert together == [[0, 1, 2, 3]]
    assert counts[-2:] == [4, 4]
    for ids, grads in zip(PROMPTS, found, strict=True):
        for grad, loss in zip(grads, (last, squares), strict=True):
            right = gradient_alone(module, ids, "transformer.h.1", loss)
            torch.testing.assert_close(grad.value, right)


def test_one_whose_pass_is_its_own_leaves_the_others_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lines(model: LanguageModel, number: int) -> Any:
        grad = model.transformer.h[1].output[0].grad.save()
        loss = last(model.lm_head.output)
        loss.backward(**({"gradient": torch.tensor(2.0)} if number == 1 else {}))
        return grad

    module, together, found, counts = in_one_block(monkeypatch, lines)
    assert together == [[0, 2, 3]]
    assert counts[-2:] == [3, 1]
    for number, (ids, grad) in enumerate(zip(PROMPTS, found, strict=True)):
        right = gradient_alone(module, ids, "transformer.h.1", last)
        torch.testing.assert_close(grad.value, right * (2 if number == 1 else 1))


def test_one_loss_of_all_prompts_has_gradients_of_weights() -> None:
    """It is one pass through the batch, whatever it asks for."""
    module = tiny_gpt2()
    model = LanguageModel(module)
    weight = module.transformer.h[0].mlp.c_fc.weight
    with model.trace() as tracer:
        losses = []
        for ids in PROMPTS:
            with tracer.invoke(ids):
                losses.append(last(model.lm_head.output))
        (grad,) = sum(losses[1:], losses[0]).backward(inputs=[weight])
        grad.save()
    assert shared(tracer.plan) == [[0, 1, 2, 3]]
    total = sum(last(module(ids, use_cache=False).logits) for ids in PROMPTS)
    torch.testing.assert_close(grad.value, torch.autograd.grad(total, [weight])[0])


def test_passes_that_start_from_gradients_of_earlier_ones_run_as_one_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As edge attribution does: back to a value, and from there on for each part of it."""

    def lines(model: LanguageModel, _: int) -> Any:
        early, late = model.transformer.h[0].output[0], model.transformer.h[2].output[0]
        slope = late.grad
        last(model.lm_head.output).backward(retain_graph=True)
        halves = []
        for half in (slice(0, 8), slice(8, 16)):
            product = (late[..., half] * slope.detach()[..., half]).sum()
            (grad,) = product.backward(retain_graph=True, inputs=[early])
            halves.append(grad.save())
        return halves

    module, together, found, counts = in_one_block(monkeypatch, lines)
    assert together == [[0, 1, 2, 3]]
    assert counts[-3:] == [4, 4, 4]
    for ids, halves in zip(PROMPTS, found, strict=True):
        right = gradient_alone(module, ids, "transformer.h.0", last)
        torch.testing.assert_close(halves[0].value + halves[1].value, right)
        seen: list[torch.Tensor] = []
        keep = [
            module.get_submodule(f"transformer.h.{at}").register_forward_hook(
                lambda part, args, out, seen=seen: seen.append(
                    out[0] if isinstance(out, tuple) else out
                )
            )
            for at in (0, 2)
        ]
        loss = last(module(ids, use_cache=False).logits)
        for handle in keep:
            handle.remove()
        slope = torch.autograd.grad(loss, seen[1], retain_graph=True)[0]
        product = (seen[1][..., :8] * slope[..., :8]).sum()
        torch.testing.assert_close(halves[0].value, torch.autograd.grad(product, seen[0])[0])


@pytest.mark.parametrize("written", sampled([float("nan"), float("inf"), 1e30], [float("inf")]))
def test_what_is_no_number_does_not_come_back_through_padding(
    language_model: LanguageModel, written: float
) -> None:
    model = language_model
    first, second = block_paths(model)[:2]
    module = model.module

    def alone(ids: torch.Tensor) -> torch.Tensor:
        kept: list[torch.Tensor] = []

        def keep(part: nn.Module, args: Any, output: Any) -> Any:
            kept.append(hidden_of(output).detach().requires_grad_())
            return (kept[0], *output[1:]) if isinstance(output, tuple) else kept[0]

        def fill(part: nn.Module, args: Any, output: Any) -> Any:
            new = torch.full_like(hidden_of(output), written)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handles = [
            module.get_submodule(first).register_forward_hook(keep),
            module.get_submodule(second).register_forward_hook(fill),
        ]
        loss = module(ids, use_cache=False).logits[:, -1].sin().sum()
        for handle in handles:
            handle.remove()
        if not loss.requires_grad:  # with frozen weights nothing is left of it
            return torch.zeros_like(kept[0])
        (gradient,) = torch.autograd.grad(loss, kept[0], allow_unused=True)
        return torch.zeros_like(kept[0]) if gradient is None else gradient

    found = []
    with model.trace() as tracer:
        for ids in ([[5, 6, 7]], [[8, 9, 10, 11, 2, 7]]):
            with tracer.invoke(ids):
                found.append(model.blocks[0].output[0].grad.save())
                hidden = model.blocks[1].output[0]
                hidden[:] = written
                model.logits[:, -1].sin().sum().backward()
    assert len(tracer.plan.passes) == 1
    for gradient, ids in zip(found, ([[5, 6, 7]], [[8, 9, 10, 11, 2, 7]]), strict=True):
        assert torch.equal(gradient.value, alone(torch.tensor(ids)))
