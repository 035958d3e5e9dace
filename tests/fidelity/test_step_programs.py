"""Random programs on the steps of generations, against plain hooks on a `generate` of each prompt.

A module is called once a step, so that for the oracle a step is a call; the programs are those of
`test_programs.py`.
"""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from insitu import LanguageModel
from tests.conftest import tiny_gpt2
from tests.fidelity.alone import tiny_mistral
from tests.fidelity.programs import (
    Augment,
    Line,
    Place,
    Program,
    Read,
    Replace,
    Subject,
    record,
)
from tests.fidelity.test_programs import check, close, drawn, programs
from tests.thinning import sampled

SHARDS = 4
# Of each shard and model; `make fuzz` asks for more.
EACH = -(-int(os.environ.get("INSITU_STEP_PROGRAMS", "80")) // (2 * SHARDS))
STEPS = 3
GREEDY: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}


class Generates(nn.Module):
    """A model whose call is a generation; its parts stand at their own paths."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, child)
        self._generate: Any = module.generate

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self._generate(
            input_ids, attention_mask=torch.ones_like(input_ids), pad_token_id=0, **GREEDY
        )


def subject_of(module: nn.Module, blocks: str, inside: list[str]) -> Subject:
    module = module.double().eval()  # so that a batch rounds far below the tolerance
    places: list[tuple[Place, int | None]] = []
    for step in range(STEPS):
        for number in range(len(module.get_submodule(blocks))):
            path = f"{blocks}.{number}"
            places += [(Place(path, "input", step), None), (Place(path, "output", step), 0)]
            for site in inside:
                name, _, kind = site.rpartition(".")
                places.append((Place(f"{path}.{name}", kind, step), None))
        places.append((Place("lm_head", "output", step), None))
    draw = torch.Generator().manual_seed(0)
    shapes = ((1, 4), (1, 4), (1, 3), (2, 3), (1, 1))
    prompts = [torch.randint(4, 100, shape, generator=draw) for shape in shapes]
    copy = Generates(deepcopy(module))
    return Subject(
        LanguageModel(module), copy, prompts, lambda ids: {"input_ids": ids}, places, True
    )


@cache
def subject(name: str) -> Subject:
    torch.manual_seed(0)
    if name == "gpt2":  # positions are learned
        inside = ["ln_1.input", "attn.c_proj.output", "mlp.dropout.output", "mlp.act.output"]
        return subject_of(tiny_gpt2(), "transformer.h", inside)
    inside = ["input_layernorm.output", "self_attn.o_proj.input", "mlp.output"]
    return subject_of(tiny_mistral(), "model.layers", inside)  # positions rotate, in a window


def at_step(line: Line) -> tuple[int, Line]:
    """The step that a line means, and the line in it."""
    if not isinstance(line, Read | Replace | Augment):
        return 0, line
    place = line.site.place
    return place.call, replace(line, site=replace(line.site, place=replace(place, call=0)))


def replay(subject: Subject, program: Program, **options: Any) -> list[torch.Tensor]:
    """Runs a program with Insitu and returns what it saves, in the order of the lines."""
    model, saved = subject.model, []
    with model.generate(**GREEDY, **options) as generator:
        invokers = [generator.invoke(subject.prompts[prompt]) for prompt in program.prompts]
        values: dict[str, Any] = {}
        for line in program.lines:
            step, line = at_step(line)
            with invokers[line.invocation] as invoker, invoker.step(step):
                saved.extend(record(line, model, values))
    return [value.value for value in saved]


@pytest.mark.parametrize("shard", sampled(range(SHARDS), [1]))
@pytest.mark.parametrize("name", sampled(["gpt2", "mistral"], ["mistral"]))
def test_programs_of_steps(name: str, shard: int) -> None:
    @drawn(shard, EACH)
    @given(programs(subject(name)), st.sampled_from([None, 4, 12]))
    def agree(program: Program, budget: int | None) -> None:
        options = {} if budget is None else {"max_tokens_per_pass": budget}
        check(subject(name), program, close, replay, **options)

    agree()
