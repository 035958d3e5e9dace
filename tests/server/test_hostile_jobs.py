"""Jobs of strangers who mean harm, through a whole server that others use meanwhile.

The same with many more of them is `make attack-server`.
"""

from pathlib import Path

import pytest

from tests.attack.hostile_server import attacked
from tests.attack.mutated_jobs import GROWTH

pytestmark = [
    pytest.mark.no_wire,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory in /proc"),
]


@pytest.mark.thorough
def test_hostile_jobs_harm_nobody(tmp_path: Path) -> None:
    with attacked(tmp_path) as attack:
        outcome = attack.run(200)
    assert not outcome.wrong, outcome.wrong[:5]
    assert outcome.counts["sent"] == 200 and outcome.counts["done"] < 150
    assert outcome.neighbours >= 24
    assert max(outcome.growth.values()) < GROWTH
