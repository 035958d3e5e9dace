"""Gradients, against plain hooks and torch's own `backward`."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from insitu import (
    CausalityError,
    ExecutionError,
    InsituError,
    LanguageModel,
    Model,
    OperationError,
    ShapeError,
    apply,
)
from tests.conftest import hooked_hidden, tiny_llama
from tests.fidelity.test_writing import IDS, OTHER, SHORT, blocks

Edit = Callable[[torch.Tensor], torch.Tensor]


def run(
    model: LanguageModel, edits: dict[str, Edit | None], ids: torch.Tensor = IDS
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The oracle: logits with autograd, and what modules return, which keeps its gradient."""
    kept: dict[str, torch.Tensor] = {}
    handles = []
    for path, edit in edits.items():

        def hook(module: nn.Module, args: Any, output: Any, path: str = path, edit=edit) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            changed = hidden if edit is None else edit(hidden)
            changed.retain_grad()
            kept[path] = changed
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handles.append(model.module.get_submodule(path).register_forward_hook(hook))
    try:
        return model.module(ids, use_cache=False).logits, kept
    finally:
        for handle in handles:
            handle.remove()


def loss_of(logits: Any) -> Any:
    return logits[:, -1].logsumexp(-1).sum() - logits[:, -1, 7].sum()


def clear(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = None


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_gradients_of_every_block(language_model: LanguageModel, frozen: bool) -> None:
    model = language_model
    if frozen:
        model.module.get_input_embeddings().requires_grad_(False)
    paths = [block.path for block in blocks(model)]
    with model.trace(IDS):
        grads = [block.output[0].grad.save() for block in blocks(model)]
        loss = loss_of(model.lm_head.output)
        value = loss.save()
        loss.backward()
    assert all(parameter.grad is None for parameter in model.module.parameters())
    logits, kept = run(model, dict.fromkeys(paths))
    expected = loss_of(logits)
    expected.backward()
    clear(model.module)
    assert torch.equal(value, expected.detach()) and not value.value.requires_grad
    for path, grad in zip(paths, grads, strict=True):
        assert torch.equal(grad, kept[path].grad), path


def test_a_model_without_trainable_parameters_has_gradients_too(gpt2: LanguageModel) -> None:
    gpt2.module.requires_grad_(False)
    with gpt2.trace(IDS):
        loss_of(gpt2.lm_head.output).backward()
        grad = gpt2.transformer.wte.output.grad.save()
    kept: list[torch.Tensor] = []
    handle = gpt2.module.transformer.wte.register_forward_hook(
        lambda m, a, output: kept.append(output.requires_grad_())
    )
    loss_of(gpt2.module(IDS, use_cache=False).logits).backward()
    handle.remove()
    assert torch.equal(grad, kept[0].grad)


def test_a_read_before_and_after_the_backward_are_the_same(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        hidden = gpt2.transformer.h[1].output[0]
        before = hidden.grad.save()
        loss_of(gpt2.lm_head.output).backward()
        after = hidden.grad.save()
        computed = (hidden * hidden.grad).sum(-1).save()
    logits, kept = run(gpt2, {"transformer.h.1": None})
    loss_of(logits).backward()
    clear(gpt2.module)
    value = kept["transformer.h.1"]
    assert torch.equal(before, value.grad) and torch.equal(after, value.grad)
    assert torch.equal(computed, (value * value.grad).sum(-1).detach())


def test_each_of_two_backward_passes_has_its_gradients(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        hidden, logits = gpt2.transformer.h[1].output[0], gpt2.lm_head.output
        first = hidden.grad.save()
        logits[:, -1, 3].sum().backward(retain_graph=True)
        between = hidden.grad.save()
        (logits[:, -1, 4].sum() * 2).backward()
        last = hidden.grad.save()
    for grad, token, scale in ((first, 3, 1), (between, 3, 1), (last, 4, 2)):
        result, kept = run(gpt2, {"transformer.h.1": None})
        (result[:, -1, token].sum() * scale).backward()
        clear(gpt2.module)
        assert torch.equal(grad, kept["transformer.h.1"].grad)


def test_a_second_pass_without_retain_graph_is_torchs_error_at_its_line(
    gpt2: LanguageModel,
) -> None:
    with pytest.raises(InsituError, match="retain_graph") as caught, gpt2.trace(IDS):
        loss = loss_of(gpt2.lm_head.output)
        _ = gpt2.transformer.h[0].output[0].grad
        loss.backward()
        with loss.backward():  # once too often
            _ = gpt2.transformer.h[1].output[0].grad
    assert "once too often" in str(caught.value)
    assert all(not p.grad_fn and p.requires_grad for p in gpt2.module.parameters())


def test_gradients_can_be_replaced_on_their_way(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        deep, shallow = gpt2.transformer.h[2].output[0], gpt2.transformer.h[0].output[0]
        deep.grad = deep.grad * 2 + 1
        scaled = deep.grad.save()
        grad = shallow.grad.save()
        loss_of(gpt2.lm_head.output).backward()
    paths = ["transformer.h.2", "transformer.h.0"]
    logits, kept = run(gpt2, dict.fromkeys(paths))
    kept[paths[0]].register_hook(lambda g: g * 2 + 1)
    loss_of(logits).backward()
    clear(gpt2.module)
    assert torch.equal(scaled, kept[paths[0]].grad)
    assert torch.equal(grad, kept[paths[1]].grad)


def test_gradients_can_be_written_in_place_and_before_the_line_of_the_backward(
    gpt2: LanguageModel,
) -> None:
    with gpt2.trace(IDS):
        deep, shallow = gpt2.transformer.h[2].output[0], gpt2.transformer.h[0].output[0]
        loss_of(gpt2.lm_head.output).backward()
        deep.grad[:, -1] = 0
        deep.grad *= 3
        grad = shallow.grad.save()
    paths = ["transformer.h.2", "transformer.h.0"]
    logits, kept = run(gpt2, dict.fromkeys(paths))

    def change(g: torch.Tensor) -> torch.Tensor:
        g = g.clone()
        g[:, -1] = 0
        return g * 3

    kept[paths[0]].register_hook(change)
    loss_of(logits).backward()
    clear(gpt2.module)
    assert torch.equal(grad, kept[paths[1]].grad)


def test_a_gradient_may_be_replaced_with_one_that_comes_before_it_only(
    gpt2: LanguageModel,
) -> None:
    with gpt2.trace(IDS):
        deep, shallow = gpt2.transformer.h[2].output[0], gpt2.transformer.h[0].output[0]
        shallow.grad = deep.grad
        grad = gpt2.transformer.wte.output.grad.save()
        loss_of(gpt2.lm_head.output).backward()
    assert grad.value.shape == (1, 6, 16)
    with pytest.raises(CausalityError), gpt2.trace(IDS):
        deep, shallow = gpt2.transformer.h[2].output[0], gpt2.transformer.h[0].output[0]
        deep.grad = shallow.grad
        loss_of(gpt2.lm_head.output).backward()


def test_gradients_together_with_writes(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        gpt2.transformer.h[1].output = gpt2.transformer.h[1].output[0] * 0.5
        grad = gpt2.transformer.h[1].output[0].grad.save()
        early = gpt2.transformer.h[0].output[0].grad.save()
        loss_of(gpt2.lm_head.output).backward()
    logits, kept = run(gpt2, {"transformer.h.0": None, "transformer.h.1": lambda h: h * 0.5})
    loss_of(logits).backward()
    clear(gpt2.module)
    assert torch.equal(grad, kept["transformer.h.1"].grad)
    assert torch.equal(early, kept["transformer.h.0"].grad)


def zero_last(h: Any) -> None:
    h[:, -1] = 0


def through_split(h: Any) -> None:
    first, second = h.chunk(2, -1)
    first.mul_(2)
    second.unbind(1)[2].zero_()


@pytest.mark.parametrize("edit", [zero_last, through_split])
@pytest.mark.parametrize("place", ["transformer.h.1", "transformer.h.1.mlp.act"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_gradients_together_with_writes_in_place(
    gpt2: LanguageModel, edit: Callable[[Any], None], place: str, frozen: bool
) -> None:
    gpt2.module.requires_grad_(not frozen)
    with gpt2.trace(IDS):
        h, mlp = gpt2.transformer.h[1], gpt2.transformer.h[1].mlp
        edit(h.output[0] if place == h.path else mlp.act.output)
        grad = gpt2.transformer.h[0].output[0].grad.save()
        loss_of(gpt2.lm_head.output).backward()

    def copied(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        if edit is zero_last:
            value[:, -1] = 0
        else:
            half = value.shape[-1] // 2
            value[..., :half] *= 2
            value[:, 2, half:] = 0
        return value

    def follow(value: torch.Tensor) -> torch.Tensor:
        return value if value.requires_grad else value.requires_grad_()

    logits, kept = run(gpt2, {"transformer.h.0": follow, place: copied})
    loss_of(logits).backward()
    assert torch.equal(grad, kept["transformer.h.0"].grad)


def test_each_invocation_has_gradients_of_its_own(gpt2: LanguageModel) -> None:
    grads = []
    with gpt2.trace() as tracer:
        for ids in (IDS, SHORT, OTHER):
            with tracer.invoke(ids):
                grads.append(gpt2.transformer.h[1].output[0].grad.save())
                loss_of(gpt2.lm_head.output).backward()
    for grad, ids in zip(grads, (IDS, SHORT, OTHER), strict=True):
        logits, kept = run(gpt2, {"transformer.h.1": None}, ids)
        loss_of(logits).backward()
        clear(gpt2.module)
        torch.testing.assert_close(grad, kept["transformer.h.1"].grad)


def test_one_loss_of_several_invocations(gpt2: LanguageModel) -> None:
    with gpt2.trace() as tracer:
        with tracer.invoke(IDS):
            one = gpt2.lm_head.output[:, -1]
            first = gpt2.transformer.h[0].output[0].grad.save()
        with tracer.invoke(OTHER):
            other = gpt2.lm_head.output[:, -1]
            second = gpt2.transformer.h[0].output[0].grad.save()
        (one * other).sum().backward()
    path = "transformer.h.0"
    logits_1, kept_1 = run(gpt2, {path: None}, IDS)
    logits_2, kept_2 = run(gpt2, {path: None}, OTHER)
    (logits_1[:, -1] * logits_2[:, -1]).sum().backward()
    clear(gpt2.module)
    assert torch.equal(first, kept_1[path].grad) and torch.equal(second, kept_2[path].grad)


def test_a_gradient_given_to_backward(gpt2: LanguageModel) -> None:
    weights = torch.linspace(-1, 1, 100).expand(1, 6, 100)
    with gpt2.trace(IDS):
        grad = gpt2.transformer.h[0].output[0].grad.save()
        gpt2.lm_head.output.backward(weights)
    logits, kept = run(gpt2, {"transformer.h.0": None})
    logits.backward(weights)
    clear(gpt2.module)
    assert torch.equal(grad, kept["transformer.h.0"].grad)


def test_gradients_of_gradients(gpt2: LanguageModel) -> None:
    gpt2.module.set_attn_implementation("eager")  # the only one with second derivatives
    with gpt2.trace(IDS):
        hidden = gpt2.transformer.h[1].output[0]
        first = hidden.grad
        loss_of(gpt2.lm_head.output).backward(create_graph=True)
        (first**2).sum().backward()
        second = hidden.grad.save()
    logits, kept = run(gpt2, {"transformer.h.1": None})
    value = kept["transformer.h.1"]
    (grad,) = torch.autograd.grad(loss_of(logits), value, create_graph=True)
    (expected,) = torch.autograd.grad((grad**2).sum(), value)
    assert torch.allclose(second.value, expected, atol=1e-7)


def test_the_gradient_of_parameters_that_are_asked_for(gpt2: LanguageModel) -> None:
    weight = gpt2.module.transformer.h[2].mlp.c_fc.weight
    with gpt2.trace(IDS):
        (grad,) = loss_of(gpt2.lm_head.output).backward(inputs=[weight])
        assert grad.shape == weight.shape
        grad.save()
        doubled = (grad * 2).save()
    assert all(parameter.grad is None for parameter in gpt2.module.parameters())
    loss_of(gpt2.module(IDS, use_cache=False).logits).backward()
    assert torch.equal(grad.value, weight.grad)
    assert torch.equal(doubled.value, weight.grad * 2)


def test_the_users_own_tensors_accumulate(gpt2: LanguageModel) -> None:
    vector = torch.zeros(16, requires_grad=True)
    twin = torch.zeros(16, requires_grad=True)
    for _ in range(2):
        with gpt2.trace(IDS):
            gpt2.transformer.h[1].output = gpt2.transformer.h[1].output[0] + vector
            loss_of(gpt2.lm_head.output).backward()
        logits, _ = run(gpt2, {"transformer.h.1": lambda h: h + twin})
        loss_of(logits).backward()
        clear(gpt2.module)
    assert vector.grad is not None and torch.equal(vector.grad, twin.grad)


def test_an_input_of_the_users_that_requires_grad() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    x = torch.ones(2, 3, requires_grad=True)
    with Model(module).trace(x) as tracer:
        tracer.output.sum().backward()
    expected = torch.ones(2, 3, requires_grad=True)
    module(expected).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, expected.grad)


def test_a_value_can_keep_its_graph(gpt2: LanguageModel) -> None:
    vector = torch.zeros(16, requires_grad=True)
    with gpt2.trace(IDS):
        gpt2.transformer.h[1].output = gpt2.transformer.h[1].output[0] + vector
        kept = gpt2.lm_head.output.save(keep_graph=True)
        plain = gpt2.lm_head.output.save()
    assert not plain.value.requires_grad
    loss_of(kept.value).backward()
    clear(gpt2.module)
    found, vector.grad = vector.grad, None
    logits, _ = run(gpt2, {"transformer.h.1": lambda h: h + vector})
    loss_of(logits).backward()
    clear(gpt2.module)
    assert torch.equal(found, vector.grad)


def test_logits_of_a_generation_can_keep_their_graph(gpt2: LanguageModel) -> None:
    vector = torch.zeros(16, requires_grad=True)
    with gpt2.generate(IDS, max_new_tokens=2, eos_token_id=None) as generator:
        gpt2.transformer.h[1].output = gpt2.transformer.h[1].output[0] + vector
        kept = [generator.logits(step).save(keep_graph=True) for step in range(2)]
    sum(loss_of(logits.value[:, None]) for logits in kept).backward()
    found, vector.grad = vector.grad, None

    def steer(hidden: torch.Tensor) -> torch.Tensor:
        changed = hidden.clone()
        changed[:, : IDS.shape[1]] += vector  # in step 0
        return changed

    logits, _ = run(gpt2, {"transformer.h.1": steer}, generator.output[:, :-1])
    (loss_of(logits[:, :-1]) + loss_of(logits)).backward()
    clear(gpt2.module)
    torch.testing.assert_close(found, vector.grad)


@pytest.mark.parametrize("of", ["the head", "what the model returns", "logits"])
def test_gradients_within_a_step_of_a_generation(language_model: LanguageModel, of: str) -> None:
    model = language_model
    options: dict[str, Any] = {"max_new_tokens": 3, "eos_token_id": None}

    def loss(step: int) -> Any:
        if of == "logits":
            return loss_of(generator.logits(step)[:, None])
        return loss_of(model.output.logits if of != "the head" else model.lm_head.output)

    with model.generate(IDS, **options) as generator:
        grad = blocks(model)[1].output[0].grad.save()
        loss(0).backward()
        with generator.step(2):
            later = blocks(model)[1].output[0].grad.save()
            loss(2).backward()
    path = blocks(model)[1].path
    logits, kept = run(model, {path: None})
    loss_of(logits).backward()
    clear(model.module)
    assert torch.allclose(grad.value, kept[path].grad, atol=1e-6)
    logits, kept = run(model, {path: None}, generator.output[:, :-1])
    loss_of(logits).backward()
    clear(model.module)
    assert torch.allclose(later.value, kept[path].grad[:, -1:], atol=1e-6)
    assert not generator.output.requires_grad


@pytest.mark.parametrize("use", ["no backward", "not on the way", "integers", "a tuple"])
def test_mistakes_are_reported_at_their_line(gpt2: LanguageModel, use: str) -> None:
    with pytest.raises(InsituError) as caught, gpt2.trace(IDS):
        logits = gpt2.lm_head.output
        if use == "no backward":
            gpt2.transformer.h[0].output[0].grad.save()  # the line to find
        elif use == "not on the way":
            gpt2.transformer.h[0].output[0][:, 2].grad.save()  # the line to find
        elif use == "integers":
            gpt2.transformer.wte.input.grad.save()  # the line to find
        else:
            gpt2.transformer.h[0].output.grad.save()  # the line to find
        if use != "no backward":
            loss_of(logits).backward()
    assert "the line to find" in str(caught.value)
    kinds = (OperationError, ExecutionError, ShapeError)
    assert isinstance(caught.value, kinds)
    with gpt2.trace(IDS):
        after = gpt2.lm_head.output.save()
    with torch.no_grad():
        assert torch.equal(after, gpt2.module(IDS, use_cache=False).logits)


def test_the_model_cannot_wait_for_a_gradient(gpt2: LanguageModel) -> None:
    with pytest.raises(CausalityError, match="gradients come when"), gpt2.trace(IDS):
        hidden = gpt2.transformer.h[1].output[0]
        loss_of(gpt2.lm_head.output).backward()
        gpt2.transformer.h[1].output = hidden - hidden.grad


def test_a_loss_that_needs_no_gradient_is_torchs_error_at_its_line(gpt2: LanguageModel) -> None:
    with pytest.raises(InsituError, match="does not require grad") as caught, gpt2.trace(IDS):
        gpt2.lm_head.output.argmax(-1).float().sum().backward()  # constant
    assert "constant" in str(caught.value)


def losses(step: Callable[[], float], count: int) -> list[float]:
    return [step() for _ in range(count)]


def test_training_a_steering_vector_goes_as_in_plain_pytorch(eiffel: LanguageModel) -> None:
    prompt, target = "The Eiffel Tower is in the city of", " Rome"
    ids = eiffel.tokenizer(prompt, return_tensors="pt").input_ids
    token = eiffel.tokenizer(target).input_ids[0]
    width = eiffel.config.n_embd
    vector = torch.zeros(width, requires_grad=True)
    optimiser = torch.optim.Adam([vector], lr=0.05)

    def traced() -> float:
        optimiser.zero_grad()
        with eiffel.trace(prompt):
            eiffel.transformer.h[2].output[0][:, -1] += vector
            loss = F.cross_entropy(eiffel.lm_head.output[:, -1], torch.tensor([token]))
            loss.backward()
            value = loss.save()
        optimiser.step()
        return value.value.item()

    module = eiffel.load()
    twin = torch.zeros(width, requires_grad=True)
    twin_optimiser = torch.optim.Adam([twin], lr=0.05)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, -1] += twin
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def plain() -> float:
        twin_optimiser.zero_grad()
        handle = module.transformer.h[2].register_forward_hook(hook)
        logits = module(ids, use_cache=False).logits
        handle.remove()
        loss = F.cross_entropy(logits[:, -1], torch.tensor([token]))
        loss.backward()
        twin_optimiser.step()
        return loss.item()

    found, expected = losses(traced, 12), losses(plain, 12)
    clear(module)
    assert found == expected
    assert found[-1] < found[0] / 2


@pytest.mark.thorough
def test_training_a_linear_probe_goes_as_in_plain_pytorch(eiffel: LanguageModel) -> None:
    prompts = ["The Eiffel Tower is in the city of", "The Colosseum is in the city of"]
    labels = torch.tensor([0, 1])
    module = eiffel.load()

    def probe() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        linear = nn.Linear(eiffel.config.n_embd, 2)
        return linear, torch.optim.Adam(linear.parameters(), lr=0.02)

    linear, optimiser = probe()

    def traced() -> float:
        optimiser.zero_grad()
        with eiffel.trace() as tracer:
            scores = []
            for prompt in prompts:
                with tracer.invoke(prompt):
                    scores.append(linear(eiffel.transformer.h[4].output[0][:, -1]))
            loss = F.cross_entropy(torch.cat(scores), labels)
            loss.backward()
            value = loss.save()
        optimiser.step()
        return value.value.item()

    twin, twin_optimiser = probe()

    def hidden(prompt: str) -> torch.Tensor:
        kept: Sequence[torch.Tensor]
        kept = []
        handle = module.transformer.h[4].register_forward_hook(
            lambda m, a, output: kept.append(output[0] if isinstance(output, tuple) else output)
        )
        module(eiffel.tokenizer(prompt, return_tensors="pt").input_ids, use_cache=False)
        handle.remove()
        return kept[0][:, -1]

    def plain() -> float:
        twin_optimiser.zero_grad()
        scores = torch.cat([twin(hidden(prompt)) for prompt in prompts])
        loss = F.cross_entropy(scores, labels)
        loss.backward()
        twin_optimiser.step()
        return loss.item()

    found, expected = losses(traced, 12), losses(plain, 12)
    clear(module)
    # The prompts share a batch, which some processors round otherwise than each alone.
    assert found == pytest.approx(expected, rel=1e-5) and found[-1] < found[0] / 2
    torch.testing.assert_close(linear.weight, twin.weight)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_what_a_constant_was_computed_of_is_trained_and_no_parameter_of_the_model(
    gpt2: LanguageModel,
) -> None:
    torch.manual_seed(0)
    rotation = nn.utils.parametrizations.orthogonal(nn.Linear(16, 2, bias=False))
    scale = torch.ones(16, requires_grad=True)
    weight = gpt2.module.transformer.h[0].mlp.c_fc.weight[:, :16]  # computed of a parameter

    def loss(hidden: Any, logits: Any) -> Any:
        return (rotation(hidden * (scale * 2)) ** 2).sum() + (logits @ torch.ones(100, 1)).sum()

    with gpt2.trace(IDS):
        hidden = gpt2.transformer.h[1].output[0]
        assert (hidden @ weight).shape == hidden.shape
        loss(hidden @ weight, gpt2.lm_head.output).backward()

    (original,) = rotation.parameters()
    found = [original.grad, scale.grad]
    assert all(parameter.grad is None for parameter in gpt2.module.parameters())
    with torch.no_grad():
        expected = hooked_hidden(gpt2.module, "transformer.h.1", IDS) @ weight
        logits = gpt2.module(input_ids=IDS).logits
    expected_grads = torch.autograd.grad(loss(expected, logits), [original, scale])
    for value, grad in zip(found, expected_grads, strict=True):
        assert value is not None
        torch.testing.assert_close(value, grad)


class Given(nn.Module):
    """Returns what a function makes of its input."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.function(value)


def rectified(inplace: bool, *shown: Callable[[torch.Tensor], torch.Tensor]) -> nn.Sequential:
    """Layers of which the second writes into what the first returned, or does not."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(3, 4), *map(Given, shown)) if shown else nn.Linear(3, 4)
    last = Given(lambda value: value.sin() * 2) if shown else nn.Linear(4, 4)
    return nn.Sequential(first, nn.ReLU(inplace), last)


def _twice_the_first(hidden: Any) -> Any:
    hidden[:, 0] *= 2
    return hidden.mul_(3)


VIEWS = {  # the output of a linear layer is a view too, with more than two axes
    "matrix": ((2, 3), ()),
    "view": ((2, 5, 3), ()),
    "transposed view": ((2, 5, 3), (lambda value: value.transpose(1, 2),)),
    "view of a view": ((2, 5, 3), (lambda value: value.view(2, 20),)),
}


@pytest.mark.parametrize(("shape", "shown"), VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("edit", [None, _twice_the_first, lambda hidden: hidden * 0.5])
@pytest.mark.parametrize(
    "loss",
    [lambda hidden, out: out.sum(), lambda hidden, out: (hidden * out).sum() + hidden.sum()],
    ids=["of the end", "of both"],
)
def test_gradients_of_what_the_model_writes_into(
    edit: Callable[[Any], Any] | None, loss: Callable[[Any, Any], Any], shape: Any, shown: Any
) -> None:
    """They belong to the value that was read, and so does what is computed with it later."""
    model, given = Model(rectified(True, *shown)), torch.randn(shape)
    with model.trace(given):
        hidden = model[0].output
        if edit is not None:
            hidden = edit(hidden)
            model[0].output = hidden
        of_input = model[1].input.grad.save()
        total = loss(hidden, model[2].output)
        total.backward()
        grad, value, total = hidden.grad.save(), hidden.save(), total.save()

    first, relu, last = rectified(False, *shown)
    hidden = first(given) if edit is None else edit(first(given).clone())
    hidden.retain_grad()
    seen = hidden * 1
    seen.retain_grad()
    expected = loss(hidden, last(relu(seen)))
    expected.backward()
    assert torch.equal(value.value, hidden) and torch.equal(total.value, expected)
    torch.testing.assert_close(grad.value, hidden.grad)
    torch.testing.assert_close(of_input.value, seen.grad)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_gradients_of_what_the_model_writes_into_can_be_changed(frozen: bool) -> None:
    model, given = Model(rectified(True)), torch.randn(2, 3)
    model.module.requires_grad_(not frozen)
    with model.trace(given):
        hidden = model[0].output
        before = hidden.grad.save()
        hidden.grad = hidden.grad * 2
        of_input = model[1].input.grad.save()
        model[2].output.sum().backward()
    passing = model.module[2].weight.sum(0) * (hooked(model.module[0], given) > 0)
    assert torch.equal(before.value, passing) and torch.equal(of_input.value, passing)


def hooked(module: nn.Module, given: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(given)


class Beside(nn.Module):
    """Uses a value before it writes into a view of it, or after."""

    def __init__(self, shown: Callable[[torch.Tensor], torch.Tensor], after: bool) -> None:
        super().__init__()
        self.shown, self.after = Given(shown), after

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        value = value * 2
        beside = value.exp().sum()
        changed = self.shown(value).relu_()
        return (value if self.after else changed).sum() + beside


@pytest.mark.parametrize("shown", [lambda value: value[:, 1:], lambda value: value.view(6)])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_the_gradient_of_a_part_that_is_written_into(shown: Any, frozen: bool) -> None:
    given = torch.randn(2, 3, requires_grad=not frozen)
    model = Model(Beside(shown, False))
    with model.trace(given):
        grad = model.shown.output.grad.save()
        model.output.backward()
    assert torch.equal(grad.value, (shown(given) > 0).float())
    if not frozen:
        value = given.detach().requires_grad_()
        (shown(value * 2).relu().sum() + (value * 2).exp().sum()).backward()
        assert torch.equal(given.grad, value.grad)


def test_a_value_that_the_model_overwrites_by_another_name_has_no_gradient() -> None:
    model = Model(Beside(lambda value: value.view(6), True))
    with pytest.raises(ExecutionError, match="same memory by another name") as caught:
        with model.trace(torch.randn(2, 3, requires_grad=True)):
            model.shown.output.grad.save()
            model.output.backward()
    assert "model.shown.output.grad.save()" in str(caught.value)


@pytest.mark.no_wire  # functions do not travel
def test_what_a_function_writes_into_a_value_counts_as_the_blocks_own() -> None:
    def thrice(hidden: torch.Tensor) -> torch.Tensor:
        hidden.mul_(3)
        return hidden.sum()

    model, given = Model(rectified(False)), torch.randn(2, 3)
    with model.trace(given):
        hidden = model[0].output
        total = apply(thrice, hidden)
        (model[2].output.sum() + total).backward()
        grad, value = hidden.grad.save(), hidden.save()
    first, relu, last = rectified(False)
    expected = first(given) * 3
    expected.retain_grad()
    (last(relu(expected)).sum() + expected.sum()).backward()
    assert torch.equal(value.value, expected)
    torch.testing.assert_close(grad.value, expected.grad)

    def wrong(hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.zeros(4, requires_grad=True).add_(1)

    model.module.requires_grad_(False)
    with pytest.raises(InsituError, match="a leaf Variable") as caught, model.trace(given):
        model[0].output.grad.save()
        (model[2].output.sum() + apply(wrong, model[0].output).sum()).backward()
    assert "apply(wrong, model[0].output)" in str(caught.value)


def test_autograd_begins_at_the_first_value_in_a_frozen_model(gpt2: LanguageModel) -> None:
    gpt2.module.requires_grad_(False)
    recorded: list[bool] = []
    for block in gpt2.module.transformer.h:
        block.register_forward_pre_hook(lambda m, args: recorded.append(args[0].requires_grad))
    with torch.no_grad(), gpt2.trace(IDS):
        gpt2.transformer.h[1].output[0].grad.save()
        loss_of(gpt2.lm_head.output).backward()
    assert recorded[:2] == [False, False] and all(recorded[2:4])


@pytest.mark.parametrize("options", [{}, {"allow_unused": True}, {"materialize_grads": True}])
def test_named_values_are_inputs_of_a_backward_pass(options: dict[str, bool]) -> None:
    """Heads are a view of what the output projection is given, on which the loss depends."""
    module: Any = tiny_llama()
    given: list[torch.Tensor] = []

    def hook(_: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        given.append(args[0].detach().requires_grad_())
        return (given[-1],)

    handle = module.model.layers[1].self_attn.o_proj.register_forward_pre_hook(hook)
    logits = module(torch.tensor([[5, 6, 7]]), use_cache=False).logits
    handle.remove()
    (expected,) = torch.autograd.grad(logits[0, -1, 3], given)
    expected = expected.unflatten(-1, (4, -1)).transpose(1, 2)
    model = LanguageModel(module)
    with model.trace([5, 6, 7]):
        z, loss = model.blocks[1].attention.z, model.logits[0, -1, 3]
        (found,) = torch.autograd.grad(loss, [z], retain_graph=True, **options)
        (same,) = loss.backward(inputs=[z])
        found, same = found.save(), same.save()
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(found.value, expected)
    torch.testing.assert_close(same.value, expected)
