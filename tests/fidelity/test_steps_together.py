"""Prompts that are generated in one batch, against plain hooks on a `generate` of each alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

from insitu import (
    BlockError,
    IndexOutOfRangeError,
    LanguageModel,
    NeverRanError,
    OperationError,
)
from tests.conftest import tiny_gpt2
from tests.fidelity.architectures import GENERATING, make, tiny_t5
from tests.models import kinds
from tests.thinning import sampled

LENGTHS = (4, 1, 9, 6)
NEW = 5
PLAIN: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": None, "do_sample": False}
Change = Callable[[int, torch.Tensor], torch.Tensor]

pytestmark = pytest.mark.no_wire  # they count passes


def prompts_of(
    model: LanguageModel, lengths: tuple[int, ...] = LENGTHS, rows: int = 1
) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    vocabulary = model.config.get_text_config().vocab_size
    return [torch.randint(4, vocabulary, (rows, length), generator=draw) for length in lengths]


def first(output: Any) -> Any:
    """The hidden states, where a module returns more."""
    return output[0] if isinstance(output, tuple) else output


def alone(
    model: LanguageModel,
    ids: torch.Tensor,
    read: str,
    changes: dict[str, Change] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The oracle: the tokens of a plain `generate`, and what a module returns in each step."""
    seen: list[torch.Tensor] = []
    handles = []
    for path, change in (changes or {}).items():

        def hook(part: nn.Module, args: Any, output: Any, change=change, step=[0]) -> Any:  # noqa: B006
            new = change(step[0], first(output))
            step[0] += 1
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handles.append(model.module.get_submodule(path).register_forward_hook(hook))
    part = model.module.get_submodule(read)
    keep = lambda part, args, output: seen.append(first(output).detach().clone())  # noqa: E731
    handles.append(part.register_forward_hook(keep))
    options = {**PLAIN, **options}
    try:
        tokens = model.module.generate(ids, attention_mask=torch.ones_like(ids), **options)
    finally:
        for handle in handles:
            handle.remove()
    return tokens, seen


def handle_of(model: LanguageModel, path: str) -> Any:
    found: Any = model
    for part in path.split("."):
        found = found[int(part)] if part.isdigit() else found[part]
    return found


def hidden(model: LanguageModel, path: str) -> Any:
    """The hidden states at a module, as one writes them."""
    handle = handle_of(model, path)
    return handle.output[0] if path in model.traits.block_views[True] else handle.output


def blocks_of(model: LanguageModel) -> list[str]:
    return [path for path in model.traits.block_views[True] if "encoder" not in path]


def assert_alike(found: Any, expected: Any, what: Any = None) -> None:
    assert len(found) == len(expected), (what, len(found), len(expected))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(
            mine, theirs, atol=1e-5, rtol=1e-4, msg=lambda text: f"{what}: {text}"
        )


MODELS: dict[str, Callable[[], LanguageModel]] = {
    **{name: lambda name=name: make(name) for name in GENERATING},
    "t5": lambda: LanguageModel(kinds.ready(tiny_t5)),
    "bart": lambda: LanguageModel(kinds.bart()),
}
# What padding changes, or what is about one prompt only: these share no pass.
APART = ("mamba",)


@pytest.mark.parametrize("cached", sampled([True, False], [True]))
@pytest.mark.parametrize("name", sampled(MODELS, ["llama", "bart"]))
def test_every_step_is_read_and_steered_as_if_each_prompt_ran_alone(
    name: str, cached: bool
) -> None:
    model = MODELS[name]()
    prompts = prompts_of(model)
    early, *_, late = blocks_of(model)
    options = {**PLAIN, "use_cache": cached}
    size = alone(model, prompts[0], early, **options)[1][0].shape[-1]
    torch.manual_seed(0)
    vectors = [torch.randn(size) for _ in prompts]
    saved, invokers = [], []
    with model.generate(**options) as generator:
        for ids, vector in zip(prompts, vectors, strict=True):
            with generator.invoke(ids) as invoker, generator.every_step():
                hidden(model, early)[:, -1] += vector
                saved.append(hidden(model, late).save())
            invokers.append(invoker)
    if name not in APART:
        assert len(generator.plan.passes) == 1
    for ids, vector, invoker, values in zip(prompts, vectors, invokers, saved, strict=True):

        def steer(step: int, value: torch.Tensor, vector: torch.Tensor = vector) -> torch.Tensor:
            value = value.clone()
            value[:, -1] += vector
            return value

        tokens, seen = alone(model, ids, late, {early: steer}, **options)
        assert torch.equal(invoker.output, tokens)
        assert_alike(values.value, seen, name)


@pytest.mark.thorough
@pytest.mark.parametrize("name", sampled(["gpt2", "llama", "bloom", "mixtral", "t5"], ["llama"]))
def test_each_module_has_in_each_step_what_it_has_alone(name: str) -> None:
    """Cut out of a batch or, where that cannot be, in a pass of its own."""
    model = MODELS[name]()
    prompts = prompts_of(model, (3, 6))
    paths = [
        path for path, part in model.module.named_modules() if path and not list(part.children())
    ]
    shared = 0
    for path in paths:
        if ".experts" in path or "encoder" in path:  # not every prompt comes to each expert
            continue
        expected = [alone(model, ids, path)[1] for ids in prompts]
        if not all(len(seen) == NEW and isinstance(seen[0], torch.Tensor) for seen in expected):
            continue
        saved = []
        with model.generate(**PLAIN) as generator:
            for ids in prompts:
                with generator.invoke(ids), generator.every_step():
                    output = handle_of(model, path).output
                    saved.append(output.save())
        shared += len(generator.plan.passes) == 1
        for values, seen in zip(saved, expected, strict=True):
            assert_alike([first(value) for value in values.value], seen, path)
    assert shared > 10


def test_keys_and_values_of_later_steps_are_cut_and_written() -> None:
    model = LanguageModel(tiny_gpt2())
    prompts = prompts_of(model, (3, 6))
    saved, invokers = [], []
    with model.generate(**PLAIN) as generator:
        for ids in prompts:
            with generator.invoke(ids) as invoker:
                with invoker.step(2):
                    keys, values = model.transformer.h[0].output[1]
                    saved.append((keys.save(), values.save()))
                    values[:, :, -1] = 0.0
                invokers.append(invoker)
    assert len(generator.plan.passes) == 1
    for ids, (keys, values), invoker in zip(prompts, saved, invokers, strict=True):
        found: list[Any] = []

        def keep(part: nn.Module, args: Any, kwargs: Any, output: Any, found=found) -> None:
            cache = next(
                value
                for value in (*args, *kwargs.values())
                if hasattr(value, "layers") or hasattr(value, "self_attention_cache")
            )
            layer = getattr(cache, "self_attention_cache", cache).layers[0]
            found.append((layer.keys.clone(), layer.values.clone()))
            if len(found) == 3:
                layer.values[:, :, -1] = 0.0

        handle = model.module.transformer.h[0].register_forward_hook(keep, with_kwargs=True)
        tokens, _ = alone(model, ids, "lm_head")
        handle.remove()
        assert_alike((keys.value, values.value), found[2])
        assert torch.equal(invoker.output, tokens)


@pytest.mark.parametrize("name", sampled(["gpt2", "llama", "t5"], ["llama"]))
def test_tokens_and_logits_of_steps_are_read_and_replaced(name: str) -> None:
    model = MODELS[name]()
    prompts = prompts_of(model)
    chosen, logits, invokers = [], [], []
    with model.generate(**PLAIN) as generator:
        for number, ids in enumerate(prompts):
            with generator.invoke(ids) as invoker:
                if number == 1:
                    invoker.tokens[1] = torch.tensor([77])
                if number == 2:
                    invoker.logits[2] = -invoker.logits(2)
                chosen.append([invoker.tokens(step).save() for step in invoker.steps])
                logits.append(invoker.logits(3).save())
            invokers.append(invoker)
    assert len(generator.plan.passes) == 1
    for number, (ids, invoker) in enumerate(zip(prompts, invokers, strict=True)):

        def choose(so_far: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = scores.clone()
            scores[:, 77] = torch.inf
            return scores

        given = 1 if model.traits.is_encoder_decoder else ids.shape[1]
        at_one = lambda so_far, scores: (  # noqa: E731
            choose(so_far, scores) if so_far.shape[1] == given + 1 else scores  # noqa: B023
        )
        options: dict[str, Any] = {"logits_processor": [at_one]} if number == 1 else {}
        negate: dict[str, Change] = {}
        if number == 2:
            negate = {"lm_head": lambda step, value: -value if step == 2 else value}
        tokens, seen = alone(model, ids, "lm_head", negate, **options)
        assert torch.equal(invoker.output, tokens)
        new = tokens[:, given:].tolist()[0]
        assert [int(token.value) for token in chosen[number]] == new
        torch.testing.assert_close(logits[number].value, seen[3][:, -1], atol=1e-5, rtol=1e-4)


def ends_early(
    model: LanguageModel,
    prompts: list[torch.Tensor],
    changes: dict[str, Change] | None = None,
    **options: Any,
) -> int:
    """A token with which some of the prompts end before others."""
    head = "lm_head"
    candidates = torch.cat([alone(model, ids, head, changes)[0].flatten() for ids in prompts])
    for candidate in candidates.unique().tolist():
        ends = {"eos_token_id": [candidate, 2], **options}
        runs = [alone(model, ids, head, changes, **ends)[1] for ids in prompts]
        if len({len(run) for run in runs}) > 1:
            return candidate
    raise AssertionError("all prompts of this test go on alike")


@pytest.mark.parametrize("rows", sampled([1, 2], [1]))
@pytest.mark.parametrize("name", sampled(["gpt2", "llama", "t5"], ["gpt2"]))
def test_a_prompt_that_ends_early_has_no_further_steps(name: str, rows: int) -> None:
    model = MODELS[name]()
    prompts = prompts_of(model, rows=rows)
    if rows == 2:
        prompts.append(prompts_of(model, (5,))[0])
    early, *_, late = blocks_of(model)

    def steer(step: int, value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, -1] += 0.1
        return value

    end = ends_early(model, prompts, {early: steer}, min_new_tokens=1)
    options = {**PLAIN, "eos_token_id": [end, 2], "min_new_tokens": 1}
    saved, tokens, last, invokers = [], [], [], []
    with model.generate(**options) as generator:
        for ids in prompts:
            with generator.invoke(ids) as invoker:
                with invoker.every_step():
                    hidden(model, early)[:, -1] += 0.1
                    saved.append(hidden(model, late).save())
                    tokens.append(invoker.tokens().save())
                with invoker.step(NEW - 1):
                    last.append(hidden(model, late).mean().save(optional=True))
            invokers.append(invoker)
    assert len(generator.plan.passes) == 1
    counts = set()
    for at, ids in enumerate(prompts):
        expected, seen = alone(model, ids, late, {early: steer}, **options)
        assert torch.equal(invokers[at].output, expected)
        assert_alike(saved[at].value, seen, at)
        given = 1 if model.traits.is_encoder_decoder else ids.shape[1]
        assert torch.equal(torch.stack(tokens[at].value, 1), expected[:, given:])
        assert (last[at].value is None) == (len(seen) < NEW)
        counts.add(len(seen))
    assert len(counts) > 1


@pytest.mark.thorough
def test_a_step_that_a_prompt_never_has_is_an_error_whatever_its_neighbours_do() -> None:
    model = LanguageModel(tiny_gpt2())
    prompts = prompts_of(model)
    end = ends_early(model, prompts)
    ends = {"eos_token_id": [end, 2]}
    lengths = [len(alone(model, ids, "lm_head", **ends)[1]) for ids in prompts]
    short = min(range(len(prompts)), key=lengths.__getitem__)
    count = lengths[short]
    with pytest.raises(NeverRanError, match=f"after {count} step") as caught:
        with model.generate(**{**PLAIN, **ends}) as generator:
            for number, ids in enumerate(prompts):
                with generator.invoke(ids) as invoker, invoker.step(NEW - 1):
                    if number == short:
                        model.lm_head.output.save()  # the line to find
    assert "the line to find" in str(caught.value)


def test_values_of_every_step_of_several_prompts_are_used_together() -> None:
    model = LanguageModel(tiny_gpt2())
    one, other = prompts_of(model, (3, 5))
    with model.generate(**PLAIN) as generator:
        with generator.invoke(one) as first_of, generator.invoke(other) as second:
            pass
        with generator.every_step():
            with first_of:
                mine = model.transformer.h[0].output[0][:, -1]
            with second:
                model.transformer.h[1].output[0][:, -1] += mine
                difference = (model.lm_head.output[:, -1] - mine.mean()).save()
    assert len(generator.plan.passes) == 1
    _, seen = alone(model, one, "transformer.h.0")

    def add(step: int, value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, -1] += seen[step][:, -1]
        return value

    tokens, logits = alone(model, other, "lm_head", {"transformer.h.1": add})
    assert torch.equal(second.output, tokens)
    expected = [a[:, -1] - b[:, -1].mean() for a, b in zip(logits, seen, strict=True)]
    assert_alike(difference.value, expected)
    with pytest.raises(OperationError, match="take their steps together"):
        with model.generate(**PLAIN, num_beams=2) as generator:
            with generator.invoke(one) as first_of, generator.invoke(other) as second:
                pass
            with generator.every_step():
                with first_of:
                    mine = model.transformer.h[0].output[0].mean()
                with second:
                    (mine + model.lm_head.output.mean()).save()


@pytest.mark.thorough
def test_a_value_of_a_later_step_goes_into_the_first_of_another_prompt() -> None:
    model = LanguageModel(tiny_gpt2())
    one, other, third = prompts_of(model, (3, 5, 4))
    with model.generate(**PLAIN) as generator:
        with generator.invoke(other) as changed:
            pass
        with generator.invoke(one) as source, source.step(3):
            late = model.transformer.h[1].output[0][:, -1]
        with changed:
            model.transformer.h[0].output[0][:, -1] = late
        with generator.invoke(third) as beside, beside.every_step():
            logits = model.lm_head.output.save()
    assert [list(one.invocations) for one in generator.plan.passes] == [[1, 2], [0]]
    _, seen = alone(model, one, "transformer.h.1")

    def put(step: int, value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        if step == 0:
            value[:, -1] = seen[3][:, -1]
        return value

    tokens, _ = alone(model, other, "lm_head", {"transformer.h.0": put})
    assert torch.equal(changed.output, tokens)
    assert_alike(logits.value, alone(model, third, "lm_head")[1])


def test_what_keeps_one_prompt_out_of_the_batch_concerns_that_one() -> None:
    model = make("mixtral")
    prompts = prompts_of(model)
    saved, invokers = [], []
    with model.generate(**PLAIN) as generator:
        for number, ids in enumerate(prompts):
            with generator.invoke(ids) as invoker, invoker.step(1):
                block = model.model.layers[0]
                if number == 2:  # with the cache among them
                    block.inputs[0][0].save()
                saved.append(block.output[0].save())
            invokers.append(invoker)
    shared, single = generator.plan.passes
    assert sorted([list(shared.invocations), list(single.invocations)]) == [[0, 1, 3], [2]]
    assert "cannot be cut" in generator.plan.explain()
    for ids, invoker, value in zip(prompts, invokers, saved, strict=True):
        tokens, seen = alone(model, ids, "model.layers.0")
        assert torch.equal(invoker.output, tokens)
        torch.testing.assert_close(value.value, seen[1], atol=1e-5, rtol=1e-4)


def test_what_lines_draw_comes_from_the_seed_of_their_prompt() -> None:
    model = LanguageModel(tiny_gpt2())
    prompts = prompts_of(model)
    options = {**PLAIN, "do_sample": True}
    saved, invokers = [], []
    state = torch.get_rng_state()
    with model.generate(**options) as generator:
        for seed, ids in enumerate(prompts):
            with generator.invoke(ids, seed=seed) as invoker:
                if seed == 1:
                    output = model.transformer.h[0].output[0]
                    saved.append(torch.rand_like(output[:, -1]).save())
            invokers.append(invoker)
    assert torch.equal(state, torch.get_rng_state())
    assert "draw comes from its seed" in generator.plan.explain()
    assert len(generator.plan.passes) == 2
    for seed, (ids, invoker) in enumerate(zip(prompts, invokers, strict=True)):
        noise: list[torch.Tensor] = []

        def draw(step: int, value: torch.Tensor, seed: int = seed, noise: Any = noise) -> Any:
            if seed == 1 and step == 0:
                noise.append(torch.rand_like(value[:, -1]))
            return value

        torch.manual_seed(seed)
        tokens, _ = alone(model, ids, "lm_head", {"transformer.h.0": draw}, **options)
        assert torch.equal(invoker.output, tokens)
        if seed == 1:
            assert torch.equal(saved[0].value, noise[0])


def test_keys_and_values_are_cached_where_no_config_says_so() -> None:
    model = LanguageModel(tiny_gpt2())
    module: Any = model.module
    module.generation_config.use_cache = None
    prompts = prompts_of(model, (3, 5))
    saved = []
    with model.generate(**PLAIN) as generator:
        for ids in prompts:
            with generator.invoke(ids), generator.every_step():
                saved.append(model.transformer.h[1].output.save())
    for ids, values in zip(prompts, saved, strict=True):
        _, seen = alone(model, ids, "transformer.h.1")
        assert_alike([value[0] for value in values.value], seen)
        if seen[1].shape[1] == 1:  # Transformers 4 leaves it to the model's own config
            assert len(values.value[1]) == 2


def test_a_prompt_that_goes_on_without_the_one_it_needs_says_so() -> None:
    model = LanguageModel(tiny_gpt2())
    one, other = prompts_of(model, (3, 5))
    with pytest.raises(NeverRanError, match="ended after 2 steps") as caught:
        with model.generate(**PLAIN) as generator:
            with generator.invoke(one, max_new_tokens=2) as short, generator.invoke(other) as long:
                pass
            with generator.every_step():
                with short:
                    mine = model.transformer.h[0].output[0][:, -1]
                with long:
                    model.transformer.h[1].output[0][:, -1] += mine  # the line to find
    assert "the line to find" in str(caught.value)


def test_what_ends_first_ends_the_list_of_values_of_both() -> None:
    model = LanguageModel(tiny_gpt2())
    one, other = prompts_of(model, (3, 5))
    with model.generate(**PLAIN) as generator:
        with generator.invoke(one, max_new_tokens=2) as short, generator.invoke(other) as long:
            pass
        with generator.every_step():
            with short:
                mine = model.lm_head.output[:, -1]
            with long:
                theirs = model.lm_head.output[:, -1].save()
                both = (mine - model.lm_head.output[:, -1]).save()
    expected = [alone(model, ids, "lm_head")[1] for ids in (one, other)]
    assert_alike(theirs.value, [value[:, -1] for value in expected[1]])
    assert_alike(both.value, [a[:, -1] - b[:, -1] for a, b in zip(*expected, strict=True)][:2])


@pytest.mark.thorough
def test_functions_inside_of_forwards_are_cut_in_each_step() -> None:
    module: Any = tiny_gpt2()
    module.set_attn_implementation("eager")
    model = LanguageModel(module)
    prompts = prompts_of(model)
    saved = []
    with model.generate(**PLAIN) as generator:
        for ids in prompts:
            with generator.invoke(ids), generator.every_step():
                saved.append(model.blocks[1].attention.pattern.save())
    assert len(generator.plan.passes) == 1
    for ids, patterns in zip(prompts, saved, strict=True):
        expected = module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=model.traits.pad_id,
            output_attentions=True,
            return_dict_in_generate=True,
            **PLAIN,
        )
        assert_alike(patterns.value, [layers[1] for layers in expected.attentions])


@pytest.mark.thorough
def test_a_window_that_is_outgrown_keeps_its_cache_out_of_the_batch() -> None:
    config = MistralConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=6,
        max_position_embeddings=64,
    )
    model = LanguageModel(kinds.ready(lambda: MistralForCausalLM(config)))
    prompts = prompts_of(model, (3, 8, 5))
    hiddens, caches, invokers = [], [], []
    with model.generate(**PLAIN) as generator:
        for ids in prompts:
            with generator.invoke(ids) as invoker, generator.every_step():
                model.model.layers[0].mlp.output[:, -1] *= 3.0
                hiddens.append(model.lm_head.output.save())
            invokers.append(invoker)
    assert len(generator.plan.passes) == 1

    def triple(step: int, value: torch.Tensor) -> torch.Tensor:
        return torch.cat([value[:, :-1], value[:, -1:] * 3.0], 1)

    for ids, values, invoker in zip(prompts, hiddens, invokers, strict=True):
        tokens, seen = alone(model, ids, "lm_head", {"model.layers.0.mlp": triple})
        assert torch.equal(invoker.output, tokens)
        assert_alike(values.value, seen)
    with model.generate(**PLAIN) as generator:
        for ids in prompts:
            with generator.invoke(ids) as invoker, invoker.step(2):
                caches.append(model.model.layers[0].output[1][0].save())
    assert len(generator.plan.passes) == len(prompts)
    for ids, keys in zip(prompts, caches, strict=True):
        found: list[torch.Tensor] = []

        def keep(part: nn.Module, args: Any, kwargs: Any, output: Any, found=found) -> None:
            held = [one for one in (*args, *kwargs.values()) if hasattr(one, "layers")]
            found.append(held[0].layers[0].keys.clone())

        handle = model.module.model.layers[0].register_forward_hook(keep, with_kwargs=True)
        alone(model, ids, "lm_head")
        handle.remove()
        torch.testing.assert_close(keys.value, found[2])


@pytest.mark.parametrize("steps", [2, 3])
def test_the_block_means_the_invocation_around_the_line(steps: int) -> None:
    """`generator.next()`, `.tokens` and the like, in each invocation, against hooks."""
    model = make("gpt2")
    prompts = prompts_of(model, (4, 6))
    options = {**PLAIN, "max_new_tokens": steps}
    found: list[tuple[Any, ...]] = []
    with model.generate(**options) as generator:
        for ids in prompts:
            with generator.invoke(ids):
                chosen = [generator.tokens(step).save() for step in range(steps)]
                with generator.step[1]:
                    second = model.lm_head.output.save()
                with generator.every_step():
                    every = model.lm_head.output.save()
                looped = [generator.tokens().save() for _ in generator.steps]
                assert torch.equal(generator.ids, ids) and generator.mask.all()
                each = [model.lm_head.output.save()]
                for _ in range(1, steps):
                    generator.next()
                    each.append(model.lm_head.output.save())
                logits = generator.logits().save()
                with pytest.raises(IndexOutOfRangeError):
                    generator.next()
                found.append((chosen, second, every, looped, each, logits))
        with pytest.raises(BlockError, match="stands in none of them"):
            generator.tokens()
    for ids, (chosen, second, every, looped, each, logits) in zip(prompts, found, strict=True):
        tokens, seen = alone(model, ids, "lm_head", max_new_tokens=steps)
        new = [*tokens[0, ids.shape[1] :]]
        assert [one.value.item() for one in chosen] == [one.value.item() for one in looped] == new
        for ours in (each, every):
            for one, other in zip(ours, seen, strict=True):
                torch.testing.assert_close(torch.as_tensor(one)[:, -1], other[:, -1])
        torch.testing.assert_close(second.value[:, -1], seen[1][:, -1])
        torch.testing.assert_close(logits.value, seen[-1][:, -1])


def test_a_step_that_begins_outside_of_invocations_is_of_all() -> None:
    model = make("gpt2")
    prompts = prompts_of(model, (4, 6))
    with model.generate(**PLAIN) as generator:
        invokers = [generator.invoke(ids) for ids in prompts]
        generator.next()
        saved = []
        for invoker in invokers:
            with invoker:
                saved.append(model.lm_head.output.save())
    for ids, one in zip(prompts, saved, strict=True):
        torch.testing.assert_close(one.value, alone(model, ids, "lm_head")[1][1])


def test_the_output_of_a_trace_is_that_of_the_invocation_around_the_line() -> None:
    model = make("gpt2")
    prompts = prompts_of(model, (4, 6))
    with model.trace() as tracer:
        saved = []
        for ids in prompts:
            with tracer.invoke(ids):
                saved.append(tracer.output.logits.save())
    for ids, one in zip(prompts, saved, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(one.value, model.module(ids).logits)
