"""A few thousand of the jobs that `make attack` tries."""

from __future__ import annotations

import pytest
import torch

from tests.attack.jobs import IDS
from tests.attack.mutated_jobs import GROWTH, mutate, samples
from tests.conftest import tiny_gpt2

pytestmark = pytest.mark.no_wire


def test_thousands_of_mutated_jobs_give_documented_errors_only() -> None:
    outcome = mutate(10_000, 600, seed=7)
    assert not outcome.wrong, outcome.wrong[:3]
    assert outcome.growth < GROWTH
    assert outcome.counts["read"] > 1500 and outcome.counts["ran"] > 80, outcome.counts
    assert outcome.counts["ran, though wrong"] < 10, outcome.counts
    with torch.no_grad():
        plain = tiny_gpt2()(torch.tensor(IDS)).logits
    model = samples()[-1].model
    with model.trace(IDS):  # and the next block is right
        logits = model.lm_head.output.save()
    torch.testing.assert_close(logits.value, plain)
