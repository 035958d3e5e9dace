"""What runs tell, give away and are asked from outside: events, sinks and cancelling."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import insitu
from insitu import (
    Cancel,
    CancelledError,
    Job,
    LanguageModel,
    MemorySink,
    Model,
    NoValueError,
    OptionError,
    SaveKey,
    cancellable,
    listening,
    saving_to,
)
from insitu.engine.events import (
    Event,
    PassEnded,
    PassStarted,
    StepStarted,
    TokensChosen,
    ValueSaved,
)
from insitu.engine.tree import blocks_in
from tests.thinning import sampled

pytestmark = pytest.mark.no_wire  # another run would be told of too

IDS = torch.tensor([[3, 14, 15, 92, 65]])


def whole(model: Model) -> Callable[[], None]:
    """Notes what hangs on a model, and returns what checks that it is as it was."""

    def now() -> list[Any]:
        return [
            (name, sorted(vars(part)), *(len(table) for table in tables(part)), part.training)
            for name, part in model.module.named_modules()
        ]

    def tables(part: nn.Module) -> Iterator[dict[Any, Any]]:
        yield from (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks)

    before, grads = now(), torch.is_grad_enabled()

    def check() -> None:
        assert now() == before
        assert torch.is_grad_enabled() is grads
        assert all(parameter.grad is None for parameter in model.module.parameters())

    return check


# --- sinks


def test_a_sink_has_what_would_have_been_saved(gpt2: LanguageModel) -> None:
    def block() -> list[Any]:
        with gpt2.trace() as tracer:
            with tracer.invoke(IDS):
                hidden = gpt2.transformer.h[1].output[0]
                one = hidden[:, -1].save("last")
                hidden[:] = 0.0
                other = gpt2.lm_head.output.save()
            with tracer.invoke(IDS[:, :3]):
                third = gpt2.lm_head.output.save()
        return [one, other, third]

    expected, sink = block(), MemorySink()
    with saving_to(sink):
        found = block()
    assert [*sink.values] == [SaveKey("last", 0, 0), SaveKey("1", 0, 0), SaveKey("2", 0, 1)]
    for value, one in zip(sink.values.values(), expected, strict=True):
        torch.testing.assert_close(value, one.value, rtol=0, atol=0)
    for one in found:
        with pytest.raises(NoValueError, match="sink"):
            _ = one.value


def test_a_value_is_given_at_its_line_and_not_kept() -> None:
    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Identity() for _ in range(4))
            self.alive: list[int] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x) + 1
                self.alive.append(len(given))
            return x

    import weakref

    given: list[weakref.ref[torch.Tensor]] = []

    class Counting:
        def save(self, key: SaveKey, value: Any) -> None:
            assert all(one() is None for one in given)  # nobody has those before it
            given.append(weakref.ref(value))

    model = Model(Watched())
    with saving_to(Counting()), model.trace(torch.zeros(2)):
        for layer in model.layers:
            layer.output.save()
        model.output.save()
    assert model.module.alive == [1, 2, 3, 4] and len(given) == 5


def test_a_sink_takes_the_values_of_every_step_as_they_come(gpt2: LanguageModel) -> None:
    came: list[tuple[SaveKey, int]] = []
    steps: list[int] = []

    class Noting(MemorySink):
        def save(self, key: SaveKey, value: Any) -> None:
            came.append((key, len(steps)))
            super().save(key, value)

    def block() -> list[Any]:
        with gpt2.generate() as generator:
            for prompt in (IDS, IDS[:, :3]):
                with generator.invoke(prompt, max_new_tokens=4 - len(prompt[0]) % 2):
                    with generator.every_step():
                        kept.append(gpt2.lm_head.output[:, -1].save(f"logits.{len(kept)}"))
        return kept

    def heard(event: Event) -> None:
        if isinstance(event, StepStarted):
            steps.append(event.step)

    kept: list[Any] = []
    expected = [[*one] for one in block()]
    kept, sink = [], Noting()
    with saving_to(sink), listening(heard):
        block()
    assert steps == [0, 1, 2]
    for number, own in enumerate(expected):
        found = sink.by_name()[f"logits.{number}"]
        assert len(found) == len(own) == 3
        for one, other in zip(found, own, strict=True):
            torch.testing.assert_close(one, other)
    for key, when in came:  # before the next step
        assert when == key.step + 1


def test_gradients_are_given_after_the_backward(gpt2: LanguageModel) -> None:
    def block() -> Any:
        with gpt2.trace(IDS):
            hidden = gpt2.transformer.h[1].output[0]
            gpt2.lm_head.output[0, -1, 7].backward()
            return hidden.grad.save("gradient")

    expected, sink = block(), MemorySink()
    with saving_to(sink):
        block()
    torch.testing.assert_close(sink.by_name()["gradient"], expected.value, rtol=0, atol=0)
    assert expected.value.abs().max() > 0


def test_a_job_gives_its_values_to_a_sink_and_later_blocks_have_them_all_the_same(
    gpt2: LanguageModel,
) -> None:
    with gpt2.session() as session:
        with gpt2.trace(IDS):
            hidden = gpt2.transformer.h[0].output[0].save("hidden")
        with gpt2.trace(IDS):
            gpt2.transformer.h[0].output[0][:] = hidden * 2
            gpt2.lm_head.output.save()
    job = Job.from_bytes(session.job.to_bytes())
    expected, sink = gpt2.run(job), MemorySink()
    results = gpt2.run(job, sink=sink)
    assert [*results] == [] and [*sink.values] == [SaveKey("hidden", 0, 0), SaveKey("1", 1, 0)]
    for name, value in sink.by_name().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    with saving_to(sink := MemorySink()):
        with gpt2.session():
            with gpt2.trace(IDS):
                hidden = gpt2.transformer.h[0].output[0].save("hidden")
            with gpt2.trace(IDS):
                gpt2.transformer.h[0].output[0][:] = hidden * 2
                gpt2.lm_head.output.save("logits")
    torch.testing.assert_close(sink.by_name()["logits"], expected["1"], rtol=0, atol=0)


class Limited(nn.Module):
    """Cannot process more than so many rows at once."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.most = inner, 99

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > self.most:
            raise MemoryError("out of memory")
        return self.inner(x)


def test_a_repeated_pass_gives_nothing_twice() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 100}
    module = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))
    module.transformer.ln_f = Limited(module.transformer.ln_f)  # after the values are there
    module.eval()
    model = LanguageModel(module)
    seen: list[SaveKey] = []

    class Strict(MemorySink):
        def save(self, key: SaveKey, value: Any) -> None:
            seen.append(key)
            super().save(key, value)

    def block() -> list[Any]:
        kept = []
        with model.trace() as tracer:
            for start in range(5):
                with tracer.invoke(torch.arange(start, start + 4).view(1, 4)):
                    kept.append(model.transformer.h[0].output[0].save())
                    kept.append(model.lm_head.output.save())
        return kept

    expected = [one.value for one in block()]
    module.transformer.ln_f.most = 2
    told: list[Event] = []
    with saving_to(sink := Strict()), listening(told.append):
        block()
    assert len(seen) == len(set(seen)) == 10
    assert sum(isinstance(event, ValueSaved) for event in told) == 10
    passes = [event.invocations for event in told if isinstance(event, PassStarted)]
    assert passes[0] == (0, 1, 2, 3, 4) and {n for own in passes[1:] for n in own} == set(range(5))
    for key, value in sink.values.items():
        torch.testing.assert_close(value, expected[int(key.name)])


def test_an_invocation_that_fails_leaves_the_values_of_others_to_the_sink(
    gpt2: LanguageModel,
) -> None:
    sink, told = MemorySink(), []
    with pytest.raises(insitu.InsituError), saving_to(sink), listening(told.append):
        with gpt2.trace() as tracer:
            for number in range(3):
                with tracer.invoke(IDS):
                    hidden = gpt2.transformer.h[0].output[0]
                    at = torch.tensor([99 if number == 1 else 0])
                    hidden[:, at].save(f"hidden.{number}")
    assert [*sink.by_name()] == ["hidden.0", "hidden.2"]
    assert {key.invocation for key in sink.values} == {0, 2}


def test_what_a_sink_raises_is_what_the_run_raises(gpt2: LanguageModel) -> None:
    class Full:
        def save(self, key: SaveKey, value: Any) -> None:
            raise OSError("no space left")

    check = whole(gpt2)
    with pytest.raises(OSError, match="no space left"):
        with saving_to(Full()), gpt2.trace(IDS):
            gpt2.transformer.h[0].output[0].save()
            gpt2.lm_head.output.save()
    check()
    with pytest.raises(OSError, match="no space left"):
        with saving_to(Full()), gpt2.trace(IDS):
            gpt2.lm_head.output[0, -1, 7].backward()
            gpt2.transformer.h[1].output[0].grad.save()
    check()


# --- events


def test_a_run_tells_of_its_passes_and_saved_values(gpt2: LanguageModel) -> None:
    told: list[Event] = []
    with listening(told.append), gpt2.trace(IDS):
        gpt2.transformer.h[0].output[0].save("hidden")
    assert told == [
        PassStarted(0, 0, 1, (0,), 0.0),
        ValueSaved(SaveKey("hidden", 0, 0), 4 * IDS.numel() * 16),
        PassEnded(0, 0, 1, (0,), 1.0),
    ]
    told.clear()
    with gpt2.trace(IDS):
        gpt2.lm_head.output.save()
    assert told == []


@pytest.mark.parametrize("sampled", [False, True])
def test_the_tokens_that_steps_choose_are_those_of_the_output(
    gpt2: LanguageModel, sampled: bool
) -> None:
    options = {"do_sample": True} if sampled else {}
    told: list[Event] = []
    with listening(told.append), gpt2.generate(**options) as generator:
        with generator.invoke(IDS, max_new_tokens=2, seed=3):
            gpt2.lm_head.output[0, -1].save()
        with generator.invoke([[1, 2, 3], [4, 5, 6]], max_new_tokens=4, seed=4):
            pass
    chosen: dict[int, list[tuple[int, ...]]] = {0: [], 1: []}
    for event in told:
        if isinstance(event, TokensChosen):
            assert event.step == len(chosen[event.invocation])
            chosen[event.invocation].append(tuple(event.ids))
    first, second = torch.tensor(chosen[0]).T, torch.tensor(chosen[1]).T
    output = generator.output
    assert torch.equal(output[:1, 5:7], first)
    assert torch.equal(output[1:, -second.shape[1] :], second) or torch.equal(
        output[1:, 3 : 3 + second.shape[1]], second
    )


def test_a_function_is_given_tokens_as_they_come(gpt2: LanguageModel) -> None:
    told: list[TokensChosen] = []
    with gpt2.generate(IDS, max_new_tokens=4, on_token=told.append) as generator:
        assert told == []
    assert [event.step for event in told] == [0, 1, 2, 3]
    assert [token for event in told for token in event.ids] == generator.output[0, -4:].tolist()
    before = len(told)
    with gpt2.generate(IDS, max_new_tokens=2):
        pass
    assert len(told) == before

    async def block() -> torch.Tensor:
        async with gpt2.generate(IDS, max_new_tokens=2, on_token=told.append) as generator:
            pass
        return generator.output

    output = asyncio.run(block())
    assert [event.ids[0] for event in told[before:]] == output[0, -2:].tolist()


def test_tokens_come_to_a_function_only_where_the_block_runs_when_it_ends(
    gpt2: LanguageModel,
) -> None:
    with pytest.raises(OptionError, match="around the session"), gpt2.session():
        gpt2.generate(IDS, max_new_tokens=2, on_token=print)
    with pytest.raises(OptionError, match="is a function"):
        gpt2.generate(IDS, max_new_tokens=2, on_token=3)  # pyright: ignore[reportArgumentType]


def test_listening_changes_nothing_of_a_generation(gpt2: LanguageModel) -> None:
    for options in ({}, {"do_sample": True}, {"num_beams": 2}, {"repetition_penalty": 1.5}):

        def block(options: Any = options) -> torch.Tensor:
            torch.manual_seed(0)
            with gpt2.generate(IDS, max_new_tokens=5, **options) as generator:
                pass
            return generator.output

        expected, told = block(), []
        with listening(told.append):
            assert torch.equal(block(), expected)
        tokens = [event for event in told if isinstance(event, TokensChosen)]
        assert bool(tokens) is ("num_beams" not in options)


@pytest.mark.parametrize(
    "kind",
    sampled(
        [PassStarted, ValueSaved, StepStarted, TokensChosen, PassEnded], [ValueSaved, TokensChosen]
    ),
)
def test_what_a_listener_raises_ends_the_run(gpt2: LanguageModel, kind: type[Event]) -> None:
    def listener(event: Event) -> None:
        if isinstance(event, kind):
            raise ZeroDivisionError("heard enough")

    check = whole(gpt2)
    with pytest.raises(ZeroDivisionError, match="heard enough"), listening(listener):
        with gpt2.generate() as generator:
            for prompt in (IDS, IDS[:, :2]):
                with generator.invoke(prompt, max_new_tokens=3):
                    with generator.every_step():
                        kept = gpt2.lm_head.output.save()
    check()
    with pytest.raises(NoValueError, match="ZeroDivisionError"):
        _ = kept.value
    with gpt2.trace(IDS):
        after = gpt2.lm_head.output.save()
    with torch.no_grad():
        torch.testing.assert_close(after.value, gpt2.module(IDS, use_cache=False).logits)


def test_two_listeners_hear_the_same_and_a_listener_may_run_another_model(
    gpt2: LanguageModel,
) -> None:
    other = Model(nn.Sequential(nn.Identity()))
    one: list[Event] = []
    two: list[Event] = []

    def listener(event: Event) -> None:
        two.append(event)
        with other.trace(torch.ones(1)):  # of which nobody is told
            other[0].output.save()

    with listening(one.append), listening(listener), gpt2.trace(IDS):
        gpt2.lm_head.output.save()
    assert one == two and len(one) == 3


def test_events_of_a_job(gpt2: LanguageModel) -> None:
    with gpt2.session() as session:
        for number in range(2):
            with gpt2.trace(IDS):
                gpt2.lm_head.output.save(f"logits.{number}")
    told: list[Event] = []
    gpt2.run(session.job, events=told.append)
    saved = [event.key for event in told if isinstance(event, ValueSaved)]
    assert saved == [SaveKey("logits.0", 0, 0), SaveKey("logits.1", 1, 0)]
    assert [event.block for event in told if isinstance(event, PassEnded)] == [0, 1]


# --- cancelling


class Slow(nn.Module):
    """Calls its layers one after the other, and says which were called."""

    def __init__(self, then: Callable[[int], object]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
        self.called: list[int] = []
        self.then = then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            try:
                x = layer(x)
            except Exception:  # as a model may do
                continue
            self.called.append(number)
            self.then(number)
        return x


@pytest.mark.parametrize("reads", ["output", "input"])
def test_a_run_ends_between_modules(reads: str) -> None:
    cancel = Cancel()
    model = Model(Slow(lambda number: cancel.cancel() if number == 1 else None))
    check = whole(model)
    with pytest.raises(CancelledError, match=r"layers\[2\]"):
        with cancellable(cancel), model.trace(torch.ones(1, 2)):
            kept = getattr(model.layers[3], reads).save()
    assert model.module.called == [0, 1]
    check()
    with pytest.raises(NoValueError, match="CancelledError"):
        _ = kept.value


def test_whether_to_end_is_asked_before_blocks_or_all_modules_where_there_are_none(
    gpt2: LanguageModel,
) -> None:
    blocks = len(gpt2.transformer.h)
    paths = dict(gpt2.load().named_modules())
    assert blocks_in(paths) == [f"transformer.h.{number}" for number in range(blocks)]
    experts = nn.ModuleList(nn.ModuleList([nn.Linear(2, 2)]) for _ in range(2))
    assert blocks_in(dict(experts.named_modules())) == ["0", "1"]
    assert blocks_in(dict(paths["transformer.h.0.mlp"].named_modules())) == [
        "c_fc", "c_proj", "act", "dropout",
    ]  # fmt: skip


def test_a_run_ends_before_it_begins_and_between_passes(gpt2: LanguageModel) -> None:
    cancel, sink = Cancel(), MemorySink()
    check = whole(gpt2)

    def listener(event: Event) -> None:
        if isinstance(event, PassEnded):
            cancel.cancel()

    def sweep() -> None:
        with gpt2.trace(max_tokens_per_pass=5) as tracer:
            for number in range(3):
                with tracer.invoke(IDS):
                    gpt2.transformer.h[0].output[0][:, number] = 0.0
                    gpt2.lm_head.output.save()

    with pytest.raises(CancelledError, match="after 1 of"):
        with cancellable(cancel), listening(listener), saving_to(sink):
            sweep()
    assert len(sink.values) == 1
    with pytest.raises(CancelledError, match="after 0 of"), cancellable(cancel):
        sweep()
    check()
    sweep()


def test_a_generation_ends_between_steps(gpt2: LanguageModel) -> None:
    cancel, steps = Cancel(), []

    def listener(event: Event) -> None:
        if isinstance(event, TokensChosen):
            steps.append(event.step)
            if event.step == 2:
                cancel.cancel()

    check = whole(gpt2)
    with pytest.raises(CancelledError):
        with cancellable(cancel), listening(listener):
            with gpt2.generate(IDS, max_new_tokens=50):
                gpt2.lm_head.output.save()
    assert steps == [0, 1, 2]
    check()


def test_a_backward_pass_does_not_begin_after_it(gpt2: LanguageModel) -> None:
    cancel = Cancel()
    check = whole(gpt2)
    with pytest.raises(CancelledError, match="backward"):
        with cancellable(cancel), gpt2.trace(IDS):
            loss = gpt2.lm_head.output[0, -1, 7]
            insitu.apply(lambda _: cancel.cancel(), loss)
            loss.backward()
            gpt2.transformer.h[0].output[0].grad.save()
    check()


def test_a_job_is_cancelled_from_another_thread() -> None:
    cancel, begun = Cancel(), threading.Event()

    def then(number: int) -> None:
        begun.set()
        while not cancel.is_cancelled:
            pass

    model = Model(Slow(lambda _: None))
    with model.trace(torch.ones(1, 2)) as tracer:
        model.layers[3].output.save()
    model.module.then = then
    model.module.called.clear()
    check = whole(model)

    def end() -> None:
        begun.wait()
        cancel.cancel()

    thread = threading.Thread(target=end)
    thread.start()
    with pytest.raises(CancelledError):
        model.run(tracer.job, cancel=cancel)
    thread.join()
    assert model.module.called == [0]
    check()


def test_one_of_several_that_fail_is_not_repeated_after_cancelling(gpt2: LanguageModel) -> None:
    cancel, passes = Cancel(), []

    def listener(event: Event) -> None:
        if isinstance(event, PassStarted):
            passes.append(event.invocations)
        if isinstance(event, PassEnded):
            cancel.cancel()

    with pytest.raises(CancelledError), cancellable(cancel), listening(listener):
        with gpt2.trace() as tracer:
            for number in range(3):
                with tracer.invoke(IDS):
                    at = torch.tensor([99 if number == 1 else 0])
                    gpt2.transformer.h[0].output[0][:, at].save()
    assert passes == [(0, 1, 2)]


def test_a_job_that_is_run_in_part_gives_nothing_twice_and_says_whose_it_is(
    gpt2: LanguageModel,
) -> None:
    def record(first: int) -> Job:
        with gpt2.session() as session:
            with gpt2.trace(IDS):
                at = gpt2.lm_head.output[0, -1].argmax() * 0 + first
                scale = gpt2.transformer.h[0].output[0][:, at].save("scale")
            with gpt2.trace() as tracer:
                for number in range(3):
                    with tracer.invoke(IDS):
                        hidden = gpt2.transformer.h[0].output[0]
                        if number == 0:
                            hidden[:] = hidden * scale.sum()
                        hidden[:, -1].save(f"hidden.{number}")
        return session.job

    seen: list[SaveKey] = []

    class Strict(MemorySink):
        def save(self, key: SaveKey, value: Any) -> None:
            seen.append(key)
            super().save(key, value)

    with pytest.raises(insitu.InsituError):
        with gpt2.session() as session:
            with gpt2.trace(IDS):
                _ = gpt2.transformer.h[0].output[0]
                scale = insitu.apply(_refuse, gpt2.lm_head.output).save("scale")
            with gpt2.trace() as tracer:
                for number in range(3):
                    with tracer.invoke(IDS):
                        hidden = gpt2.transformer.h[0].output[0]
                        if number == 0:
                            hidden[:] = hidden * scale
                        hidden[:, -1].save(f"hidden.{number}")
    results = gpt2.run(session.job, sink=Strict(), raises=False)
    assert [*results] == [] and results.failed
    assert seen == [SaveKey("hidden.1", 1, 1), SaveKey("hidden.2", 1, 2)]
    seen.clear()
    gpt2.run(record(1), sink=Strict())
    assert seen[0] == SaveKey("scale", 0, 0) and len(seen) == 4


def _refuse(value: torch.Tensor) -> torch.Tensor:
    raise ValueError("no value")
