"""Containers that a module fills in its own forward: runs of the library's own leave none of it."""

from __future__ import annotations

from collections import deque
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor

from insitu import LanguageModel
from tests.conftest import tiny_llama

PROMPTS = [torch.tensor([[5, 17, 3, 88, 41, 2, 60]]), torch.tensor([[9, 8, 7]])]


class Logging(nn.Module):
    """An MLP that keeps what passes, as research code does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.log: list[torch.Tensor] = []
        self.last: deque[torch.Tensor] = deque(maxlen=2)
        self.stats: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        self.log.append(y.detach())
        self.last.append(y.detach())
        self.stats["last"] = y.detach()
        return y


def logged() -> tuple[LanguageModel, Logging]:
    module: Any = tiny_llama()
    module.model.layers[1].mlp = log = Logging(module.model.layers[1].mlp)
    return LanguageModel(cast(nn.Module, module.eval())), log


@pytest.mark.thorough
def test_shapes_and_names_leave_containers_of_modules() -> None:
    model, log = logged()
    with model.scan(PROMPTS[0]):
        assert model.blocks[1].residual_mid.shape == (1, 7, 16)
        assert model.model.layers[1].mlp.output.shape == (1, 7, 16)
    assert not log.log and not log.last and not log.stats


def test_trials_leave_containers_of_modules() -> None:
    model, log = logged()
    with model.trace() as tracer:
        for prompt in PROMPTS:
            with tracer.invoke(prompt):
                model.model.layers[0].output[0][:, -1] *= 2
                model.lm_head.output.save()
    assert len(tracer.plan.passes) == 1
    kept = [*log.log, *log.last, *log.stats.values()]
    # Trials have other shapes. The suite may run a block a second time, from its bytes.
    assert {tuple(value.shape) for value in kept} == {(2, 7, 16)}
    assert not any(isinstance(value, FakeTensor) for value in kept)
