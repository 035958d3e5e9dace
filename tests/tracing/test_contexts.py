"""Contexts around lines of a block hold for what is recorded there, as they do in a hook."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from insitu import Job, LanguageModel, Model, apply, cond, fold
from tests.thinning import sampled

PROMPT = [1, 2, 3, 4]


def hidden_states(model: LanguageModel, change: Callable[[Any], Any] | None = None) -> Any:
    """What block 2 returns in a plain forward, with a function applied to it, and the logits."""
    kept: dict[str, Any] = {}

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        kept["made"] = first if change is None else change(first)
        if change is None:
            return None
        return (kept["made"], *output[1:]) if isinstance(output, tuple) else kept["made"]

    handle = model.module.transformer.h[2].register_forward_hook(hook)
    try:
        kept["logits"] = model.module(torch.tensor([PROMPT])).logits
    finally:
        handle.remove()
    return kept


def no_grad_lines(x: Any) -> Any:
    with torch.no_grad():
        return x * 3


def switched(x: Any) -> Any:
    with torch.set_grad_enabled(False):
        return x.exp()


@torch.no_grad()
def decorated(x: Any) -> Any:
    return torch.softmax(x, -1)


def inference(x: Any) -> Any:
    with torch.inference_mode():
        y = x.sin() @ torch.ones(16, 16)
    return y.clone()


def nested(x: Any) -> Any:
    with torch.no_grad():
        y = x * 2
        with torch.enable_grad():
            z = x * y
    return y + z


def switched_by_calls(x: Any) -> Any:
    torch.set_grad_enabled(False)
    y = x.cos()
    torch.set_grad_enabled(True)
    return y * x


def in_place(x: Any) -> Any:
    y = x * 2
    with torch.no_grad():
        y[:, 0] *= 5
        y += x
    return y * x


def view(x: Any) -> Any:
    with torch.no_grad():
        part = x[:, 1:].transpose(1, 2)
    return (part * 2).sum() * x


def by_apply(x: Any) -> Any:
    with torch.no_grad():
        return apply(lambda y: y**3, x) if not isinstance(x, torch.Tensor) else x**3


def in_fold(x: Any) -> Any:
    def step(carry: Any, item: Any) -> Any:
        with torch.no_grad():
            weight = item.exp()
        return carry * 0.5 + weight * item

    if isinstance(x, torch.Tensor):
        carry: Any = torch.zeros(4, 16)
        for item in x:
            carry = step(carry, item)
        return carry
    return fold(step, torch.zeros(4, 16), x)


def in_cond(x: Any) -> Any:
    def then(y: Any) -> Any:
        with torch.no_grad():
            scale = y.norm(dim=-1, keepdim=True)
        return y / scale

    if isinstance(x, torch.Tensor):
        return then(x)
    return cond(x.isfinite().all(), then, lambda y: y, x)


def cond_inside(x: Any) -> Any:
    with torch.no_grad():
        if isinstance(x, torch.Tensor):
            return x * 2
        return cond(x.isfinite().all(), lambda y: y * 2, lambda y: y, x)


FUNCTIONS = [
    *(no_grad_lines, switched, decorated, inference, nested, switched_by_calls, in_place, view),
    *(by_apply, in_fold, in_cond, cond_inside),
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_are_cut_off_where_a_hook_would_cut_them(
    gpt2: LanguageModel, function: Callable[[Any], Any]
) -> None:
    with gpt2.trace(PROMPT) as tracer:
        x = gpt2.transformer.h[2].output[0]
        grad = x.grad.save()
        ours = function(x).save()
        (function(x) * x).sum().backward()
    x = hidden_states(gpt2)["made"].detach().requires_grad_()
    (function(x) * x).sum().backward()
    torch.testing.assert_close(ours.value, function(x).detach())
    torch.testing.assert_close(grad.value, x.grad)
    if function is not by_apply:
        sent = Job.from_bytes(tracer.job.to_bytes()).blocks[0].graph
        assert sent.contexts == tracer.graph.contexts


def test_a_graph_without_contexts_travels_as_before(gpt2: LanguageModel) -> None:
    with gpt2.trace(PROMPT) as tracer:
        (gpt2.transformer.h[2].output[0] * 2).save()
    assert not tracer.graph.contexts
    assert "contexts" not in vars(Job.from_bytes(tracer.job.to_bytes()).blocks[0].graph)


def test_a_write_under_no_grad_cuts_off_what_comes_before(gpt2: LanguageModel) -> None:
    with gpt2.trace(PROMPT):
        early = gpt2.transformer.h[1].output[0].grad.save()
        block = gpt2.transformer.h[2]
        with torch.no_grad():
            half = block.output[0] * 0.5
        block.output = block.output[0] * half
        gpt2.output.logits.sum().backward()
    kept: dict[str, Any] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept["early"] = output[0] if isinstance(output, tuple) else output
        kept["early"].retain_grad()

    handle = gpt2.module.transformer.h[1].register_forward_hook(keep)

    def change(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            half = x * 0.5
        return x * half

    hidden_states(gpt2, change)["logits"].sum().backward()
    handle.remove()
    torch.testing.assert_close(early.value, kept["early"].grad)


def test_reading_saving_assigning_and_backward_are_no_operations(gpt2: LanguageModel) -> None:
    def run(context: Callable[[], AbstractContextManager[Any]]) -> list[torch.Tensor]:
        with gpt2.trace(PROMPT):
            block = gpt2.transformer.h[2]
            with context():
                x = block.output[0]
                z = gpt2.transformer.h[1].attn.z
            grads = [x.grad, z.grad]
            doubled = x * 2
            with context():
                block.output = doubled
                grads = [grad.save() for grad in grads]
                logits = gpt2.output.logits.save()
            loss = gpt2.output.logits.square().sum() + z.square().sum()
            with context():
                loss.backward()
        return [logits.value, *(grad.value for grad in grads)]

    plain = run(nullcontext)
    for mine, other in zip(run(torch.no_grad), plain, strict=True):
        torch.testing.assert_close(mine, other)
    assert plain[1].abs().sum() > 0 and plain[2].abs().sum() > 0


def test_what_is_around_a_whole_block_holds_for_its_run(gpt2: LanguageModel) -> None:
    with torch.no_grad(), gpt2.trace(PROMPT) as tracer:
        x = gpt2.transformer.h[2].output[0]
        grad = x.grad.save()
        with torch.enable_grad():
            (x * x).sum().backward()
    assert not tracer.graph.contexts
    torch.testing.assert_close(grad.value, 2 * hidden_states(gpt2)["made"])
    waiting = gpt2.trace(PROMPT)
    with torch.autocast("cpu", torch.bfloat16), waiting:
        ours = gpt2.output.logits.save()
        assert gpt2.transformer.h[0].mlp.output.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plain = gpt2.module(torch.tensor([PROMPT])).logits
    assert ours.value.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(ours.value, plain)


WEIGHT = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
TRANSPOSED = WEIGHT.T.contiguous()


def linear(x: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(x, WEIGHT)


def half(x: Any) -> Any:
    with torch.autocast("cpu", torch.float16):
        return x @ TRANSPOSED


def disabled_inside(x: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        y = x @ TRANSPOSED
        with torch.autocast("cpu", enabled=False):
            z = x @ TRANSPOSED
        return y + z.to(y.dtype), z


def attention(x: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return F.scaled_dot_product_attention(x, x, x)


def both(x: Any) -> Any:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return torch.einsum("bpd,ed->bpe", x, WEIGHT) * 2


@torch.autocast("cpu", torch.bfloat16)
def decorated_cast(x: Any) -> Any:
    return torch.matmul(x, TRANSPOSED).softmax(-1)


@pytest.mark.parametrize(
    "function", [linear, half, disabled_inside, attention, both, decorated_cast]
)
@pytest.mark.parametrize("around", sampled([False, True], [True]))
def test_autocast_gives_what_it_gives_in_a_hook(
    gpt2: LanguageModel, function: Callable[[Any], Any], around: bool
) -> None:
    def outer() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=around)

    with outer(), gpt2.trace(PROMPT) as tracer:
        proxy = function(gpt2.transformer.h[2].output[0])
        parts = proxy if isinstance(proxy, tuple) else (proxy,)
        shapes = [(part.dtype, part.shape) for part in parts]
        saved = [part.save() for part in parts]
    with outer(), torch.no_grad():
        plain = hidden_states(gpt2, lambda x: x)["made"]
        expected = function(plain)
        expected = expected if isinstance(expected, tuple) else (expected,)
    for ours, theirs, shape in zip(saved, expected, shapes, strict=True):
        assert shape == (theirs.dtype, theirs.shape) == (ours.value.dtype, ours.value.shape)
        torch.testing.assert_close(ours.value, theirs)
    assert Job.from_bytes(tracer.job.to_bytes()).blocks[0].graph.contexts == tracer.graph.contexts


def test_disabling_inside_of_an_autocast_around_the_block(gpt2: LanguageModel) -> None:
    def lines(x: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return x.float() @ TRANSPOSED

    with torch.autocast("cpu", torch.bfloat16), gpt2.trace(PROMPT):
        ours = lines(gpt2.transformer.h[2].output[0]).save()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plain = lines(hidden_states(gpt2, lambda x: x)["made"])
    assert ours.value.dtype == plain.dtype == torch.float32
    torch.testing.assert_close(ours.value, plain)


def test_a_shape_asked_for_in_a_context_is_that_of_the_line(gpt2: LanguageModel) -> None:
    with gpt2.trace(PROMPT):
        x = gpt2.transformer.h[2].output[0]
        y = x @ TRANSPOSED
        with torch.autocast("cpu", torch.bfloat16):
            assert (x.dtype, y.dtype) == (torch.float32, torch.float32)
            z = x @ TRANSPOSED
        assert z.dtype == torch.bfloat16
        saved = [y.save(), z.save()]
    assert [value.value.dtype for value in saved] == [torch.float32, torch.bfloat16]


def test_in_every_step_and_in_single_ones(gpt2: LanguageModel) -> None:
    with gpt2.generate(PROMPT, max_new_tokens=3) as generator:
        with generator.every_step():
            x = gpt2.transformer.h[2].output[0]
            with torch.autocast("cpu", torch.bfloat16):
                every = F.linear(x, WEIGHT).save()
        with generator.step[1]:
            one = linear(gpt2.transformer.h[2].output[0]).save()
    assert [value.dtype for value in every.value] == [torch.bfloat16] * 3
    torch.testing.assert_close(one.value, every.value[1])


def test_edits_keep_their_contexts(gpt2: LanguageModel) -> None:
    def change(x: Any) -> Any:
        with torch.no_grad():
            scale = x.norm(dim=-1, keepdim=True)
        return x / scale * 3

    with gpt2.edit() as edited:
        edited.transformer.h[2].output = change(edited.transformer.h[2].output[0])
    with edited.trace(PROMPT):
        early = edited.transformer.h[2].attn.output[0].grad.save()
        edited.output.logits.square().sum().backward()
    kept: dict[str, Any] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept["early"] = output[0]
        kept["early"].retain_grad()

    handle = gpt2.module.transformer.h[2].attn.register_forward_hook(keep)
    hidden_states(gpt2, change)["logits"].square().sum().backward()
    handle.remove()
    torch.testing.assert_close(early.value, kept["early"].grad)


def test_blocks_of_a_session_run_in_what_is_around_them(gpt2: LanguageModel) -> None:
    with gpt2.session():
        with torch.autocast("cpu", torch.bfloat16), gpt2.trace(PROMPT):
            cast = gpt2.output.logits.save()
        with gpt2.trace(PROMPT):
            plain = gpt2.output.logits.save()
            with torch.no_grad():
                x = gpt2.transformer.h[1].output[0] * 2
            grad = gpt2.transformer.h[1].output[0].grad.save()
            (x * gpt2.transformer.h[1].output[0]).sum().backward()
    assert (cast.value.dtype, plain.value.dtype) == (torch.bfloat16, torch.float32)
    with gpt2.trace(PROMPT):
        hidden = gpt2.transformer.h[1].output[0].save()
    torch.testing.assert_close(grad.value, 2 * hidden.value)


def test_plans_of_lines_in_and_out_of_a_context_are_told_apart(gpt2: LanguageModel) -> None:
    def run(context: AbstractContextManager[Any]) -> torch.Tensor:
        with gpt2.trace(PROMPT):
            x = gpt2.transformer.h[2].output[0]
            grad = x.grad.save()
            with context:
                y = x * 2
            (x * y).sum().backward()
        return grad.value

    first, second, third = run(nullcontext()), run(torch.no_grad()), run(nullcontext())
    torch.testing.assert_close(first, 2 * second)
    torch.testing.assert_close(first, third)


def test_own_modules_under_no_grad_get_no_gradients() -> None:
    model = Model(nn.Linear(3, 3))
    probe, other = nn.Linear(3, 1), nn.Linear(3, 1)
    with model.trace(torch.ones(2, 3)):
        with torch.no_grad():
            still = probe(model.output)
        (still * other(model.output)).sum().backward()
    assert probe.weight.grad is None
    plain = nn.Linear(3, 1)
    plain.load_state_dict(other.state_dict())
    value = model.module(torch.ones(2, 3)).detach()
    (probe(value).detach() * plain(value)).sum().backward()
    torch.testing.assert_close(other.weight.grad, plain.weight.grad)


@contextmanager
def by_default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def divided(x: Any) -> Any:
    return x.argmax(-1) / 3


def scaled(x: Any) -> Any:
    return x.argmax(-1) * 0.5


def root(x: Any) -> Any:
    return x.argmax(-1).sqrt()


def chosen(x: Any) -> Any:
    return torch.where(x > 0, 1.0, 0.5)


def counted(x: Any) -> Any:
    return F.one_hot(x.argmax(-1), 16).mul(0.25)


def plain_float(x: Any) -> Any:
    return x * 2


def in_a_branch(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x.argmax(-1) / 3
    return cond(x.isfinite().all(), lambda y: y.argmax(-1) / 3, lambda y: y.argmax(-1) / 5, x)


def nested_defaults(x: Any) -> Any:
    with by_default(torch.bfloat16):
        y = x.argmax(-1) / 3
        with by_default(torch.float32):
            return y, x.argmax(-1) / 7


DIVISIONS = [divided, scaled, root, chosen, counted, plain_float, in_a_branch, nested_defaults]


@pytest.mark.parametrize("function", DIVISIONS)
@pytest.mark.parametrize("dtype", sampled([torch.float64, torch.bfloat16], [torch.bfloat16]))
@pytest.mark.parametrize("around", sampled([False, True], [True]))
def test_a_default_dtype_holds_for_the_lines_in_it(
    gpt2: LanguageModel, function: Callable[[Any], Any], dtype: torch.dtype, around: bool
) -> None:
    outer, inner = (by_default(dtype), nullcontext()) if around else (nullcontext(), None)
    with outer, gpt2.trace(PROMPT) as tracer:
        with inner or by_default(dtype):
            proxy = function(gpt2.transformer.h[2].output[0])
        parts = proxy if isinstance(proxy, tuple) else (proxy,)
        dtypes = [part.dtype for part in parts]
        saved = [part.save() for part in parts]
    plain = hidden_states(gpt2)["made"].detach()
    with by_default(dtype):
        expected = function(plain)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for ours, theirs, told in zip(saved, expected, dtypes, strict=True):
        assert ours.value.dtype == theirs.dtype == told
        torch.testing.assert_close(ours.value, theirs)
    assert torch.get_default_dtype() == torch.float32
    assert Job.from_bytes(tracer.job.to_bytes()).blocks[0].graph.contexts == tracer.graph.contexts


def test_blocks_of_a_session_keep_their_default_dtypes(gpt2: LanguageModel) -> None:
    with gpt2.session():
        with gpt2.trace(PROMPT):
            first = (gpt2.transformer.h[2].output[0].argmax(-1) / 3).save()
        with by_default(torch.float64), gpt2.trace(PROMPT):
            second = (gpt2.transformer.h[2].output[0].argmax(-1) / 3).save()
    assert (first.value.dtype, second.value.dtype) == (torch.float32, torch.float64)


def test_a_default_dtype_that_is_left_behind_is_not_that_of_the_run(gpt2: LanguageModel) -> None:
    try:
        with gpt2.trace(PROMPT):
            first = (gpt2.transformer.h[2].output[0].argmax(-1) / 3).save()
            torch.set_default_dtype(torch.float64)
            second = (gpt2.transformer.h[2].output[0].argmax(-1) / 3).save()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert (first.value.dtype, second.value.dtype) == (torch.float32, torch.float64)
