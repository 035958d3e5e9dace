"""A cache of keys and values that the user gives is an input: compared with plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from transformers import DynamicCache, StaticCache

from insitu import LanguageModel, Model, PromptError, apply
from insitu.models.given_caches import cached_length
from tests.conftest import tiny_gpt2, tiny_llama
from tests.thinning import sampled

PREFIX = torch.tensor([[5, 17, 3, 88, 41, 2, 60]])
NEXT = [torch.tensor([[30, 31]]), torch.tensor([[40]]), torch.tensor([[50, 51, 52]])]


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    made = {"gpt2": tiny_gpt2, "llama": tiny_llama}[request.param]()
    return LanguageModel(made)


def filled(model: LanguageModel, ids: torch.Tensor = PREFIX, **options: Any) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.module(ids, past_key_values=cache, use_cache=True, **options)
    return cache


def plain(model: LanguageModel, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        own, module = copy.deepcopy(cache), cast(Any, model.module)
        return module(ids, past_key_values=own, use_cache=True, **options).logits


def plainly_generated(model: LanguageModel, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    options = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    mask = torch.ones_like(ids)
    own, module = copy.deepcopy(cache), cast(Any, model.module)
    return module.generate(ids, attention_mask=mask, past_key_values=own, **options)


def close(found: Any, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.value, expected, rtol=0, atol=1e-5)


def held(cache: Any) -> Iterator[torch.Tensor]:
    for layer in cache.layers:
        yield from (layer.keys, layer.values)


class Unchanged:
    """Says at its end that a cache is what it was at its beginning."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def __enter__(self) -> None:
        self.before = [(tensor, tensor.clone()) for tensor in held(self.cache)]

    def __exit__(self, *_: object) -> None:
        for now, (tensor, before) in zip(held(self.cache), self.before, strict=True):
            assert now is tensor and type(now) is torch.Tensor and torch.equal(now, before)


def test_prompts_that_go_on_from_one_cache_do_not_see_each_other(model: LanguageModel) -> None:
    cache = filled(model)
    with Unchanged(cache):
        with model.trace(past_key_values=cache) as tracer:
            logits = []
            for ids in NEXT:
                with tracer.invoke(ids):
                    logits.append(model.logits.save())
        for ids, found in zip(NEXT, logits, strict=True):
            close(found, plain(model, ids, cache))


def test_each_prompt_may_have_its_own_cache(model: LanguageModel) -> None:
    caches = [filled(model), filled(model, PREFIX[:, :4])]
    with model.trace() as tracer:
        with tracer.invoke(NEXT[0], past_key_values=caches[0]):
            first = model.logits.save()
        with tracer.invoke(NEXT[2], past_key_values=caches[1]):
            second = model.logits.save()
        with tracer.invoke(NEXT[0]):
            third = model.logits.save()
    close(first, plain(model, NEXT[0], caches[0]))
    close(second, plain(model, NEXT[2], caches[1]))
    close(third, plain(model, NEXT[0], None))
    assert [cached_length(cache) for cache in caches] == [7, 4]


@pytest.mark.parametrize("model", sampled(["gpt2", "llama"], ["gpt2"]), indirect=True)
def test_shapes_leave_the_cache_and_are_those_of_the_run(model: LanguageModel) -> None:
    cache = filled(model)
    with Unchanged(cache):
        for ids in NEXT:  # the same object, with a cache of the same length
            with model.trace(ids, past_key_values=cache):
                out, cached = model.blocks[1].output
                shapes = [out.shape, cached[0].shape, model.logits.shape]
                values = [out.save(), cached[0].save(), model.logits.save()]
            assert [value.shape for value in values] == shapes
            close(values[2], plain(model, ids, cache))


@pytest.mark.parametrize("model", sampled(["gpt2", "llama"], ["llama"]), indirect=True)
def test_shapes_follow_a_cache_that_has_grown(model: LanguageModel) -> None:
    cache = filled(model)
    for length in (7, 9, 11, 13):
        with model.trace(NEXT[0], past_key_values=cache):
            keys = model.blocks[1].output[1][0]
            assert keys.shape[2] == length + 2
            keys = keys.save()
        assert keys.shape[2] == length + 2
        with torch.no_grad():
            model.module(NEXT[0], past_key_values=cache, use_cache=True)


def test_an_early_exit_leaves_the_cache(model: LanguageModel) -> None:
    cache = filled(model)
    with Unchanged(cache), model.trace(NEXT[0], past_key_values=cache):
        model.blocks[0].residual_out.save()


def test_an_error_leaves_the_cache(model: LanguageModel) -> None:
    cache = filled(model)
    with Unchanged(cache), pytest.raises(RuntimeError, match="of the test"):

        def fail(value: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("of the test")

        with model.trace(NEXT[0], past_key_values=cache):
            apply(fail, model.blocks[1].residual_out)


@pytest.mark.parametrize("model", sampled(["gpt2", "llama"], ["gpt2"]), indirect=True)
def test_writes_do_not_reach_the_cache(model: LanguageModel) -> None:
    cache = filled(model)
    with Unchanged(cache):
        with model.trace(NEXT[0], past_key_values=cache):
            hidden, (keys, values) = model.blocks[1].output
            model.blocks[1].output = (hidden, (keys * 0, values))
            kept = model.output.past_key_values.save()
        assert not kept.value.layers[1].keys.any()
        with model.trace(NEXT[0], past_key_values=cache):
            model.blocks[1].output[1][0][:] = 0
            logits = model.logits.save()
        close(logits, plain(model, NEXT[0], cache))


def test_the_filled_cache_can_be_saved_and_given(model: LanguageModel) -> None:
    with model.trace(PREFIX, use_cache=True):
        first = model.output.past_key_values.save()
    with model.trace(NEXT[0], past_key_values=first):
        second = model.output.past_key_values.save()
    whole = torch.cat([PREFIX, NEXT[0], NEXT[1]], 1)
    expected = plain(model, whole, None)[:, -1:]
    assert [cached_length(one) for one in (first, second)] == [7, 9]
    torch.testing.assert_close(plain(model, NEXT[1], second.value), expected)
    with model.trace() as tracer, tracer.invoke(NEXT[1], past_key_values=second):
        logits = model.logits.save()
    close(logits, expected)


def test_a_cache_that_was_filled_with_gradients(model: LanguageModel) -> None:
    cache = DynamicCache(config=model.config)
    model.module(PREFIX, past_key_values=cache, use_cache=True)
    with Unchanged(cache):
        with model.trace(NEXT[0], past_key_values=cache):
            logits = model.logits
            shape, logits = logits.shape, logits.save()
        assert logits.shape == shape
        close(logits, plain(model, NEXT[0], filled(model)))


def test_gradients_of_a_prompt_that_goes_on(model: LanguageModel) -> None:
    cache = filled(model)
    with Unchanged(cache), model.trace(NEXT[0], past_key_values=cache):
        hidden = model.blocks[0].residual_out
        grad = hidden.grad.save()
        model.logits.logsumexp(-1).sum().backward()
    seen: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)
        seen[0].retain_grad()

    block = model.module.get_submodule(model.blocks[0].path)
    handle = block.register_forward_hook(keep)
    own = copy.deepcopy(cache)
    logits = model.module(NEXT[0], past_key_values=own, use_cache=True).logits
    handle.remove()
    logits.logsumexp(-1).sum().backward()
    assert seen[0].grad is not None
    close(grad, seen[0].grad)


@pytest.mark.parametrize("model", sampled(["gpt2", "llama"], ["llama"]), indirect=True)
@pytest.mark.parametrize("where", ["block", "invocations"])
def test_generations_that_go_on_from_one_cache(model: LanguageModel, where: str) -> None:
    cache = filled(model)
    of_block: dict[str, Any] = {"past_key_values": cache} if where == "block" else {}
    own = {} if of_block else {"past_key_values": cache}
    wholes = [torch.cat([PREFIX, ids], 1) for ids in NEXT]
    with Unchanged(cache):
        with model.generate(max_new_tokens=4, eos_token_id=None, **of_block) as generator:
            runs = []
            for whole in wholes:
                with generator.invoke(whole, **own) as invoker:
                    runs.append((invoker, model.logits.save()))
        for whole, ids, (invoker, logits) in zip(wholes, NEXT, runs, strict=True):
            assert torch.equal(invoker.output, plainly_generated(model, whole, cache))
            close(logits, plain(model, ids, cache)[:, -1:])


def test_shapes_of_a_generation_are_those_behind_the_cache(model: LanguageModel) -> None:
    cache = filled(model)
    whole = torch.cat([PREFIX, NEXT[0]], 1)
    with Unchanged(cache), model.generate(whole, past_key_values=cache, max_new_tokens=2):
        hidden, (keys, _) = model.blocks[1].output
        shapes = [hidden.shape, keys.shape]
        values = [hidden.save(), keys.save()]
    assert [value.shape for value in values] == shapes
    assert shapes[0][1] == 2 and shapes[1][2] == 9


def test_a_mask_may_be_of_the_cached_positions_too(model: LanguageModel) -> None:
    cache = filled(model)
    mask = torch.ones(1, 9)
    with model.trace(NEXT[0], attention_mask=mask, past_key_values=cache) as tracer:
        logits = model.logits.save()
    close(logits, plain(model, NEXT[0], cache))
    assert tracer.mask.shape == (1, 2)


def test_rows_behind_padding_in_the_cache_are_what_they_are_alone(model: LanguageModel) -> None:
    rows = [PREFIX, PREFIX[:, 3:]]
    with model.trace([row[0].tolist() for row in rows], use_cache=True) as tracer:
        cache = model.output.past_key_values.save()
    new = torch.cat([NEXT[0], NEXT[0].flip(1)])
    mask = torch.cat([tracer.mask, torch.ones(2, 2)], 1)
    with model.trace(new, attention_mask=mask, past_key_values=cache):
        logits = model.logits.save()
    expected = [
        plain(model, ids[None], filled(model, row)) for ids, row in zip(new, rows, strict=True)
    ]
    close(logits, torch.cat(expected))


def test_padding_between_the_cache_and_a_prompt(model: LanguageModel) -> None:
    cache = filled(model, torch.cat([PREFIX, PREFIX.flip(1)]))
    rows = [[30, 31, 32], [40]]
    with model.trace(rows, past_key_values=cache):
        logits = model.logits.save()
    first = plain(model, torch.tensor([rows[0]]), filled(model))
    second = plain(model, torch.tensor([rows[1]]), filled(model, PREFIX.flip(1)))
    torch.testing.assert_close(logits.value[:1], first, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits.value[1:, -1:], second, rtol=0, atol=1e-5)


def test_what_does_not_go_with_a_cache_is_refused(model: LanguageModel) -> None:
    cache = filled(model)
    with (
        Unchanged(cache),
        pytest.raises(PromptError, match="2 rows, and the cache has 1"),
        model.trace(NEXT[0].repeat(2, 1), past_key_values=cache),
    ):
        pass
    with (
        pytest.raises(PromptError, match=r"mask has the shape \(1, 8\)"),
        model.trace(NEXT[0], attention_mask=torch.ones(1, 8), past_key_values=cache),
    ):
        pass
    long = torch.ones(1, model.config.max_position_embeddings - 6, dtype=torch.int64)
    with (
        pytest.raises(PromptError, match="the cache holds 7, but the model's context"),
        model.trace(long, past_key_values=cache),
    ):
        pass
    for ids in (NEXT[0], PREFIX):
        with (
            pytest.raises(PromptError, match="given the whole text"),
            model.generate(ids, past_key_values=cache, max_new_tokens=2),
        ):
            pass


def test_an_empty_cache_stays_empty_and_that_is_said(model: LanguageModel) -> None:
    cache = DynamicCache(config=model.config)
    with pytest.warns(UserWarning, match="is left as it is, and this one is empty"):
        with model.trace(PREFIX, past_key_values=cache):
            logits = model.logits.save()
    close(logits, plain(model, PREFIX, None))
    assert cached_length(cache) == 0


def test_a_cache_is_taken_as_it_is_at_its_line(model: LanguageModel) -> None:
    cache = filled(model)
    before = copy.deepcopy(cache)
    with model.trace() as tracer:
        with tracer.invoke(NEXT[0], past_key_values=cache):
            logits = model.logits.save()
        with torch.no_grad():
            model.module(NEXT[2], past_key_values=cache, use_cache=True)
    close(logits, plain(model, NEXT[0], before))


def test_a_job_can_be_run_again(model: LanguageModel) -> None:
    cache = filled(model)
    with model.trace(NEXT[0], past_key_values=cache) as tracer:
        model.logits.save("logits")
    for _ in range(2):
        found = model.run(tracer.job)["logits"]
        torch.testing.assert_close(found, plain(model, NEXT[0], cache))


def test_a_dry_block_leaves_the_cache(model: LanguageModel) -> None:
    cache = filled(model)
    with Unchanged(cache), model.scan(NEXT[0], past_key_values=cache):
        model.blocks[1].residual_out[:, -1] += 1
        logits = model.logits.save()
    assert logits.shape[:2] == (1, 2)


def test_all_values_of_a_prompt_that_goes_on(model: LanguageModel) -> None:
    cache = filled(model)
    with Unchanged(cache):
        found = model.run_with_cache(NEXT[0], ["logits", "q"], past_key_values=cache)
        expected = plain(model, NEXT[0], cache)
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-5)


def test_a_cache_of_a_fixed_size_is_not_written(model: LanguageModel) -> None:
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model.module(PREFIX, past_key_values=cache, use_cache=True)
    expected = plain(model, NEXT[0], filled(model))
    with Unchanged(cache):
        with model.trace(past_key_values=cache) as tracer:
            with tracer.invoke(NEXT[1]):
                model.logits.save()
            with tracer.invoke(NEXT[0]):
                logits = model.logits.save()
        close(logits, expected)


def test_a_model_of_any_kind_takes_a_cache_as_an_input(model: LanguageModel) -> None:
    cache, wrapped = filled(model), Model(model.module)
    with Unchanged(cache):
        with wrapped.trace() as tracer:
            logits = []
            for ids in NEXT:
                with tracer.invoke(ids, past_key_values=cache, use_cache=True):
                    logits.append(wrapped.output.logits)
                    assert logits[-1].shape[1] == ids.shape[1]
                    logits[-1] = logits[-1].save()
        for ids, found in zip(NEXT, logits, strict=True):
            close(found, plain(model, ids, cache))
