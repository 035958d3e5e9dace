"""A few of the jobs that `make attack` tries."""

from __future__ import annotations

import os

import pytest
import torch

from tests.attack.jobs import IDS
from tests.attack.mutated_jobs import GROWTH, mutate, samples
from tests.conftest import tiny_gpt2
from tests.thinning import sampled

pytestmark = pytest.mark.no_wire
FEW = 300
MUTATIONS = int(os.environ.get("INSITU_MUTATIONS", "500"))


@pytest.mark.parametrize("count", sampled([FEW, MUTATIONS], [FEW]))
def test__mutated_jobs_give_documented_errors_only(count: int) -> None:
    outcome = mutate(count, int(0.06 * count), seed=7)
    assert not outcome.wrong, outcome.wrong[:3]
    assert outcome.growth < GROWTH
    assert outcome.counts["read"] > 0.15 * count, outcome.counts
    assert outcome.counts["ran"] > 0.008 * count, outcome.counts
    assert outcome.counts["ran, though wrong"] < 0.001 * count, outcome.counts
    with torch.no_grad():
        plain = tiny_gpt2()(torch.tensor(IDS)).logits
    model = samples()[-1].model
    with model.trace(IDS):  # and the next block is right
        logits = model.lm_head.output.save()
    torch.testing.assert_close(logits.value, plain)
