import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from transformers import BatchEncoding

from insitu import BlockError, InsituError, LanguageModel, Model, NoValueError, ShapeError
from tests.conftest import hooked_hidden, tiny_gpt2

IDS = torch.tensor([[3, 14, 15, 92, 65]])


def state(module: nn.Module) -> dict:
    """Everything of a module that a run could leave changed."""

    def plain(value: object) -> object:
        return (
            value if isinstance(value, bool | int | float | str | None.__class__) else type(value)
        )

    return {
        path: {
            name: (len(value) if "hooks" in name else plain(value))
            for name, value in vars(part).items()
            if name not in ("_parameters", "_buffers", "_modules")
        }
        | {"parameters": sorted(part._parameters), "buffers": sorted(part._buffers)}
        | {"grads": [p.grad for p in part.parameters(recurse=False)]}
        for path, part in module.named_modules()
    }


def assert_untouched(module: nn.Module) -> None:
    untouched = tiny_gpt2()
    assert state(module) == state(untouched)
    assert not any(p.requires_grad is False for p in module.parameters())
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert torch.equal(module(IDS).logits, untouched(IDS).logits)


@pytest.mark.no_wire  # it counts runs
def test_nothing_runs_before_the_block_ends(gpt2: LanguageModel) -> None:
    calls = []
    gpt2.module.register_forward_pre_hook(lambda *_: calls.append(1))
    with gpt2.trace() as tracer:
        with tracer.invoke(IDS):
            gpt2.lm_head.output.save()
        assert not calls
    assert len(calls) == 1


def test_an_exception_in_the_block_runs_nothing_and_passes_through(gpt2: LanguageModel) -> None:
    calls = []
    handle = gpt2.module.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ZeroDivisionError), gpt2.trace(IDS):
        saved = gpt2.lm_head.output.save()
        _ = 1 / 0
    assert not calls
    with pytest.raises(NoValueError, match="its block raised ZeroDivisionError"):
        _ = saved.value
    with pytest.raises(BlockError):
        _ = gpt2.lm_head.output
    handle.remove()
    assert_untouched(gpt2.module)


def test_the_model_is_untouched_after_a_run(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        gpt2.transformer.h[1].output[0].save()
    assert_untouched(gpt2.module)
    with gpt2.generate(IDS, max_new_tokens=2):
        gpt2.transformer.h[1].attn.inputs.save()
        gpt2.transformer.h[1].input.save()
        gpt2.lm_head.output.save()
    assert_untouched(gpt2.module)


@pytest.mark.parametrize("mode", ["trace", "generate"])
@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_the_model_is_untouched_after_a_run_that_was_broken_off(
    gpt2: LanguageModel, mode: str, failure: type[BaseException]
) -> None:
    def interrupt(*_: object) -> None:
        raise failure("in the middle")

    handle = gpt2.module.transformer.h[2].mlp.register_forward_hook(interrupt)
    run = gpt2.trace(IDS) if mode == "trace" else gpt2.generate(IDS, max_new_tokens=2)
    with pytest.raises(failure), run:
        kept = gpt2.transformer.h[0].output[0].save()
        gpt2.transformer.h[3].inputs.save()
        gpt2.lm_head.output.save()
    handle.remove()
    assert_untouched(gpt2.module)
    with pytest.raises(NoValueError, match=f"its run raised {failure.__name__}"):
        _ = kept.value
    with gpt2.trace(IDS):
        again = gpt2.transformer.h[0].output[0].save()
    assert torch.equal(again, hooked_hidden(gpt2.module, "transformer.h.0", IDS))


def test_the_model_is_untouched_after_an_operation_that_failed(gpt2: LanguageModel) -> None:
    with pytest.raises(ShapeError, match="the line to find"), gpt2.trace(IDS):
        h = gpt2.transformer.h[1].output[0]
        (h @ h).save()  # the line to find
        gpt2.lm_head.output.save()
    assert_untouched(gpt2.module)


def test_the_model_is_untouched_after_shapes_were_inferred(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        assert gpt2.transformer.h[1].output[0].shape == (1, 5, 16)
        assert_untouched(gpt2.module)
    assert_untouched(gpt2.module)


@pytest.mark.no_wire  # it counts calls
def test_a_trace_stops_once_nothing_is_waiting(gpt2: LanguageModel) -> None:
    ran = []
    for i, block in enumerate(gpt2.module.transformer.h):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    with gpt2.trace(IDS):
        late = gpt2.transformer.h[1].output[0]
        early = gpt2.transformer.h[0].output[0]
        (late - early).save()
    assert ran == [0, 1]


def test_a_generation_always_completes(gpt2: LanguageModel) -> None:
    with gpt2.generate(IDS, max_new_tokens=3) as generator:
        gpt2.transformer.h[0].output[0].save()
    assert generator.output.shape == (1, 8)


@pytest.mark.no_wire  # it counts hooks
def test_hooks_are_on_touched_modules_only_and_gone_once_they_fired(gpt2: LanguageModel) -> None:
    seen = []

    def count(module, args):
        seen.append(sum(len(part._forward_hooks) for part in gpt2.module.modules()))

    handle = gpt2.module.transformer.h[2].register_forward_pre_hook(count)
    with gpt2.generate(IDS, max_new_tokens=3):
        gpt2.transformer.h[0].output[0].save()
        gpt2.transformer.h[3].output[0].save()
    handle.remove()
    assert seen == [1, 0, 0]


def test_no_gradient_is_recorded(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS) as tracer:
        logits = tracer.output.logits.save()
    assert not logits.value.requires_grad and logits.value.grad_fn is None


def test_reads_may_be_written_in_any_order_and_more_than_once(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        last = gpt2.transformer.h[3].output[0].save()
        first = gpt2.transformer.h[0].output[0].save()
        again = gpt2.transformer.h[3].output[0].save()
    for saved, layer in ((last, 3), (first, 0), (again, 3)):
        assert torch.equal(saved, hooked_hidden(gpt2.module, f"transformer.h.{layer}", IDS))


def test_values_of_several_invocations_can_be_combined(gpt2: LanguageModel) -> None:
    other = IDS.flip(1)
    with gpt2.trace() as tracer:
        with tracer.invoke(IDS):
            a = gpt2.transformer.h[3].output[0]
        with tracer.invoke(other):
            b = gpt2.transformer.h[1].output[0]
        difference = (a - b).save()
    expected = hooked_hidden(gpt2.module, "transformer.h.3", IDS) - hooked_hidden(
        gpt2.module, "transformer.h.1", other
    )
    torch.testing.assert_close(difference.value, expected, atol=1e-6, rtol=0)


def test_misused_blocks_say_what_to_write(gpt2: LanguageModel) -> None:
    with pytest.raises(BlockError, match="no prompt"), gpt2.trace():
        pass
    tracer = gpt2.trace(IDS)
    with tracer:
        with pytest.raises(BlockError, match="given its prompt already"):
            tracer.invoke(IDS)
        with pytest.raises(BlockError, match="entered before"):
            tracer.__enter__()
    with pytest.raises(BlockError, match="entered before"):
        tracer.__enter__()
    with pytest.raises(BlockError, match="belongs inside its block"):
        gpt2.trace().invoke(IDS)
    with gpt2.trace() as several:
        with several.invoke(IDS) as invoker:
            pass
        with pytest.raises(BlockError, match="stands in none of them"):
            _ = several.output
    with pytest.raises(BlockError, match="inside the block"):
        _ = invoker.output
    with pytest.raises(BlockError), invoker:
        pass
    with gpt2.generate(max_new_tokens=1) as generator:
        with generator.invoke(IDS) as invoker:
            with pytest.raises(NoValueError, match="runs when"):
                _ = invoker.output
        with pytest.raises(NoValueError, match="runs when"):
            _ = generator.output


def test_a_value_that_was_not_saved_says_where_to_save_it(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        h = gpt2.transformer.h[1].output[0]  # the line to find
        with pytest.raises(NoValueError, match="no value yet"):
            _ = h.value
    with pytest.raises(NoValueError, match="was not saved") as caught:
        _ = h.value
    assert "the line to find" in str(caught.value)
    with pytest.raises(NoValueError, match="was not saved"):
        _ = h + 1
    with pytest.raises(NoValueError, match="cannot be saved any more"):
        h.save()


def test_a_value_of_an_open_block_cannot_be_used_in_another(gpt2, llama) -> None:
    with pytest.raises(NoValueError, match="no value yet"), gpt2.trace(IDS):
        h = gpt2.transformer.h[1].output[0]
        with llama.trace(IDS):
            llama.model.norm.output + h


def test_a_saved_slice_keeps_the_slice_only(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        last = gpt2.transformer.h[1].output[0][:, -1].save()
    assert last.value.untyped_storage().nbytes() == 16 * 4


def test_what_nobody_keeps_is_gone_at_once(gpt2: LanguageModel) -> None:
    gc.collect()
    gc.disable()
    try:
        with gpt2.trace(IDS) as tracer:
            kept = gpt2.transformer.h[0].output[0].save()
            dropped = gpt2.transformer.h[1].output[0].save()
        value = weakref.ref(dropped.value)
        block = weakref.ref(tracer)
        del tracer, dropped
        assert block() is None and value() is None
        assert kept.value.shape == (1, 5, 16)
    finally:
        gc.enable()


@pytest.mark.no_wire  # it counts values
def test_values_are_dropped_after_their_last_use(gpt2: LanguageModel) -> None:
    alive = []
    outputs: list[weakref.ref] = []
    gpt2.module.transformer.h[0].mlp.register_forward_hook(
        lambda mod, args, out: outputs.append(weakref.ref(out))
    )
    gpt2.module.lm_head.register_forward_pre_hook(
        lambda *_: alive.append([ref() is not None for ref in outputs])
    )
    with gpt2.trace(IDS):
        mean = gpt2.transformer.h[0].mlp.output.mean().save()
        gpt2.lm_head.output.save()
    assert alive == [[False]] and mean.value.ndim == 0


def test_threads_get_their_own_results(gpt2: LanguageModel) -> None:
    prompts = [torch.randint(0, 100, (1, 4 + i)) for i in range(4)]
    expected = [hooked_hidden(gpt2.module, "transformer.h.2", ids) for ids in prompts]
    wrong: list[object] = []

    def work(ids: torch.Tensor, right: torch.Tensor) -> None:
        try:
            for i in range(20):
                with gpt2.trace(ids):
                    h = gpt2.transformer.h[2].output[0]
                    if i % 5 == 0 and h.shape != right.shape:
                        wrong.append(h.shape)
                    h = h.save()
                if not torch.equal(h, right):
                    wrong.append(ids)
        except BaseException as error:
            wrong.append(error)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(prompts, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_run_waits_while_another_threads_probe_has_fake_weights_in(gpt2: LanguageModel) -> None:
    ids = torch.randint(0, 100, (1, 4))
    right = hooked_hidden(gpt2.module, "transformer.h.2", ids)
    embedding = gpt2.transformer.wte.module
    weight, got = embedding.weight, list[object]()

    def work() -> None:
        with gpt2.trace(ids):
            hidden = gpt2.transformer.h[2].output[0].save()
        got.append(hidden.value)

    thread = threading.Thread(target=work)
    with gpt2.exclusive:
        # In the middle of a probe, a fake weight says that it is on the meta device.
        embedding.weight = nn.Parameter(weight.to("meta"))
        thread.start()
        thread.join(0.3)
        embedding.weight = weight
    thread.join()
    assert len(got) == 1 and torch.equal(got[0], right)


def test_two_wrappers_of_one_module_do_not_mix(gpt2: LanguageModel) -> None:
    wrappers = [gpt2, LanguageModel(gpt2.module)]
    assert wrappers[0].exclusive is wrappers[1].exclusive  # one waits for the other
    with torch.no_grad():
        expected = [gpt2.module(IDS, use_cache=False).logits]
    handle = gpt2.module.transformer.h[1].register_forward_hook(doubled)
    with torch.no_grad():
        expected.append(gpt2.module(IDS, use_cache=False).logits)
    handle.remove()
    found: list[list[torch.Tensor]] = [[], []]
    ready = threading.Barrier(2)

    def work(number: int) -> None:
        model = wrappers[number]
        ready.wait()
        for _ in range(20):
            with model.trace(IDS):
                if number:
                    model.transformer.h[1].output = model.transformer.h[1].output[0] * 2
                logits = model.lm_head.output.save()
            found[number].append(logits.value)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, right in zip(found, expected, strict=True):
        assert len(own) == 20 and all(torch.equal(value, right) for value in own)


def doubled(module: nn.Module, args: object, output: object) -> object:
    if isinstance(output, tuple):
        return (output[0] * 2, *output[1:])
    assert isinstance(output, torch.Tensor)
    return output * 2


def test_running_a_model_inside_its_own_run_is_refused(gpt2: LanguageModel) -> None:
    def nested(*_: object) -> None:
        with gpt2.trace(IDS):
            gpt2.lm_head.output.save()

    handle = gpt2.module.transformer.h[1].register_forward_hook(nested)
    with pytest.raises(BlockError, match="running already"), gpt2.trace(IDS):
        gpt2.lm_head.output.save()
    handle.remove()
    assert_untouched(gpt2.module)


def test_the_graph_is_plain_data(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS) as tracer:
        (gpt2.transformer.h[1].output[0][:, -1] * 2).save()
    names = [node.operation.name for node in tracer.graph]
    assert names == ["read", "operator.getitem", "operator.getitem", "operator.mul", "save"]
    assert [node.inputs for node in tracer.graph] == [(), (0,), (1,), (2,), (3,)]
    assert {node.location.file for node in tracer.graph} == {__file__}
    assert len(copy.deepcopy(tracer.graph)) == 5


def test_every_error_is_an_insitu_error_and_a_builtin_one() -> None:
    import insitu

    named = [getattr(insitu, name) for name in insitu.__all__]
    errors = [one for one in named if isinstance(one, type) and issubclass(one, Exception)]
    assert {InsituError, BlockError, NoValueError, ShapeError} < set(errors)
    for found in set(errors) - {InsituError}:
        assert issubclass(found, InsituError)
        builtin = {base for base in found.__mro__ if base.__module__ == "builtins"}
        assert builtin > {object, BaseException, Exception}, found


def test_model_runs_each_invocation_with_its_own_arguments() -> None:
    model = Model(nn.Sequential(nn.Linear(3, 2)))
    with model.trace() as tracer:
        with tracer.invoke(torch.ones(1, 3)):
            a = model[0].output.save()
        with tracer.invoke(torch.zeros(2, 3)):
            b = model[0].output
        c = (b - a).save()
    with torch.no_grad():
        ones, zeros = model.module(torch.ones(1, 3)), model.module(torch.zeros(2, 3))
    assert torch.equal(a, ones) and torch.equal(c, zeros - ones)


def test_a_prompt_may_be_filled_anew_for_the_next_invocation(gpt2: LanguageModel) -> None:
    ids, saved = IDS.clone(), []
    with gpt2.trace() as tracer:
        for first in (10, 11, 12):
            ids[0, 0] = first
            with tracer.invoke(ids):
                saved.append(gpt2.transformer.wte.input.save())
    assert [value[0, 0].item() for value in saved] == [10, 11, 12]


def test_a_prompt_of_any_form_may_be_filled_anew(gpt2: LanguageModel) -> None:
    mask = torch.ones_like(IDS)
    given = BatchEncoding({"input_ids": IDS.clone(), "attention_mask": mask})
    ids, saved = IDS.clone(), []
    with gpt2.trace() as tracer:
        for first in (10, 11):
            given["input_ids"][0, 0] = first
            with tracer.invoke(given):
                saved.append(gpt2.transformer.wte.input.save())
    with gpt2.session():
        for first in (12, 13):
            ids[0, 0] = first
            with gpt2.trace(ids):
                saved.append(gpt2.transformer.wte.input.save())
        for first in (14, 15):
            ids[0, 0] = first
            with gpt2.trace(input_ids=ids, attention_mask=mask):
                saved.append(gpt2.transformer.wte.input.save())
    assert [value[0, 0].item() for value in saved] == [10, 11, 12, 13, 14, 15]
    plain, x, kept = Model(nn.Identity()), torch.zeros(1), []
    with plain.session():
        for number in (1.0, 2.0):
            x.fill_(number)
            with plain.trace(x):
                kept.append(plain.output.save())
    assert [value.item() for value in kept] == [1.0, 2.0]


def test_a_missing_site_is_reported_for_its_own_invocation() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) if x.sum() > 0 else x

    model = Model(Branches())
    with pytest.raises(InsituError, match="the culprit"), model.trace() as tracer:
        with tracer.invoke(torch.ones(1)):
            model.a.output.save()
        with tracer.invoke(-torch.ones(1)):
            model.a.output.save()  # the culprit


def test_another_threads_own_call_of_the_module_is_not_ours(gpt2: LanguageModel) -> None:
    other = IDS.flip(1)
    results: list[torch.Tensor] = []

    def beside(*_: object) -> None:
        handle.remove()
        thread = threading.Thread(target=lambda: results.append(gpt2.module(other).logits))
        thread.start()
        thread.join()

    handle = gpt2.module.register_forward_pre_hook(beside)
    with gpt2.trace(IDS):
        hidden = gpt2.transformer.h[1].output[0].save()
    assert torch.equal(hidden, hooked_hidden(gpt2.module, "transformer.h.1", IDS))
    assert torch.equal(results[0], gpt2.module(other).logits)


def test_inferring_shapes_leaves_nothing_fake_in_the_module() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.cache = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.cache is None:
                self.cache = torch.arange(3.0)
            return self.linear(x) + self.cache

    model = Model(Lazy())
    with model.trace(torch.ones(1, 3)) as tracer:
        assert model.linear.output.shape == (1, 3)
        output = tracer.output.save()
    assert type(output.value) is torch.Tensor and type(model.module.cache) is torch.Tensor
