"""What the benchmarks compare is the same: every case gives what the others give."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def experiments() -> Any:
    """The module, which finds its neighbours beside it as a script does."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import experiments

        yield experiments
    finally:
        sys.path.remove(str(BENCHMARKS))


NAMES = [
    *("sweep 12 x 4", "heads 12 x 12", "causal tracing", "steering", "logit lens"),
    *("attribution patching", "64 ragged prompts", "block 6 of 512 prompts", "a trace in a loop"),
]


@pytest.mark.no_wire  # they are many
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_all_cases_of_an_experiment_give_the_same(experiments: Any, name: str) -> None:
    experiment = next(each for each in experiments.EXPERIMENTS if each.name == name)
    cases = experiment.cases(experiments.subject("tiny", experiments.gpt2(24, 12, 50)))
    found = {case: torch.stack(list(run())) for case, run in cases.items() if case != "bare"}
    for case, values in found.items():
        torch.testing.assert_close(values, found["insitu"], atol=1e-5, rtol=1e-4, msg=case)
    assert len(found) >= 2


def test_a_result_that_differs_is_found(experiments: Any) -> None:
    measured = experiments.Measured(
        "steering", experiments.SMALL, {"bare": 1.0, "insitu": 2.0}, 5.0
    )
    told = {
        "library": "other 1.0",
        "measured": {
            "steering": {"times": {"bare": 2.0, "plain": 8.0}, "fingerprints": {"plain": 5.0001}}
        },
    }
    table = experiments.compare(measured, told)
    assert table.rows == [["plain", "8.000", "4.00", "2.00"]]
    told["measured"]["steering"]["times"]["bare"] = 2.0
    told["measured"]["steering"]["fingerprints"]["plain"] = 5.1
    with pytest.raises(ValueError, match="something else"):
        experiments.compare(measured, told)


@pytest.mark.no_wire  # it is about time
def test_a_forward_without_work_is_one_that_experiments_run_on(experiments: Any) -> None:
    import caches  # pyright: ignore[reportMissingImports]
    import overhead  # pyright: ignore[reportMissingImports]

    module, ids = caches.without_work(), torch.zeros(1, 16, dtype=torch.int64)
    plain, insitu = overhead.Plain(module, ids), overhead.Insitu(module, ids)
    for name in caches.NAMES:
        theirs, ours = getattr(plain, name)(), getattr(insitu, name)()
        assert len(ours) == len(theirs)
        for expected, found in zip(theirs, ours, strict=True):
            assert torch.equal(found.value, expected), name
