"""Steps of generation, against plain hooks on Hugging Face's own `generate`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from insitu import (
    BlockError,
    CausalityError,
    IndexOutOfRangeError,
    LanguageModel,
    NeverRanError,
    OperationError,
    OptionError,
    Tracer,
)
from tests.conftest import tiny_gpt2
from tests.fidelity.test_writing import IDS, OTHER, SHORT, blocks
from tests.thinning import sampled

NEW = 4


def hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def generated(
    model: LanguageModel, hooks: dict[str, Callable[[int, torch.Tensor], Any]], **kwargs: Any
) -> torch.Tensor:
    """What `generate` returns while hooks, which are told the step, may change outputs."""
    handles = []
    for path, function in hooks.items():

        def hook(module: nn.Module, args: Any, output: Any, function=function, step=[0]) -> Any:  # noqa: B006
            changed = function(step[0], hidden(output))
            step[0] += 1
            if changed is None:
                return None
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handles.append(model.module.get_submodule(path).register_forward_hook(hook))
    ids = kwargs.pop("input_ids", IDS)
    options = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, **kwargs}
    try:
        return model.module.generate(ids, attention_mask=torch.ones_like(ids), **options)
    finally:
        for handle in handles:
            handle.remove()


def recorded(model: LanguageModel, path: str, **kwargs: Any) -> list[torch.Tensor]:
    """What a module returns in each step."""
    found: list[torch.Tensor] = []
    generated(model, {path: lambda step, value: found.append(value.clone())}, **kwargs)
    return found


def test_reads_of_every_step_in_any_order(language_model: LanguageModel) -> None:
    model = language_model
    block = blocks(model)[1]
    with model.generate(max_new_tokens=NEW, eos_token_id=None) as generator:
        with generator.invoke(IDS) as invoker:
            with invoker.step(3):
                last = block.output[0].save()
            with invoker.step[1]:
                second = block.output[0].save()
            first = block.output[0].save()
    expected = recorded(model, block.path)
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])
    assert torch.equal(last, expected[3])
    assert torch.equal(generator.output, generated(model, {}))


def test_a_loop_over_steps_records_each(language_model: LanguageModel) -> None:
    model, saved = language_model, []
    with model.generate(IDS, max_new_tokens=NEW, eos_token_id=None) as generator:
        for step in generator.steps:
            saved.append((step, model.lm_head.output[:, -1].save()))
        outside = model.lm_head.output[:, -1].save()
    expected = recorded(model, "lm_head")
    assert [step for step, _ in saved] == list(range(NEW))
    for step, value in saved:
        assert torch.equal(value, expected[step][:, -1])
    assert torch.equal(outside, expected[0][:, -1])


def test_next_moves_to_the_following_step(gpt2: LanguageModel) -> None:
    with gpt2.generate(max_new_tokens=3, eos_token_id=None) as generator:
        with generator.invoke(IDS) as invoker:
            first = gpt2.lm_head.output.save()
            assert invoker.next() == 1
            second = gpt2.lm_head.output.save()
            invoker.next()
            third = gpt2.lm_head.output.save()
            with pytest.raises(IndexOutOfRangeError, match="steps 0 to 2"):
                invoker.next()
    for value, expected in zip((first, second, third), recorded(gpt2, "lm_head"), strict=False):
        assert torch.equal(value, expected)


def test_what_is_saved_in_every_step_is_a_list_with_one_value_a_step(
    language_model: LanguageModel,
) -> None:
    model = language_model
    block, later = blocks(model)[0], blocks(model)[2]
    with model.generate(max_new_tokens=NEW, eos_token_id=None) as generator:
        with generator.invoke(IDS) as invoker:
            start = block.output[0][:, -1]
            with invoker.every_step():
                values = block.output[0].save()
                sums = (later.output[0][:, -1] + block.output[0][:, -1] - start).save()
    early, late = recorded(model, block.path), recorded(model, later.path)
    assert isinstance(values.value, list) and len(values.value) == NEW
    for step in range(NEW):
        assert torch.equal(values.value[step], early[step])
        expected = late[step][:, -1] + early[step][:, -1] - early[0][:, -1]
        assert torch.equal(sums.value[step], expected)


def test_a_write_in_every_step_steers_the_whole_generation(language_model: LanguageModel) -> None:
    model = language_model
    block = blocks(model)[1]
    torch.manual_seed(1)
    vector = torch.randn(16) * 3
    with model.generate(max_new_tokens=NEW, eos_token_id=None) as generator:
        with generator.invoke(IDS) as invoker, invoker.every_step():
            block.output = block.output[0] + vector
            after = block.output[0].save()
    expected = generated(model, {block.path: lambda step, value: value + vector})
    assert torch.equal(generator.output, expected)
    assert not torch.equal(expected, generated(model, {}))
    plain = recorded(model, block.path)
    assert torch.equal(after.value[0], plain[0] + vector)


def test_a_write_in_one_step_changes_the_steps_after_it(language_model: LanguageModel) -> None:
    model = language_model
    block = blocks(model)[1]
    with model.generate(IDS, max_new_tokens=NEW, eos_token_id=None) as generator:
        first = block.output[0]
        with generator.step(2):
            block.output = block.output[0] * -5 + first[:, -1:]
    kept: list[torch.Tensor] = []

    def change(step: int, value: torch.Tensor) -> Any:
        kept.append(value)
        return value * -5 + kept[0][:, -1:] if step == 2 else None

    assert torch.equal(generator.output, generated(model, {block.path: change}))


def test_a_write_cannot_use_a_later_step(gpt2: LanguageModel) -> None:
    with pytest.raises(CausalityError, match="of step 2"):
        with gpt2.generate(IDS, max_new_tokens=3, eos_token_id=None) as generator:
            with generator.step(2):
                later = gpt2.transformer.h[0].output[0]
            with generator.step(1):
                gpt2.transformer.h[1].output = later


@pytest.mark.parametrize("language_model", sampled(["gpt2", "llama"], ["llama"]), indirect=True)
def test_several_invocations_keep_their_steps_apart(language_model: LanguageModel) -> None:
    model = language_model
    with model.generate(max_new_tokens=NEW, eos_token_id=None) as generator:
        with generator.invoke(IDS) as one, one.every_step():
            first = model.lm_head.output[:, -1].save()
        with generator.invoke(SHORT) as other, other.step(2):
            second = model.lm_head.output[:, -1].save()
    expected = recorded(model, "lm_head")
    torch.testing.assert_close(first.value, [value[:, -1] for value in expected])
    alone = recorded(model, "lm_head", input_ids=SHORT)[2][:, -1]
    torch.testing.assert_close(second.value, alone)
    assert len(generator.plan.passes) == 1


def test_a_step_that_never_came_is_an_error_that_says_why(gpt2: LanguageModel) -> None:
    end = int(generated(gpt2, {})[0, IDS.shape[1] + 1])  # stops after two
    with pytest.raises(NeverRanError, match="Step 3 never came.*after 2 steps") as caught:
        with gpt2.generate(IDS, max_new_tokens=NEW, eos_token_id=end) as generator:
            with generator.step(3):
                gpt2.lm_head.output.save()  # the line to find
    assert "the line to find" in str(caught.value)
    with gpt2.generate(IDS, max_new_tokens=NEW, eos_token_id=end) as generator:
        with generator.step(3):
            missing = gpt2.lm_head.output.argmax(-1).save(optional=True)
        with generator.every_step():
            values = gpt2.lm_head.output.save()
    assert missing.value is None and len(values.value) == 2


def test_steps_outside_of_the_generation_are_refused_at_their_line(gpt2: LanguageModel) -> None:
    with pytest.raises(IndexOutOfRangeError, match="steps 0 to 1") as caught:
        with gpt2.generate(IDS, max_new_tokens=2) as generator, generator.step(2):  # no such
            pass
    assert "no such" in str(caught.value)
    with pytest.raises(OptionError, match="one step"), gpt2.trace(IDS) as tracer, tracer.step(1):
        pass
    with pytest.raises(BlockError, match="every_step"):
        with gpt2.generate(IDS, max_new_tokens=2) as generator, generator.every_step():
            generator.next()


def test_tokens_can_be_read_and_replaced(language_model: LanguageModel) -> None:
    model = language_model
    with model.generate(max_new_tokens=NEW, eos_token_id=None) as generator:
        with generator.invoke(IDS) as invoker:
            chosen = [invoker.tokens(step).save() for step in invoker.steps]
    plain = generated(model, {})
    assert [int(token.value[0]) for token in chosen] == plain[0, IDS.shape[1] :].tolist()

    with model.generate(max_new_tokens=NEW, eos_token_id=None) as generator:
        with generator.invoke(IDS) as invoker:
            invoker.tokens[1] = torch.tensor([77])
            read = invoker.tokens[1].save()
    so_far = plain[:, : IDS.shape[1] + 1]
    start = torch.cat([so_far, torch.tensor([[77]])], 1)
    expected = generated(model, {}, input_ids=start, max_new_tokens=NEW - 2)
    assert torch.equal(generator.output, expected)
    assert read.value.tolist() == [77]


def test_a_replaced_token_can_end_the_generation_and_is_what_streamers_see(
    gpt2: LanguageModel,
) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, tokens: torch.Tensor) -> None:
            self.seen.extend(tokens.flatten().tolist())

        def end(self) -> None:
            self.seen.append(-1)

    streamer = Streamer()
    options = {"max_new_tokens": NEW, "eos_token_id": 50, "streamer": streamer}
    with gpt2.generate(IDS, **options) as generator:
        generator.tokens[2] = torch.tensor([50])
    assert generator.output.shape[1] == IDS.shape[1] + 3 and generator.output[0, -1] == 50
    assert streamer.seen[-2:] == [50, -1]


def test_a_replacement_may_use_what_comes_before_the_choice_only(gpt2: LanguageModel) -> None:
    with gpt2.generate(IDS, max_new_tokens=2, eos_token_id=None) as generator:
        generator.tokens[0] = generator.logits(0).argmin(-1)
        least = gpt2.lm_head.output[:, -1].argmin(-1).save()
    assert generator.output[0, IDS.shape[1]] == least.value[0]
    with pytest.raises(CausalityError):
        with gpt2.generate(IDS, max_new_tokens=2, eos_token_id=None) as generator:
            generator.tokens[0] = generator.tokens[0] + 1


def test_logits_can_be_read_and_replaced(language_model: LanguageModel) -> None:
    model = language_model
    with model.generate(IDS, max_new_tokens=NEW, eos_token_id=None) as generator:
        read = generator.logits(1).save()
        generator.logits[2] = -generator.logits(2)
    expected = generated(model, {"lm_head": lambda step, v: -v if step == 2 else None})
    assert torch.equal(generator.output, expected)
    assert torch.equal(read, recorded(model, "lm_head")[1][:, -1])
    assert not torch.equal(expected, generated(model, {}))


def test_sampling_with_a_seed_has_steps_too(gpt2: LanguageModel) -> None:
    with gpt2.generate(max_new_tokens=NEW, eos_token_id=None, do_sample=True) as generator:
        with generator.invoke(IDS, seed=3) as invoker, invoker.every_step():
            chosen = invoker.tokens().save()
            scores = gpt2.lm_head.output.save()
    torch.manual_seed(3)
    expected = generated(gpt2, {}, do_sample=True)
    assert torch.equal(generator.output, expected)
    tokens = [int(token) for token in chosen.value]
    assert tokens == expected[0, IDS.shape[1] :].tolist() and len(scores.value) == NEW


def test_beam_search_gives_a_row_for_each_beam(gpt2: LanguageModel) -> None:
    beams = {"num_beams": 3, "max_new_tokens": NEW, "eos_token_id": None}
    with gpt2.generate(IDS, **beams) as generator, generator.step(2):
        read = gpt2.lm_head.output.save()
    expected = recorded(gpt2, "lm_head", num_beams=3)
    assert torch.equal(read, expected[2]) and read.value.shape[0] == 3
    with pytest.raises(OptionError, match="Beam search"):
        with gpt2.generate(IDS, **beams) as generator:
            generator.tokens(0)


def test_stopping_criteria_of_the_user_still_count(gpt2: LanguageModel) -> None:
    def after_two(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((ids.shape[0],), ids.shape[1] >= IDS.shape[1] + 2)

    options = {"max_new_tokens": NEW, "eos_token_id": None, "stopping_criteria": [after_two]}
    with gpt2.generate(IDS, **options) as generator, generator.every_step():
        tokens = generator.tokens().save()
    assert len(tokens.value) == 2 and generator.output.shape[1] == IDS.shape[1] + 2


def test_a_value_of_every_step_is_used_inside_only(gpt2: LanguageModel) -> None:
    with pytest.raises(OperationError, match="every_step") as caught:
        with gpt2.generate(OTHER, max_new_tokens=2) as generator:
            with generator.every_step():
                value = gpt2.lm_head.output
            value.mean().save()  # outside
    assert "outside" in str(caught.value)


def test_what_holds_in_every_step_comes_before_what_holds_in_one(gpt2: LanguageModel) -> None:
    with gpt2.generate(OTHER, max_new_tokens=2, eos_token_id=None) as generator:
        with generator.every_step():
            gpt2.lm_head.output = gpt2.lm_head.output * -2
        with generator.step(1):
            seen = gpt2.lm_head.output.save()
            gpt2.lm_head.output = gpt2.lm_head.output * -1
    kept: list[torch.Tensor] = []

    def change(step: int, value: torch.Tensor) -> torch.Tensor:
        kept.append(value * -2)
        return kept[-1] * -1 if step == 1 else kept[-1]

    expected = generated(gpt2, {"lm_head": change}, input_ids=OTHER, max_new_tokens=2)
    assert torch.equal(generator.output, expected) and torch.equal(seen, kept[1])
    with pytest.raises(OperationError, match="every step"):
        with gpt2.generate(OTHER, max_new_tokens=2) as generator:
            gpt2.lm_head.output.save()
            with generator.every_step():
                gpt2.lm_head.output = gpt2.lm_head.output * 2


WRITES: dict[str, Any] = {
    "a part": lambda value: value.__setitem__((slice(None), -1), 0.0),
    "all of it": lambda value: value.mul_(0),
    "a view": lambda value: value[:, -1].zero_(),
}


@pytest.mark.parametrize("way", WRITES)
@pytest.mark.parametrize(("write", "read"), [(None, 0), (None, 2), (2, None)])
def test_lines_that_would_miss_a_write_in_place_are_refused(
    gpt2: LanguageModel, way: str, write: int | None, read: int | None
) -> None:
    """`None` is every step. A read in one step before a write in all, or the other way round."""

    def at(generator: Any, step: int | None) -> Any:
        return generator.every_step() if step is None else generator.step(step)

    for site in (lambda: gpt2.transformer.h[1].output[0], lambda: gpt2.transformer.ln_f.output):
        with pytest.raises(OperationError, match="every step") as caught:
            with gpt2.generate(OTHER, max_new_tokens=3, eos_token_id=None) as generator:
                if write is None:
                    with at(generator, read):
                        site().save()
                with at(generator, write):
                    WRITES[way](site())
                if write is not None:
                    with at(generator, read):
                        site().save()
        assert "`every_step` block first" in str(caught.value)


@pytest.mark.parametrize("way", WRITES)
def test_writes_in_place_are_seen_in_the_steps_that_they_hold_in(
    gpt2: LanguageModel, way: str
) -> None:
    def ends(value: Any) -> bool:
        return bool(value[:, -1].any())

    with gpt2.generate(OTHER, max_new_tokens=3, eos_token_id=None) as generator:
        behind = gpt2.transformer.ln_f.input.save()  # where another site's write arrives
        with generator.every_step():
            WRITES[way](gpt2.transformer.h[-1].output[0])
            last = gpt2.transformer.h[-1].output[0].save()
        with generator.step(2):
            alone = gpt2.transformer.h[-1].output[0].save()
    assert list(map(ends, last)) == [False, False, False]
    assert not ends(behind) and not ends(alone)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("way", [*WRITES, "assigned"])
def test_what_a_write_in_one_step_has_overtaken_is_not_read_in_every_step(
    gpt2: LanguageModel, way: str, named: bool, first: bool
) -> None:
    """In a line behind the write, by the site or by a name from before; also if all were written.

    A name from before an assignment is what it was, as in Python, and the site is not.
    """

    def write(step: int, value: torch.Tensor) -> torch.Tensor:
        if way == "assigned":
            return value * 0 - 3
        value = value.clone()
        WRITES[way](value)
        return value

    def run() -> Any:
        module = gpt2.transformer.ln_f
        with gpt2.generate(OTHER, max_new_tokens=3, eos_token_id=None) as generator:
            with generator.every_step():
                if first:
                    module.output[:] = 2.0
                before = module.output
                early = before.sum().save()
            with generator.step(1):
                if way == "assigned":
                    module.output = module.output * 0 - 3
                else:
                    WRITES[way](module.output)
                own = module.output.save()
            with generator.every_step():
                late = (before if named else module.output).sum().save()
        return generator.output, early.value, own.value, late.value

    if named and way == "assigned":
        seen: list[torch.Tensor] = []

        def change(step: int, value: torch.Tensor) -> torch.Tensor:
            value = value * 0 + 2 if first else value.clone()
            seen.append(value.sum())
            return write(step, value) if step == 1 else value

        expected = generated(gpt2, {"transformer.ln_f": change}, input_ids=OTHER, max_new_tokens=3)
        output, early, own, late = run()
        assert torch.equal(output, expected)
        torch.testing.assert_close(torch.stack(early), torch.stack(seen))
        torch.testing.assert_close(torch.stack(late), torch.stack(seen))
        assert own.eq(-3).all()
        return
    with pytest.raises(OperationError, match=r"for step in generator\.steps"):
        run()


@pytest.mark.parametrize("every", [False, True])
def test_a_value_that_a_write_in_place_only_looks_at_is_no_write_to_its_site(
    gpt2: LanguageModel, every: bool
) -> None:
    first: Any = gpt2.module.transformer.h[0]
    second: Any = gpt2.module.transformer.h[1]
    seen: list[torch.Tensor] = []

    def write(module: nn.Module, args: Any, output: Any) -> None:
        if every or len(seen) == 1:
            hidden(output).add_(seen[0][:, -1:], alpha=50)

    hooks = [
        first.register_forward_hook(lambda *args: seen.append(hidden(args[2]).clone())),
        second.register_forward_hook(write),
    ]
    options: dict[str, Any] = {"max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}
    expected = gpt2.module.generate(OTHER, attention_mask=torch.ones_like(OTHER), **options)
    for hook in hooks:
        hook.remove()
    with gpt2.generate(OTHER, **options) as generator:
        looked_at = gpt2.transformer.h[0].output[0][:, -1:]
        with generator.every_step() if every else generator.step(0):
            gpt2.transformer.h[1].output[0].add_(looked_at, alpha=50)
        with generator.every_step():
            found = gpt2.transformer.h[0].output[0].save()
    assert torch.equal(generator.output, expected)
    assert all(map(torch.equal, found, seen))


LENGTHS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a length in all": {"max_length": 7},
    "a config": {"generation_config": GenerationConfig(max_new_tokens=3, pad_token_id=0)},
    "a config with a length in all": {"generation_config": GenerationConfig(max_length=7)},
}


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize("way", LENGTHS)
@pytest.mark.parametrize("in_place", [False, True])
def test_edits_hold_in_every_step_whatever_says_how_many(
    gpt2: LanguageModel, way: str, in_place: bool
) -> None:
    options = {"eos_token_id": None, "pad_token_id": 0, **LENGTHS[way]}
    with gpt2.edit() as edited:
        if in_place:
            gpt2.transformer.h[1].output[0][:] *= -3
        else:
            gpt2.transformer.h[1].output[0] = gpt2.transformer.h[1].output[0] * -3
    with edited.generate(OTHER, **options) as generator, generator.every_step():
        kept = edited.transformer.h[1].output[0].save()

    def change(module: nn.Module, args: Any, output: Any) -> Any:
        changed = hidden(output) * -3
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = gpt2.module.transformer.h[1].register_forward_hook(change)
    mask = torch.ones_like(OTHER)
    expected = gpt2.module.generate(OTHER, attention_mask=mask, **options)
    handle.remove()
    assert torch.equal(generator.output, expected)
    assert len(kept) == expected.shape[1] - OTHER.shape[1]


def test_a_loop_over_steps_asks_how_many_there_are(gpt2: LanguageModel) -> None:
    with pytest.raises(OptionError, match="give `max_new_tokens=`") as caught:
        with gpt2.generate(OTHER, max_length=7) as generator:
            for _ in generator.steps:
                gpt2.lm_head.output.save()
    assert "test_steps.py" in str(caught.value)
    with pytest.raises(OptionError, match="counted from 0"):
        with gpt2.generate(OTHER, max_length=7) as generator, generator.step(-1):
            gpt2.lm_head.output.save()
    config = GenerationConfig(max_new_tokens=3, eos_token_id=None, pad_token_id=0)
    with gpt2.generate(OTHER, generation_config=config) as generator:
        found = [gpt2.lm_head.output.save() for _ in generator.steps]
    ids = recorded(gpt2, "lm_head", input_ids=OTHER, max_new_tokens=3)
    assert len(found) == 3 and all(map(torch.equal, found, ids))
    with gpt2.generate(OTHER, max_length=OTHER.shape[1] + 3, eos_token_id=None) as generator:
        with generator.step(2):
            last = gpt2.lm_head.output.save()
    assert torch.equal(last, ids[2])


def _in_one_step(generator: Tracer) -> object:
    return generator.step(1)


def _in_every_step(generator: Tracer) -> object:
    return generator.every_step()


@pytest.mark.parametrize("steps", [_in_one_step, _in_every_step])
@pytest.mark.parametrize("others", [0, 1])
def test_an_invocation_does_not_begin_among_the_lines_of_a_step(
    gpt2: LanguageModel, steps: Callable[[Tracer], Any], others: int
) -> None:
    with pytest.raises(BlockError, match="inside of the invocation") as raised:
        with gpt2.generate(max_new_tokens=3) as generator:
            for _ in range(others):
                with generator.invoke(IDS):
                    pass
            with steps(generator):
                with generator.invoke(IDS):  # here
                    gpt2.logits.save()
    assert raised.value.location is not None
    assert "here" in raised.value.location.text or not others


def test_without_a_prompt_there_are_no_steps(gpt2: LanguageModel) -> None:
    with pytest.raises(BlockError, match="no prompt so far"):
        with gpt2.generate(max_new_tokens=3) as generator:
            generator.next()
    with pytest.raises(BlockError, match="no prompt so far"):
        with gpt2.generate(max_new_tokens=3) as generator:
            for _ in generator.steps:
                pass


def test_tokens_and_logits_are_read_inside_of_the_block(gpt2: LanguageModel) -> None:
    with gpt2.generate(max_new_tokens=3) as generator:
        with generator.invoke(IDS) as invoker:
            tokens = invoker.tokens(1).save()
    recorded = len(generator.graph)
    for late in (
        lambda: invoker.tokens(1),
        lambda: invoker.logits[1],
        lambda: invoker.tokens.__setitem__(1, 2),
    ):
        with pytest.raises(BlockError, match="inside the block"):
            late()
    assert len(generator.graph) == recorded
    assert torch.equal(tokens, invoker.output[:, -2])


MORE_FORWARDS = [
    {"guidance_scale": 1.5},
    {"prefill_chunk_size": 2},
    {"prompt_lookup_num_tokens": 2},
]


@pytest.mark.no_wire  # chunks are not in Hugging Face's list of what travels
@pytest.mark.parametrize("options", MORE_FORWARDS, ids=str)
@pytest.mark.parametrize("config", [False, True])
def test_steps_that_are_not_one_forward_are_refused(
    gpt2: LanguageModel, options: dict[str, Any], config: bool
) -> None:
    module: Any = gpt2.module
    expected = module.generate(IDS, max_new_tokens=NEW, pad_token_id=0, **options)
    given = {} if config else options
    if config:
        module.generation_config.update(**options)

    def one_step(generator: Tracer) -> None:
        with generator.step(1):
            gpt2.transformer.h[1].output[0].save()  # this line

    def every_step(generator: Tracer) -> None:
        with generator.every_step():
            gpt2.transformer.h[1].output[0].save()  # this line

    def logits(generator: Tracer) -> None:
        generator.logits(1).save()  # this line

    def tokens(generator: Tracer) -> None:
        generator.tokens(1).save()  # this line

    for lines in (one_step, every_step, logits, tokens):
        with pytest.raises(OptionError, match=next(iter(options))) as raised:
            with gpt2.generate(IDS, max_new_tokens=NEW, **given) as generator:
                lines(generator)
        assert "this line" in str(raised.value)
    with gpt2.generate(IDS, max_new_tokens=NEW, **given) as generator:
        pass
    assert torch.equal(generator.output, expected)


@pytest.mark.parametrize("token", sampled([60000, -1], [60000]))
@pytest.mark.parametrize("prompts", [1, 2])
def test_a_token_that_is_not_in_the_vocabulary_is_refused_at_its_line(
    gpt2: LanguageModel, token: int, prompts: int
) -> None:
    size = gpt2.config.vocab_size
    with pytest.raises(IndexOutOfRangeError, match=f"tokens 0 to {size - 1}") as raised:
        with gpt2.generate(max_new_tokens=NEW) as generator:
            for _ in range(prompts):
                with generator.invoke(IDS) as invoker:
                    invoker.tokens[1] = torch.full(IDS.shape[:1], token)  # this line
    assert "this line" in str(raised.value)
    with gpt2.generate(IDS, max_new_tokens=NEW) as generator:
        generator.tokens[1] = torch.full(IDS.shape[:1], size - 1)
    assert (generator.output[:, IDS.shape[1] + 1] == size - 1).all()


@pytest.mark.parametrize("ends", [[41, 2], 41])
def test_rows_that_have_ended_are_padded_as_generate_pads_them(ends: Any) -> None:
    model = LanguageModel(tiny_gpt2())
    module: Any = model.module
    module.generation_config.pad_token_id = module.config.pad_token_id = None
    ids = torch.cat([IDS, IDS.flip(1)])
    plain = module.generate(ids, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    end = int(plain[0, IDS.shape[1] + 1])  # that the first row chooses, and perhaps not the second
    given = [end, *ends[1:]] if isinstance(ends, list) else end
    mask = torch.ones_like(ids)
    expected = module.generate(ids, max_new_tokens=8, eos_token_id=given, attention_mask=mask)
    assert (expected[0, -1] == end).all()
    with model.generate(ids, max_new_tokens=8, eos_token_id=given) as generator:
        pass
    assert torch.equal(generator.output, expected)
    with model.generate(max_new_tokens=8, eos_token_id=given) as generator:
        for row in ids:
            with generator.invoke(row):
                pass
    assert torch.equal(generator.output, expected)
