"""Operations that draw random numbers draw what they would draw in a hook."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from insitu import Job, LanguageModel, Model, WireError, cond, fold
from tests.thinning import sampled

PROMPT = [1, 2, 3, 4]

FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "randn_like": torch.randn_like,
    "rand_like": lambda h: torch.rand_like(h, dtype=torch.float64),
    "randint_like": lambda h: torch.randint_like(h, 2, 9),
    "bernoulli": lambda h: torch.bernoulli(h.sigmoid()),
    "bernoulli, method": lambda h: h.bernoulli(0.3),
    "multinomial": lambda h: torch.multinomial(h[0].softmax(-1), 3),
    "normal": lambda h: torch.normal(h, 0.5),
    "normal, standard deviation": lambda h: torch.normal(0.0, h.abs()),
    "poisson": lambda h: torch.poisson(h.abs()),
    "binomial": lambda h: torch.binomial(h.abs().ceil(), h.sigmoid()),
    "dropout": lambda h: F.dropout(h, 0.5),
    "dropout, torch": lambda h: torch.dropout(h, 0.5, True),
    "dropout, eval": lambda h: F.dropout(h, 0.5, training=False),
    "dropout1d": lambda h: F.dropout1d(h),
    "alpha_dropout": lambda h: F.alpha_dropout(h, 0.5, training=True),
    "feature_alpha_dropout": lambda h: F.feature_alpha_dropout(h, 0.5, training=True),
    "rrelu": lambda h: F.rrelu(h, training=True),
    "gumbel_softmax": lambda h: F.gumbel_softmax(h, hard=True),
    "normal_": lambda h: h.clone().normal_(),
    "uniform_": lambda h: h.clone().uniform_(-1, 1),
    "exponential_": lambda h: torch.zeros_like(h).exponential_(2.0),
    "bernoulli_": lambda h: torch.ones_like(h).bernoulli_(0.5),
    "random_": lambda h: torch.zeros_like(h).random_(10),
    "log_normal_": lambda h: h.clone().log_normal_(),
    "geometric_": lambda h: h.clone().geometric_(0.5),
    "cauchy_": lambda h: h.clone().cauchy_(),
    "several": lambda h: torch.rand_like(h) - torch.randn_like(h[0]) * F.dropout(h),
}


def plain(model: LanguageModel, change: Callable[[Any], Any], ids: list[int] = PROMPT) -> Any:
    """What a function makes of block 2 in a hook, and the logits if that is put back."""
    kept: dict[str, Any] = {}

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        kept["made"] = change(first)
        if kept["made"].shape != first.shape:
            return None
        made = kept["made"].to(first.dtype)
        return (made, *output[1:]) if isinstance(output, tuple) else made

    handle = model.module.transformer.h[2].register_forward_hook(hook)
    with torch.no_grad():
        kept["logits"] = model.module(torch.tensor([ids])).logits
    handle.remove()
    return kept


@pytest.mark.parametrize(
    "name",
    sampled(
        FUNCTIONS,
        ["randn_like", "bernoulli", "multinomial", "normal_", "dropout", "gumbel_softmax"],
    ),
)
def test_a_seed_before_the_block_gives_the_numbers_of_a_hook(
    gpt2: LanguageModel, name: str
) -> None:
    function = FUNCTIONS[name]
    expected = plain(gpt2, lambda h: h * 1)["logits"]
    for _ in range(2):  # planned, and found again
        torch.manual_seed(3)
        with gpt2.trace(PROMPT):
            made = function(gpt2.transformer.h[2].output[0])
            before = torch.get_rng_state()
            shape, dtype = made.shape, made.dtype
            assert torch.equal(before, torch.get_rng_state())
            made = made.save()
            logits = gpt2.output.logits.save()
        after = torch.rand(3)
        torch.manual_seed(3)
        theirs = plain(gpt2, lambda h: function(h.clone()))["made"]
        assert torch.equal(after, torch.rand(3))
        torch.testing.assert_close(made.value, theirs, equal_nan=True)
        assert (shape, dtype) == (theirs.shape, theirs.dtype)
        torch.testing.assert_close(logits.value, expected)
    first = made.value
    with gpt2.trace(PROMPT):
        made = function(gpt2.transformer.h[2].output[0]).save()
    assert name == "dropout, eval" or not torch.equal(first, made.value)


def test_noise_is_written_to_the_model(gpt2: LanguageModel) -> None:
    torch.manual_seed(3)
    with gpt2.trace(PROMPT):
        block = gpt2.transformer.h[2]
        block.output = block.output[0] + torch.randn_like(block.output[0])
        logits = gpt2.output.logits.save()
    torch.manual_seed(3)
    theirs = plain(gpt2, lambda h: h + torch.randn_like(h))["logits"]
    torch.testing.assert_close(logits.value, theirs)
    torch.manual_seed(3)
    with gpt2.trace(PROMPT):
        gpt2.transformer.h[2].output[0].normal_()
        logits = gpt2.output.logits.save()
    torch.manual_seed(3)
    theirs = plain(gpt2, lambda h: torch.randn(h.shape))["logits"]
    torch.testing.assert_close(logits.value, theirs)


@pytest.mark.parametrize("prompts", [[PROMPT, PROMPT, PROMPT], [PROMPT, [5, 6], [1, 2, 9]]])
def test_invocations_draw_for_themselves(gpt2: LanguageModel, prompts: list[list[int]]) -> None:
    for _ in range(2):
        torch.manual_seed(3)
        noises, logits = [], []
        with gpt2.trace() as tracer:
            for ids in prompts:
                with tracer.invoke(ids):
                    block = gpt2.transformer.h[2]
                    noise = torch.randn_like(block.output[0])
                    block.output = block.output[0] + noise
                    noises.append(noise.save())
                    logits.append(gpt2.output.logits.save())
        for ids, noise, ours in zip(prompts, noises, logits, strict=True):
            theirs = plain(gpt2, lambda h, noise=noise: h + noise.value, ids)["logits"]
            torch.testing.assert_close(ours.value, theirs)
        assert not torch.equal(noises[0].value[:, :2], noises[2].value[:, :2])
        if prompts[0] == prompts[1]:
            assert not torch.equal(noises[0].value, noises[1].value)


def test_every_step_and_every_round_draws_anew(gpt2: LanguageModel) -> None:
    with gpt2.generate(PROMPT, max_new_tokens=3) as generator:
        with generator.every_step():
            drawn = torch.rand_like(gpt2.transformer.h[2].output[0][:, -1]).save()
        with generator.step[1]:
            once = F.dropout(gpt2.transformer.h[2].output[0], 0.5).save()
    first, second, third = drawn.value
    assert not torch.equal(first, second) and not torch.equal(second, third)
    assert 0 < (once.value == 0).float().mean() < 1
    model = Model(nn.Identity())
    torch.manual_seed(0)
    with model.trace(torch.zeros(5, 2)):
        drawn = fold(lambda carry, x: carry + torch.rand_like(x), torch.zeros(2), model.output)
        other = cond(drawn.sum() > 0, torch.rand_like, torch.randn_like, drawn)
        assert other.shape == (2,)
        drawn, other = drawn.save(), other.save()
    torch.manual_seed(0)
    torch.testing.assert_close(drawn.value, sum(torch.rand(2) for _ in range(5)))
    torch.testing.assert_close(other.value, torch.rand(2))


def test_edits_draw_in_every_run(gpt2: LanguageModel) -> None:
    with gpt2.edit() as noisy:
        block = noisy.transformer.h[2]
        block.output = block.output[0] + torch.randn_like(block.output[0])
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with noisy.trace(PROMPT):
            found.append(noisy.output.logits.save())
        torch.manual_seed(seed)
        theirs = plain(gpt2, lambda h: h + torch.randn_like(h))["logits"]
        torch.testing.assert_close(found[-1].value, theirs)
    with noisy.trace() as tracer:
        for _ in range(2):
            with tracer.invoke(PROMPT):
                found.append(noisy.output.logits.save())
    assert not torch.equal(found[2].value, found[3].value)


def test_gradients_flow_through_what_was_drawn(gpt2: LanguageModel) -> None:
    torch.manual_seed(3)
    with gpt2.trace(PROMPT):
        x = gpt2.transformer.h[2].output[0]
        grad = x.grad.save()
        F.gumbel_softmax(F.dropout(x, 0.5) * 3).square().sum().backward()
    y = plain(gpt2, lambda h: h * 1)["made"].clone().requires_grad_()
    torch.manual_seed(3)
    F.gumbel_softmax(F.dropout(y, 0.5) * 3).square().sum().backward()
    torch.testing.assert_close(grad.value, y.grad)


def test_generators_of_ones_own_draw_here_and_are_not_sent(gpt2: LanguageModel) -> None:
    def functions(generator: torch.Generator) -> list[Callable[[Any], Any]]:
        return [
            lambda h: torch.bernoulli(h.sigmoid(), generator=generator),
            lambda h: torch.multinomial(h[0].softmax(-1), 2, generator=generator),
            lambda h: h.clone().exponential_(generator=generator),
            lambda h: torch.normal(h, 1.0, generator=generator),
        ]

    for place in range(4):
        for seed in (1, 2):  # the second is found planned
            mine = torch.Generator().manual_seed(seed)
            torch.manual_seed(0)
            with gpt2.trace(PROMPT) as tracer:
                made = functions(mine)[place](gpt2.transformer.h[2].output[0])
                state = mine.get_state()
                assert made.shape[-1] in (2, 16)
                assert torch.equal(state, mine.get_state())
                made = made.save()
            untouched = torch.rand(1)
            theirs = functions(torch.Generator().manual_seed(seed))[place]
            hidden = plain(gpt2, lambda h: h * 1)["made"]
            torch.testing.assert_close(made.value, theirs(hidden))
            torch.manual_seed(0)
            assert torch.equal(untouched, torch.rand(1))
    with pytest.raises(WireError, match="Generator"):
        tracer.job.to_bytes()


def test_random_operations_are_sent(gpt2: LanguageModel) -> None:
    with gpt2.trace(PROMPT) as tracer:
        torch.randn_like(gpt2.transformer.h[2].output[0]).normal_().save()
    sent = Job.from_bytes(tracer.job.to_bytes()).blocks[0].graph
    assert [node.operation.name for node in sent][-3:] == ["torch.randn_like", "put", "save"]
    assert sent[len(sent) - 2].args[2] == "Tensor.normal_"


def attention(h: Any) -> Any:
    heads = h.unsqueeze(1)
    return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.5).squeeze(1)


SEEDED = {
    **{name: FUNCTIONS[name] for name in ("randn_like", "dropout", "normal_", "bernoulli")},
    **{name: FUNCTIONS[name] for name in ("multinomial", "gumbel_softmax", "several")},
    "attention": attention,
    "cond": lambda h: cond(h.sum() > -1e9, lambda x: torch.rand_like(x), lambda x: x, h),
    "fold": lambda h: fold(lambda carry, row: carry + torch.rand_like(row), h[0, 0] * 0, h[0]),
}
PLAIN = {
    "cond": torch.rand_like,
    "fold": lambda h: sum((torch.rand_like(row) for row in h[0]), h[0, 0] * 0),
}
RAGGED = {3: [1, 2, 3, 4], 8: [5, 6], 5: [7, 8, 9, 1, 2, 3]}


@pytest.mark.parametrize("name", sampled(SEEDED, ["dropout", "fold"]))
@pytest.mark.parametrize("together", sampled([True, False], [True]))
def test_lines_of_a_prompt_with_a_seed_draw_what_they_draw_alone(
    gpt2: LanguageModel, name: str, together: bool
) -> None:
    function = SEEDED[name]
    expected: dict[int, Any] = {}
    for seed, ids in RAGGED.items():
        torch.manual_seed(seed)
        expected[seed] = plain(gpt2, PLAIN.get(name, function), ids)["made"]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    given = [*RAGGED.items()]
    for part in [given] if together else [given[:1], given[1:]]:
        made: dict[int, Any] = {}
        with gpt2.trace() as tracer:
            for seed, ids in part:
                with tracer.invoke(ids, seed=seed):
                    made[seed] = function(gpt2.transformer.h[2].output[0]).save()
        assert len(tracer.plan.passes) == 1
        for seed, value in made.items():
            torch.testing.assert_close(value.value, expected[seed])
    assert torch.equal(torch.get_rng_state(), before)  # as in `generate`


def test_lines_without_a_seed_do_not_matter_to_those_with_one(gpt2: LanguageModel) -> None:
    torch.manual_seed(2)
    expected = torch.rand(1, 2, 16), torch.rand(1, 6, 16)
    torch.manual_seed(3)
    seeded = torch.rand(1, 4, 16)
    torch.manual_seed(2)
    made: list[Any] = []
    with gpt2.trace() as tracer:
        for ids, seed in (([5, 6], None), (PROMPT, 3), ([7, 8, 9, 1, 2, 3], None)):
            with tracer.invoke(ids, seed=seed):
                made.append(torch.rand_like(gpt2.transformer.h[2].output[0]).save())
    torch.testing.assert_close(made[0].value, expected[0])
    torch.testing.assert_close(made[1].value, seeded)
    torch.testing.assert_close(made[2].value, expected[1])
    results = gpt2.run(Job.from_bytes(tracer.job.to_bytes()))
    torch.testing.assert_close(results["1"], seeded)


def test_a_seed_of_a_block_with_one_prompt_is_that_of_its_lines(gpt2: LanguageModel) -> None:
    torch.manual_seed(7)
    first, second = torch.rand(1, 4, 16), torch.randn(1, 4, 16)
    for _ in range(2):
        with gpt2.trace(PROMPT, seed=7):
            later = torch.randn_like(gpt2.transformer.h[2].output[0]).save()
            earlier = torch.rand_like(gpt2.transformer.h[0].output[0]).save()
        torch.testing.assert_close(earlier.value, first)
        torch.testing.assert_close(later.value, second)
    for wrong in ("7", 2**80, 1.0):
        with pytest.raises(TypeError, match="seed"), gpt2.trace(PROMPT, seed=wrong):
            gpt2.output.logits.save()


def test_attention_with_dropout_in_a_generation_draws_from_the_seed(gpt2: LanguageModel) -> None:
    def run(prompts: dict[int, list[int]]) -> dict[int, Any]:
        made: dict[int, Any] = {}
        with gpt2.generate(max_new_tokens=2, do_sample=True) as generator:
            for seed, ids in prompts.items():
                with generator.invoke(ids, seed=seed):
                    hidden = gpt2.transformer.h[2].output[0]
                    gpt2.transformer.h[2].output[0][:] = attention(hidden)
                    made[seed] = gpt2.lm_head.output[0, -1].save()
        return {seed: value.value for seed, value in made.items()}

    together = run(RAGGED)
    for seed, ids in RAGGED.items():
        torch.testing.assert_close(run({seed: ids})[seed], together[seed])


def test_lines_on_gradients_draw_from_the_seed_too(gpt2: LanguageModel) -> None:
    torch.manual_seed(7)
    first, second = torch.rand(1, 4, 16), torch.randn(1, 4, 16)
    before = torch.get_rng_state()
    for _ in range(2):
        made: list[Any] = []
        with gpt2.trace() as tracer:
            for seed in (7, 7):
                with tracer.invoke(PROMPT, seed=seed):
                    hidden = gpt2.transformer.h[2].output[0]
                    made.append(torch.rand_like(hidden).save())
                    made.append(torch.randn_like(hidden.grad).save())
                    gpt2.logits.sum().backward()
        for drawn, expected in zip(made, (first, second, first, second), strict=True):
            torch.testing.assert_close(drawn.value, expected)
    assert torch.equal(torch.get_rng_state(), before)
