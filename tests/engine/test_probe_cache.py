"""Shapes at many lengths: few fake runs, bounded memory, and no shape that a run does not have."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

import insitu.models.own_runs as own_runs
from insitu import LanguageModel, Model
from insitu.engine.probe import Call, Probe
from insitu.graph.structure import map_structure, storage_of, tensors_of
from tests.thinning import sampled, thinned


def ids(length: int, rows: int = 1) -> torch.Tensor:
    return torch.ones(rows, length, dtype=torch.int64)


def mistral() -> LanguageModel:
    config = MistralConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=500,
        sliding_window=40,
        attn_implementation="eager",
    )
    return LanguageModel(MistralForCausalLM(config).eval())


@pytest.fixture
def runs(monkeypatch) -> list[Probe]:
    """The fake runs that were made."""
    made: list[Probe] = []
    probe = own_runs.probe

    def counted(*args: Any) -> Probe:
        made.append(probe(*args))
        return made[-1]

    monkeypatch.setattr(own_runs, "probe", counted)
    return made


def form(value: Any) -> str:
    storages = [storage_of(tensor) for tensor in tensors_of(value)]

    def leaf(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            shared = storages.index(storage_of(item))
            return tuple(item.shape), item.stride(), item.dtype, item.device, shared
        return item if item is None or isinstance(item, bool | int | float | str) else type(item)

    return repr(map_structure(leaf, value))


@pytest.mark.thorough
@pytest.mark.parametrize("options", [{}, {"output_attentions": True}])
@pytest.mark.parametrize("rows", thinned([1, 3], [1]))
def test_many_lengths_take_few_fake_runs_and_have_the_values_of_their_own(
    runs: list[Probe], rows: int, options: dict[str, bool]
) -> None:
    model = mistral()
    lengths = random.Random(rows).sample(range(2, 200), 60)
    answers: dict[int, Probe] = {}
    for length in lengths:
        call = Call((), {"input_ids": ids(length, rows), "use_cache": False, **options})
        answers[length] = model.probe(call, model.views)
    assert len(runs) < 40
    fresh = mistral()
    for length in lengths[-20:]:
        call = Call((), {"input_ids": ids(length, rows), "use_cache": False, **options})
        alone, found = fresh.probe(call, fresh.views), answers[length]
        assert [*found.seen] == [*alone.seen] and found.moments == alone.moments
        for place, value in alone.seen.items():
            assert form(found.seen[place]) == form(value), (length, place)
        for path, value in alone.returned.items():
            assert form(found.returned[path]) == form(value), (length, path)
        fresh = mistral()


@pytest.mark.thorough
def test_lengths_that_grow_or_shrink_take_few_fake_runs_too(runs: list[Probe]) -> None:
    for lengths in (range(50, 450), range(450, 50, -1)):
        runs.clear()
        model = mistral()
        for length in lengths:
            with model.scan(ids(length)):
                assert model.lm_head.output.shape == (1, length, 500)
                model.lm_head.output.save()
        assert len(runs) < 20


@pytest.mark.thorough
def test_the_shapes_of_few_lengths_are_kept() -> None:
    model = LanguageModel(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2)).eval())
    kept: list[weakref.ref[torch.Tensor]] = []
    for length in range(9, 600, 10):  # distances with a common divisor: each has its own
        call = Call((), {"input_ids": ids(length), "use_cache": False})
        seen = model.probe(call, model.views).seen
        kept.append(weakref.ref(tensors_of(seen[("lm_head", "output", 0)])[0]))
        del seen
    assert sum(one() is not None for one in kept) <= 16


@pytest.mark.thorough
def test_functions_inside_of_a_forward_have_their_shapes_at_all_lengths(runs: list[Probe]) -> None:
    model = LanguageModel(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2)).eval())
    for length in (23, 24, 49, *range(25, 49)):
        with model.scan(ids(length)):
            ops = model.transformer.h[1].attn.ops
            parts = ops.split[0].output
            assert parts.shape == ((1, length, 8),) * 3
            assert ops.scaled_dot_product_attention[0].output.shape == (1, 2, length, 4)
            parts[1].save()
    assert len(runs) < 12


class Filled(nn.Module):
    """Returns as many positions as a function makes of those that it is given."""

    def __init__(self, size: Callable[[int], int], **config: int) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.size = size
        self.config = SimpleNamespace(**config, get_text_config=lambda: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length = x.shape
        return self.inner(torch.zeros(rows, self.size(length), device=x.device))


def shapes_are_right(module: Filled, seed: int) -> None:
    wrapped = Model(nn.Sequential(module))
    wrapped.module.config = module.config  # of a model of Transformers
    draw = random.Random(seed)
    for _ in range(60):
        length = draw.randint(1, 90)
        call = Call((torch.ones(2, length),), {})
        found = wrapped._own_runs.probe(call, {}, None).seen["0.inner", "output", 0]
        assert found.shape == (2, module.size(length)), length


@pytest.mark.parametrize("seed", sampled(range(3), [0]))
@pytest.mark.parametrize(
    "size",
    [
        lambda n: n + 20,
        lambda n: min(n, 37),
        lambda n: max(n, 37),
        lambda n: -(-n // 8) * 8,
        lambda n: -(-(n + 3) // 16) * 16,
        lambda n: n // 2 + 1,
        lambda n: 3 * n if n < 50 else n,
        lambda n: n if n < 16 else -(-n // 16) * 16,
        lambda n: n % 7 + 1,
    ],
)
def test_sizes_that_no_config_tells_of_are_those_of_a_run(size, seed: int) -> None:
    shapes_are_right(Filled(size, hidden_size=1000), seed)


@pytest.mark.parametrize("seed", range(5))
def test_a_threshold_of_the_config_parts_lengths(seed: int) -> None:
    # Beyond the window, what is near it looks as if there were none.
    def size(length: int) -> int:
        return 7 if length == 30 else length if length < 30 else -(-length // 30) * 30

    shapes_are_right(Filled(size, window=30), seed)


def test_a_threshold_counts_that_is_within_lists_and_further_configs(runs: list[Probe]) -> None:
    inner = SimpleNamespace(windows=[None, {"window": 30}], get_text_config=lambda: None)
    assert own_runs.config_sizes(inner) == {30}
    outer = SimpleNamespace(text=inner, factor=4.0, act="gelu", get_text_config=lambda: None)
    assert own_runs.config_sizes(outer) == {4, 30}


def test_without_a_config_each_length_has_a_run_of_its_own(runs: list[Probe]) -> None:
    model = Model(nn.Sequential(nn.Linear(4, 4)))
    for length in (5, 6, 9, 7, 8):
        with model.scan(torch.ones(length, 4)):
            assert model[0].output.shape == (length, 4)
            model[0].output.save()
    assert len(runs) == 5


def test_what_has_no_general_answer_is_taken_from_a_run_of_that_length(runs: list[Probe]) -> None:
    model = mistral()
    for length in (53, 54, 80):
        model.probe(Call((), {"input_ids": ids(length), "use_cache": True}), model.views)
    runs.clear()
    call = Call((), {"input_ids": ids(60), "use_cache": True})
    answer = model.probe(call, model.views)
    assert answer.seen[("lm_head", "output", 0)].shape == (1, 60, 500) and not runs
    _, kwargs = answer.seen[("model.layers.0.self_attn", "inputs", 0)]
    cache = next(value for name, value in kwargs.items() if "past" in name)
    assert cache.get_seq_length() == 60 and len(runs) == 1
    assert isinstance(answer.seen[("lm_head", "output", 0)], FakeTensor)
