import gc
import os
from collections.abc import Callable
from types import FunctionType

import psutil
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from insitu import LanguageModel
from tests.conftest import tiny_gpt2
from tests.thinning import sampled, thinned


def resident() -> int:
    gc.collect()
    return psutil.Process(os.getpid()).memory_info().rss


@pytest.mark.slow
def test_ten_thousand_traces_do_not_grow_the_process() -> None:
    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=4, vocab_size=100, bos_token_id=0, eos_token_id=0
    )
    model = LanguageModel(GPT2LMHeadModel(config).eval())
    ids = torch.randint(0, 100, (1, 16))

    def traces(count: int) -> None:
        for _ in range(count):
            with model.trace(ids):
                hidden = model.transformer.h[0].output[0]
                (hidden * 2)[:, -1].save()
                model.lm_head.output.save()

    traces(500)
    before = resident()
    traces(10_000)
    assert resident() - before < 5 * 2**20


IDS = torch.randint(1, 100, (1, 6), generator=torch.Generator().manual_seed(0))


def read(model: LanguageModel) -> None:
    with model.trace(IDS):
        model.lm_head.output.save()


def write(model: LanguageModel) -> None:
    with model.trace(IDS):
        model.transformer.h[1].output = model.transformer.h[1].output[0] * 0.5
        model.lm_head.output.save()


def write_in_place(model: LanguageModel) -> None:
    with model.trace(IDS):
        model.transformer.h[1].output[0][:, -1] = 0
        model.lm_head.output.save()


def differentiate(model: LanguageModel) -> None:
    with model.trace(IDS):
        model.transformer.h[2].output[0].grad[:, 0] = 0
        model.transformer.h[1].output[0].grad.save()
        model.lm_head.output.sum().backward()


def skip(model: LanguageModel) -> None:
    with model.trace(IDS):
        model.transformer.h[1].skip(model.transformer.h[1].input)
        model.lm_head.output.save()


def generate(model: LanguageModel) -> None:
    with model.generate(IDS, max_new_tokens=3) as generator, generator.every_step():
        model.lm_head.output.save()


def invoke(model: LanguageModel) -> None:
    with model.trace() as tracer:
        for _ in range(3):
            with tracer.invoke(IDS):
                model.lm_head.output.save()


def look_inside(model: LanguageModel) -> None:
    with model.trace(IDS):
        model.transformer.h[0].mlp.act.ops.tanh[0].output.save()


@pytest.mark.no_wire
@pytest.mark.parametrize(
    "experiment",
    sampled(
        thinned(
            [read, write, write_in_place, differentiate, skip, generate, invoke, look_inside],
            [read, write_in_place, differentiate, generate],
        ),
        [write_in_place, generate],
    ),
    ids=lambda experiment: experiment.__name__,
)
def test_a_run_leaves_nothing_to_the_garbage_collector(
    experiment: Callable[[LanguageModel], None],
) -> None:
    model = LanguageModel(tiny_gpt2())
    experiment(model)  # the first finds shapes and fills caches
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        experiment(model)
        gc.collect()
        # The forwards of some versions of Transformers leave cycles of their own.
        ours = [item for item in gc.garbage if _module_of(item).startswith("insitu")]
        assert not ours
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def _module_of(item: object) -> str:
    """Where a function or the class of an object was written."""
    named = item if isinstance(item, FunctionType) else type(item)
    return named.__module__ or ""
