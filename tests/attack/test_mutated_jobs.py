"""A few of the jobs that `make attack` tries."""

from __future__ import annotations

import os

import pytest
import torch

from tests.attack.jobs import IDS
from tests.attack.mutated_jobs import GROWTH, mutate, samples
from tests.conftest import tiny_gpt2

pytestmark = pytest.mark.no_wire
MUTATIONS = int(os.environ.get("INSITU_MUTATIONS", "2000"))


def test__mutated_jobs_give_documented_errors_only() -> None:
    outcome = mutate(MUTATIONS, int(0.06 * MUTATIONS), seed=7)
    assert not outcome.wrong, outcome.wrong[:3]
    assert outcome.growth < GROWTH
    assert outcome.counts["read"] > 0.15 * MUTATIONS, outcome.counts
    assert outcome.counts["ran"] > 0.008 * MUTATIONS, outcome.counts
    assert outcome.counts["ran, though wrong"] < 0.001 * MUTATIONS, outcome.counts
    with torch.no_grad():
        plain = tiny_gpt2()(torch.tensor(IDS)).logits
    model = samples()[-1].model
    with model.trace(IDS):  # and the next block is right
        logits = model.lm_head.output.save()
    torch.testing.assert_close(logits.value, plain)
