"""Gradients of sites, against hooks that return `x.view_as(x)` and keep it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from insitu import BlockError, ExecutionError, InsituError, LanguageModel, Model, OperationError
from tests.conftest import tiny_gpt2, tiny_llama
from tests.fidelity.test_gradients import loss_of
from tests.fidelity.test_writing import IDS, OTHER, SHORT, blocks

Place = tuple[str, str]
Edit = Callable[[torch.Tensor], torch.Tensor]


def first_tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else value[0]


def with_first(value: Any, new: torch.Tensor) -> Any:
    return new if isinstance(value, torch.Tensor) else (new, *value[1:])


def passing(value: torch.Tensor) -> torch.Tensor:
    """A new tensor at a place."""
    return value.view_as(value) if value.requires_grad else value.detach().requires_grad_()


@contextmanager
def kept_at(
    module: nn.Module, places: Sequence[Place], edits: Mapping[Place, Edit] | None = None
) -> Iterator[dict[Place, torch.Tensor]]:
    """Keeps what passes some places as new tensors, with which the model goes on."""
    kept: dict[Place, torch.Tensor] = {}

    def seen(place: Place, value: torch.Tensor) -> torch.Tensor:
        if edits is not None and place in edits:
            value = edits[place](value)
        kept[place] = passing(value)
        return kept[place]

    def after(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return with_first(output, seen((path, "output"), first_tensor(output)))

        return hook

    def before(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (seen((path, "input"), args[0]), *args[1:]), kwargs
            key = next(iter(kwargs))
            return args, {**kwargs, key: seen((path, "input"), kwargs[key])}

        return hook

    handles = []
    for path, kind in places:
        part = module.get_submodule(path)
        if kind == "input":
            handles.append(part.register_forward_pre_hook(before(path), with_kwargs=True))
        else:
            handles.append(part.register_forward_hook(after(path)))
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def plain_gradients(
    module: nn.Module, ids: torch.Tensor, places: Sequence[Place]
) -> list[torch.Tensor]:
    with kept_at(module, places) as kept:
        logits = module(ids, use_cache=False).logits
    return list(torch.autograd.grad(loss_of(logits), [kept[place] for place in places]))


def handle_of(model: LanguageModel, path: str) -> Any:
    handle: Any = model
    for part in path.split("."):
        handle = handle[int(part)] if part.isdigit() else getattr(handle, part)
    return handle


def site_of(model: LanguageModel, place: Place) -> Any:
    path, kind = place
    value = getattr(handle_of(model, path), kind)
    is_block = kind == "output" and path in [block.path for block in blocks(model)]
    is_tuple = kind == "output" and path.rpartition(".")[2] in ("attn", "self_attn")
    return value[0] if is_block or is_tuple else value


PLACES: dict[str, list[Place]] = {
    "gpt2": [
        ("transformer.wte", "output"),
        ("transformer.h.0", "output"),
        ("transformer.h.1", "input"),
        ("transformer.h.1.ln_1", "input"),
        ("transformer.h.1.ln_1", "output"),
        ("transformer.h.1.attn", "input"),
        ("transformer.h.1.attn", "output"),
        ("transformer.h.1.ln_2", "input"),
        ("transformer.h.1.mlp", "input"),
        ("transformer.h.1.mlp.c_fc", "output"),
        ("transformer.h.1.mlp.act", "input"),
        ("transformer.h.1.mlp", "output"),
        ("transformer.h.1", "output"),
        ("transformer.ln_f", "input"),
        ("lm_head", "input"),
    ],
    "llama": [
        ("model.embed_tokens", "output"),
        ("model.layers.1", "input"),
        ("model.layers.1.input_layernorm", "input"),
        ("model.layers.1.self_attn.q_proj", "input"),
        ("model.layers.1.self_attn.k_proj", "input"),
        ("model.layers.1.self_attn", "output"),
        ("model.layers.1.post_attention_layernorm", "input"),
        ("model.layers.1.mlp", "input"),
        ("model.layers.1.mlp.up_proj", "input"),
        ("model.layers.1.mlp.gate_proj", "input"),
        ("model.layers.1.mlp.act_fn", "output"),
        ("model.layers.2", "output"),
        ("model.norm", "input"),
    ],
}


@pytest.mark.parametrize(
    "frozen", [False, pytest.param(True, marks=pytest.mark.thorough)], ids=["trainable", "frozen"]
)
@pytest.mark.parametrize("name", PLACES)
def test_a_gradient_is_of_what_passes_there_whatever_else_is_asked_for(
    name: str, frozen: bool
) -> None:
    model = LanguageModel(tiny_gpt2() if name == "gpt2" else tiny_llama())
    places = PLACES[name]
    expected = dict(zip(places, plain_gradients(model.module, IDS, places), strict=True))
    model.module.requires_grad_(not frozen)
    for asked in ([place] for place in places):
        with model.trace(IDS):
            found = [site_of(model, place).grad.save() for place in asked]
            loss_of(model.lm_head.output).backward()
        torch.testing.assert_close(found[0].value, expected[asked[0]], msg=str(asked))
    for asked in (places, places[::-1], places[::3]):
        with model.trace(IDS):
            found = [site_of(model, place).grad.save() for place in asked]
            loss_of(model.lm_head.output).backward()
        for place, grad in zip(asked, found, strict=True):
            torch.testing.assert_close(grad.value, expected[place], msg=str(place))
    assert all(parameter.grad is None for parameter in model.module.parameters())
    assert all(parameter.requires_grad is not frozen for parameter in model.module.parameters())


def test_the_input_of_a_norm_is_not_the_residual_stream(gpt2: LanguageModel) -> None:
    """What passes the norm is one use of the stream, and a write there changes that one alone."""
    with gpt2.trace(IDS):
        of_norm = gpt2.transformer.h[1].ln_1.input.grad.save()
        of_stream = gpt2.transformer.h[1].input.grad.save()
        loss_of(gpt2.lm_head.output).backward()
    change = 1e-3 * torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(1)).double()
    double = LanguageModel(gpt2.module.double())
    ends = []
    for sign in (1, -1):
        with double.trace(IDS):
            double.transformer.h[1].ln_1.input += sign * change
            ends.append(loss_of(double.lm_head.output).save())
    slope = float(ends[0].value - ends[1].value) / 2
    assert slope == pytest.approx(float((of_norm.value * change).sum()), rel=1e-3)
    assert abs(slope - float((of_stream.value * change).sum())) > abs(slope) / 10


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_after_a_write_it_is_of_the_value_as_of_the_line(gpt2: LanguageModel, frozen: bool) -> None:
    gpt2.module.requires_grad_(not frozen)
    with gpt2.trace(IDS):
        hidden = gpt2.transformer.h[1].output[0]
        arrived = hidden.grad.save()
        hidden[:, 1:3] *= 2
        once = gpt2.transformer.h[1].output[0].grad.save()
        gpt2.transformer.h[1].output[0][..., :4] = 0
        twice = hidden.grad.save()
        gpt2.transformer.h[1].output = gpt2.transformer.h[1].output[0] * 3
        thrice = gpt2.transformer.h[1].output[0].grad.save()
        (loss_of(gpt2.lm_head.output) + hidden.square().sum()).backward()
        later = [hidden.grad.save(), gpt2.transformer.h[1].output[0].grad.save()]

    values: list[torch.Tensor] = []

    def edited(value: torch.Tensor) -> torch.Tensor:
        values.append(passing(value))
        for change in (doubled, zeroed):
            values.append(passing(change(values[-1])))
        values.append(passing(values[-1] * 3))
        return values[-1]

    def doubled(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, 1:3] *= 2
        return value

    def zeroed(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[..., :4] = 0
        return value

    place = ("transformer.h.1", "output")
    with kept_at(gpt2.module, [place], {place: edited}):
        logits = gpt2.module(IDS, use_cache=False).logits
    expected = torch.autograd.grad(loss_of(logits) + values[2].square().sum(), values)
    for grad, right in zip((arrived, once, twice, thrice), expected, strict=True):
        torch.testing.assert_close(grad.value, right)
    torch.testing.assert_close(later[0].value, expected[2])
    torch.testing.assert_close(later[1].value, expected[3])


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_what_is_assigned_is_another_value_than_what_stands_there(
    gpt2: LanguageModel, frozen: bool
) -> None:
    """The loss uses what was assigned in another way too, which is no use of the site."""
    gpt2.module.requires_grad_(not frozen)
    with gpt2.trace(IDS):
        new = gpt2.transformer.h[0].output[0] * 2
        gpt2.transformer.h[2].output = new
        (loss_of(gpt2.lm_head.output) + new.sum()).backward()
        of_site = gpt2.transformer.h[2].output[0].grad.save()
        of_value = new.grad.save()
    place = ("transformer.h.2", "output")
    with kept_at(gpt2.module, [("transformer.h.0", "output")]) as kept:
        with kept_at(gpt2.module, [place], {place: lambda value: new_of(kept)}) as there:
            logits = gpt2.module(IDS, use_cache=False).logits
    expected = torch.autograd.grad(loss_of(logits), there[place])[0]
    torch.testing.assert_close(of_site.value, expected)
    torch.testing.assert_close(of_value.value, expected + 1)


def new_of(kept: Mapping[Place, torch.Tensor]) -> torch.Tensor:
    return kept["transformer.h.0", "output"] * 2


class Several(nn.Module):
    """Takes and returns several tensors, some of which are the same."""

    def forward(self, one: torch.Tensor, *, other: torch.Tensor) -> dict[str, Any]:
        return {"sum": one + other, "parts": (one, [other * 2, one])}


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.several, self.last = nn.Linear(3, 3), Several(), nn.Linear(3, 3)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        value = self.first(value)
        found = self.several(value, other=value)
        one, (other, again) = found["parts"]
        return self.last(found["sum"] * one + other * again + value)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_entries_of_what_passes_have_gradients_of_their_own(frozen: bool) -> None:
    torch.manual_seed(0)
    model, given = Model(Around()), torch.randn(2, 3)
    first, several, last = model.module.children()
    model.module.requires_grad_(not frozen)
    with model.trace(given):
        arguments, output = model.several.inputs, model.several.output
        grads = [
            arguments[0][0].grad.save(),
            arguments[1]["other"].grad.save(),
            output["sum"].grad.save(),
            output["parts"][0].grad.save(),
            output["parts"][1][0].grad.save(),
            output["parts"][1][1].grad.save(),
            model.last.input.grad.save(),
        ]
        model.last.output.square().sum().backward()
    value = passing(first(given))
    one, other = passing(value), passing(value)
    made = several(one, other=other)
    parts = [made["sum"], made["parts"][0], *made["parts"][1]]
    parts = [passing(part) for part in parts]
    end = passing(parts[0] * parts[1] + parts[2] * parts[3] + value)
    expected = torch.autograd.grad(last(end).square().sum(), [one, other, *parts, end])
    for grad, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.value, right)


def test_a_tuple_of_which_one_entry_was_written() -> None:
    model, given = Model(Around()), torch.randn(2, 3)
    with model.trace(given):
        output = model.several.output
        output["parts"][0][:, 0] = 1
        written, beside = output["parts"][0].grad.save(), output["parts"][1][1].grad.save()
        model.last.output.square().sum().backward()
    first, several, last = model.module.children()
    value = passing(first(given))
    made = several(value, other=value)
    changed = made["parts"][0].clone()
    changed[:, 0] = 1
    changed, again = passing(changed), passing(made["parts"][1][1])
    end = made["sum"] * changed + made["parts"][1][0] * again + value
    expected = torch.autograd.grad(last(end).square().sum(), [changed, again])
    torch.testing.assert_close(written.value, expected[0])
    torch.testing.assert_close(beside.value, expected[1])


# --- which backward pass


def gradients_of(module: nn.Module, path: str, ids: torch.Tensor, *tokens: int) -> list[Any]:
    with kept_at(module, [(path, "output")]) as kept:
        logits = module(ids, use_cache=False).logits
    value = kept[path, "output"]
    return [
        torch.autograd.grad(logits[:, -1, token].sum(), value, retain_graph=True)[0]
        for token in tokens
    ]


def test_a_with_names_the_backward_pass(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        hidden, logits = gpt2.transformer.h[1].output[0], gpt2.lm_head.output
        waiting = hidden.grad.save()  # of the first one after it
        one = logits[:, -1, 3].sum().backward(retain_graph=True)
        other = logits[:, -1, 4].sum().backward()
        with one:
            first = hidden.grad.save()
            with other:
                second = hidden.grad.save()
            again = gpt2.transformer.h[1].output[0].grad.save()
        last = hidden.grad.save()
    three, four = gradients_of(gpt2.module, "transformer.h.1", IDS, 3, 4)
    for grad, right in (
        (waiting, three),
        (first, three),
        (again, three),
        (second, four),
        (last, four),
    ):
        assert torch.equal(grad.value, right)
    with pytest.raises(BlockError), one:
        pass


def test_a_gradient_of_an_invocation_is_of_its_own_backward_pass(gpt2: LanguageModel) -> None:
    """Whether it is read before that or behind it, and whatever passes others have."""
    found: list[tuple[torch.Tensor, int, Any]] = []
    with gpt2.trace() as tracer:
        for ids, token in ((IDS, 3), (SHORT, 4), (OTHER, 5)):
            with tracer.invoke(ids):
                hidden = gpt2.transformer.h[1].output[0]
                found.append((ids, token, hidden.grad.save()))
                gpt2.lm_head.output[:, -1, token].sum().backward()
                found.append((ids, token, hidden.grad.save()))
        with tracer.invoke(IDS):
            vector = torch.ones(100, requires_grad=True)
            (gpt2.lm_head.output[:, -1, 6].sum() * vector.sum()).backward()
    for ids, token, grad in found:
        (right,) = gradients_of(gpt2.module, "transformer.h.1", ids, token)
        torch.testing.assert_close(grad.value, right)


def test_a_loss_of_another_invocation_counts_where_values_go_there(gpt2: LanguageModel) -> None:
    with gpt2.trace() as tracer:
        with tracer.invoke(OTHER):
            gpt2.lm_head.output[:, -1, 9].sum().backward(inputs=[gpt2.module.lm_head.weight])
        with tracer.invoke(SHORT):
            given = gpt2.transformer.h[0].output[0]
        with tracer.invoke(SHORT):
            gpt2.transformer.h[1].output = given * 2
            gpt2.lm_head.output[:, -1, 3].sum().backward()
        grad = given.grad.save()
    place = ("transformer.h.1", "output")
    with kept_at(gpt2.module, [("transformer.h.0", "output")]) as kept:
        with kept_at(gpt2.module, [place], {place: lambda value: new_of(kept)}):
            logits = gpt2.module(SHORT, use_cache=False).logits
    (expected,) = torch.autograd.grad(logits[:, -1, 3].sum(), kept["transformer.h.0", "output"])
    torch.testing.assert_close(grad.value, expected)


def test_steps_of_a_generation_have_backward_passes_of_their_own(gpt2: LanguageModel) -> None:
    with gpt2.generate(IDS, max_new_tokens=2, eos_token_id=None) as generator:
        gpt2.lm_head.output[:, -1, 3].sum().backward(retain_graph=True)
        first = gpt2.transformer.h[1].output[0].grad.save()
        with generator.step(1):
            second = gpt2.transformer.h[1].output[0].grad.save()
            gpt2.lm_head.output[:, -1, 4].sum().backward()
    (right,) = gradients_of(gpt2.module, "transformer.h.1", IDS, 3)
    torch.testing.assert_close(first.value, right)
    (right,) = gradients_of(gpt2.module, "transformer.h.1", generator.output[:, :-1], 4)
    torch.testing.assert_close(second.value, right[:, -1:], atol=1e-6, rtol=1e-4)


# --- gradients that are returned


def test_backward_returns_gradients_in_the_order_of_its_inputs(gpt2: LanguageModel) -> None:
    block = gpt2.module.transformer.h[2]
    vector = torch.ones(16, requires_grad=True)
    beside = torch.ones(16, requires_grad=True)
    with gpt2.trace(IDS):
        hidden = gpt2.transformer.h[1].output[0]
        hidden += vector + beside
        named = [block.mlp.c_fc.weight, hidden, vector, block.ln_1.bias]
        grads = loss_of(gpt2.lm_head.output).backward(inputs=named)
        product = (grads[0] * block.mlp.c_fc.weight.detach()).sum().save()
        norms = [grad.norm().save() for grad in grads]
        grads = [grad.save() for grad in grads]
    place = ("transformer.h.1", "output")
    added = torch.ones(16, requires_grad=True)
    with kept_at(gpt2.module, [place], {place: lambda value: value + added + 1}) as kept:
        logits = gpt2.module(IDS, use_cache=False).logits
    inputs = [block.mlp.c_fc.weight, kept[place], added, block.ln_1.bias]
    expected = torch.autograd.grad(loss_of(logits), inputs)
    for grad, norm, right in zip(grads, norms, expected, strict=True):
        torch.testing.assert_close(grad.value, right)
        torch.testing.assert_close(norm.value, right.norm())
    torch.testing.assert_close(product.value, (expected[0] * block.mlp.c_fc.weight).sum().detach())
    assert all(parameter.grad is None for parameter in gpt2.module.parameters())
    torch.testing.assert_close(vector.grad, expected[2])  # as torch's `backward(inputs=[vector])`
    assert beside.grad is None


def test_a_recorded_grad_is_torchs(gpt2: LanguageModel) -> None:
    gpt2.module.set_attn_implementation("eager")  # the only one with second derivatives
    weight = gpt2.module.lm_head.weight
    seeds = torch.linspace(-1, 1, 100).expand(1, 6, 100)
    unused = torch.ones(2, requires_grad=True)
    with gpt2.trace(IDS):
        hidden, logits = gpt2.transformer.h[1].output[0], gpt2.lm_head.output
        one, tied = torch.autograd.grad(
            logits, (hidden, weight), grad_outputs=seeds, create_graph=True
        )
        curved = torch.autograd.grad(one.square().sum(), hidden, retain_graph=True)[0].save()
        both = torch.autograd.grad(
            [logits.sum(), hidden.sum()], [hidden], retain_graph=True, allow_unused=True
        )[0].save()
        none, some = torch.autograd.grad(
            logits.sum(), [unused, hidden], allow_unused=True, retain_graph=True
        )
        zeros = torch.autograd.grad(logits.sum(), unused, materialize_grads=True)
        kept = [value.save() for value in (one, tied, none, some, zeros[0])]
    with kept_at(gpt2.module, [("transformer.h.1", "output")]) as there:
        logits = gpt2.module(IDS, use_cache=False).logits
    value = there["transformer.h.1", "output"]
    first = torch.autograd.grad(logits, [value, weight], seeds, create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), value, retain_graph=True)[0]
    total = torch.autograd.grad([logits.sum(), value.sum()], [value], retain_graph=True)[0]
    plain = torch.autograd.grad(logits.sum(), value)[0]
    torch.testing.assert_close(kept[0].value, first[0].detach())
    torch.testing.assert_close(kept[1].value, first[1].detach())
    torch.testing.assert_close(curved.value, second)
    torch.testing.assert_close(both.value, total)
    assert kept[2].value is None
    torch.testing.assert_close(kept[3].value, plain)
    assert torch.equal(kept[4].value, torch.zeros(2))
    assert weight.grad is None and unused.grad is None


def test_what_cannot_be_returned_is_refused_at_its_line(gpt2: LanguageModel) -> None:
    module = gpt2.module
    frozen = module.transformer.h[0].ln_1.weight.requires_grad_(False)
    mistakes: list[tuple[Any, type[InsituError], str]] = [
        (lambda loss: loss.backward(inputs=[]), OperationError, "is empty"),
        (lambda loss: loss.backward(inputs=["h"]), OperationError, "str has no gradient"),
        (
            lambda loss: loss.backward(inputs=[gpt2.transformer.h[0].output]),
            OperationError,
            r"\[0\]",
        ),
        (lambda loss: loss.backward(inputs=[frozen]), ExecutionError, "requires_grad_"),
        (
            lambda loss: torch.autograd.grad(loss, torch.ones(2, requires_grad=True)),
            ExecutionError,
            "allow_unused",
        ),
        (
            lambda loss: torch.autograd.grad(loss, gpt2.transformer.h[0].output[0][:, 1]),
            ExecutionError,
            "does not depend on it",
        ),
        (
            lambda loss: torch.autograd.grad(
                loss, gpt2.transformer.h[0].output[0], torch.ones(2), is_grads_batched=True
            ),
            OperationError,
            "is_grads_batched",
        ),
    ]
    for mistake, kind, said in mistakes:
        with pytest.raises(kind, match=said) as caught, gpt2.trace(IDS):
            mistake(loss_of(gpt2.lm_head.output))
        assert caught.value.location is not None
        assert caught.value.location.file == __file__
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_parameter_that_a_function_in_a_forward_is_given_gets_no_gradient(
    gpt2: LanguageModel,
) -> None:
    with gpt2.trace(IDS):
        inputs = gpt2.transformer.h[0].attn.c_attn.ops.addmm[0].inputs
        (grad,) = loss_of(gpt2.lm_head.output).backward(inputs=[inputs[0][2]])
        grad.save()
    weight = gpt2.module.transformer.h[0].attn.c_attn.weight
    assert all(parameter.grad is None for parameter in gpt2.module.parameters())
    (right,) = torch.autograd.grad(loss_of(gpt2.module(IDS, use_cache=False).logits), weight)
    torch.testing.assert_close(grad.value, right)


def test_weights_are_named_before_they_are_loaded(tmp_path: Any) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    model = LanguageModel(str(tmp_path))
    bias = model.module.transformer.ln_f.bias  # without data so far
    with model.trace(IDS):
        (grad,) = loss_of(model.lm_head.output).backward(inputs=bias)
        assert grad.shape == (16,)
        grad.save()
    module = model.module
    (right,) = torch.autograd.grad(
        loss_of(module(IDS, use_cache=False).logits), module.transformer.ln_f.bias
    )
    torch.testing.assert_close(grad.value, right)


# --- beside other things that a block does


def test_a_value_written_back_where_it_was_read_is_trained(gpt2: LanguageModel) -> None:
    torch.manual_seed(0)
    rotation = nn.utils.parametrizations.orthogonal(nn.Linear(16, 16, bias=False))
    gate = nn.Linear(16, 16)

    def changed(value: Any) -> Any:
        value[:, -1] = rotation(value[:, -1]) * torch.sigmoid(gate(value[:, 0]))
        value[..., :8] = value[..., :8] * gate(value).tanh()[..., 8:]
        return value

    with gpt2.trace(IDS):
        changed(gpt2.transformer.h[1].output[0])
        loss_of(gpt2.lm_head.output).backward()
    parameters = [*rotation.parameters(), *gate.parameters()]
    found = [parameter.grad for parameter in parameters]
    place = ("transformer.h.1", "output")

    def edited(value: torch.Tensor) -> torch.Tensor:
        last = rotation(value[:, -1]) * torch.sigmoid(gate(value[:, 0]))
        value = torch.cat([value[:, :-1], last[:, None]], 1)
        half = value[..., :8] * gate(value).tanh()[..., 8:]
        return torch.cat([half, value[..., 8:]], -1)

    with kept_at(gpt2.module, [place], {place: edited}):
        logits = gpt2.module(IDS, use_cache=False).logits
    for grad, right in zip(found, torch.autograd.grad(loss_of(logits), parameters), strict=True):
        torch.testing.assert_close(grad, right)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_a_loss_that_the_model_overwrites_is_the_loss_as_it_was(frozen: bool) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    model, given = Model(module.requires_grad_(not frozen)), torch.randn(2, 3)
    seeds = torch.linspace(-1, 1, 8).reshape(2, 4)
    for loss in (lambda value: value, lambda value: value[:, 1:3]):
        with model.trace(given):
            grad = model[0].input.grad.save()
            loss(model[0].output).backward(loss(seeds))
            _ = model[2].output.save()
        value = given.clone().requires_grad_()
        loss(module[0](value)).backward(loss(seeds))
        torch.testing.assert_close(grad.value, value.grad)
        module.zero_grad()


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_of_a_module_that_is_skipped_the_gradient_is_of_what_stands_there(
    gpt2: LanguageModel, frozen: bool
) -> None:
    gpt2.module.requires_grad_(not frozen)
    with gpt2.trace(IDS):
        gpt2.transformer.h[2].skip(gpt2.transformer.h[2].input)
        standing = gpt2.transformer.h[2].output[0].grad.save()
        of_input = gpt2.transformer.h[2].input.grad.save()
        loss_of(gpt2.lm_head.output).backward()
    places = [("transformer.h.2", "input"), ("transformer.h.2", "output")]
    with kept_at(gpt2.module, places[:1]) as kept:
        with kept_at(gpt2.module, places[1:], {places[1]: lambda value: kept[places[0]]}) as there:
            logits = gpt2.module(IDS, use_cache=False).logits
    values = [there[places[1]], kept[places[0]]]
    expected = torch.autograd.grad(loss_of(logits), values)
    torch.testing.assert_close(standing.value, expected[0])
    torch.testing.assert_close(of_input.value, expected[1])


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("in_place", [False, True], ids=["assigned", "in place"])
def test_beside_a_write_in_every_step(gpt2: LanguageModel, frozen: bool, in_place: bool) -> None:
    gpt2.module.requires_grad_(not frozen)
    with gpt2.generate(IDS, max_new_tokens=2, eos_token_id=None) as generator:
        with generator.every_step():
            if in_place:
                gpt2.transformer.h[1].output[0][:] *= 2
            else:
                gpt2.transformer.h[1].output = gpt2.transformer.h[1].output[0] * 2
        grad = gpt2.transformer.h[1].output[0].grad.save()
        loss_of(gpt2.lm_head.output).backward()
    place = ("transformer.h.1", "output")
    with kept_at(gpt2.module, [place], {place: lambda value: value * 2}) as kept:
        logits = gpt2.module(IDS, use_cache=False).logits
    torch.testing.assert_close(grad.value, torch.autograd.grad(loss_of(logits), kept[place])[0])


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_a_gradient_of_a_layers_keys_is_of_what_later_steps_use(
    llama: LanguageModel, frozen: bool
) -> None:
    """They are given where the layer returns, when its own step has used them."""
    llama.module.requires_grad_(not frozen)
    with llama.generate(IDS, max_new_tokens=2, eos_token_id=None) as generator:
        keys, values = llama.model.layers[1].output[1]
        with generator.step(1):
            loss_of(llama.lm_head.output).backward()
        grads = [keys.grad.save(), values.grad.save()]
    cache = DynamicCache(config=llama.config)
    llama.module(IDS, past_key_values=cache)
    layer = cache.layers[1]
    layer.keys, layer.values = passing(layer.keys), passing(layer.values)
    kept = [layer.keys, layer.values]
    logits = llama.module(generator.output[:, -2:-1], past_key_values=cache).logits
    for grad, right in zip(grads, torch.autograd.grad(loss_of(logits), kept), strict=True):
        torch.testing.assert_close(grad.value, right)
