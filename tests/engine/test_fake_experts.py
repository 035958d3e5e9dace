"""Products of experts on tensors without data: PyTorch's own shapes are of one dtype only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from insitu import LanguageModel
from insitu.engine.counting import Counting
from insitu.graph.fake_tensors import Fakes, on_fake_tensors
from insitu.models import own_runs
from tests.fidelity.zoo import module_of

ROWS, BETWEEN, COLUMNS, EXPERTS = 12, 8, 16, 3
_OFFSETS = [4, 4, ROWS]


def _of_rows(make: Any) -> tuple[Any, ...]:
    return make(ROWS, BETWEEN), make(EXPERTS, BETWEEN, COLUMNS), _OFFSETS


def _of_columns(make: Any) -> tuple[Any, ...]:
    return make(EXPERTS, ROWS, BETWEEN), make(BETWEEN, ROWS), _OFFSETS


def _of_both(make: Any) -> tuple[Any, ...]:
    return make(BETWEEN, ROWS), make(ROWS, COLUMNS), _OFFSETS


def _of_each(make: Any) -> tuple[Any, ...]:
    return make(EXPERTS, ROWS, BETWEEN), make(EXPERTS, BETWEEN, COLUMNS), None


@pytest.mark.parametrize(
    ("form", "products"),
    [
        (_of_rows, ROWS * BETWEEN * COLUMNS),
        (_of_columns, ROWS * BETWEEN * ROWS),
        (_of_both, BETWEEN * ROWS * COLUMNS),
        (_of_each, EXPERTS * ROWS * BETWEEN * COLUMNS),
    ],
)
def test_grouped_products_have_the_shape_and_the_cost_of_real_ones(
    form: Any, products: int
) -> None:
    def product(make: Any) -> torch.Tensor:
        left, right, ends = form(make)
        offsets = None if ends is None else torch.tensor(ends, dtype=torch.int32)
        return torch.ops.aten._grouped_mm.default(left, right, offs=offsets)

    made = product(torch.ones)
    with on_fake_tensors(Fakes()):
        for dtype in (torch.bfloat16, torch.float32):
            with Counting() as counting:
                fake = product(lambda *sizes, dtype=dtype: torch.empty(sizes, dtype=dtype))
            assert fake.shape == made.shape and fake.dtype is dtype
            assert counting.counts.flops == pytest.approx(2 * products, abs=EXPERTS)


def test_prompts_of_one_length_share_their_runs_without_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No run of experts without data depends on what the prompts say."""
    module: Any = module_of("mixtral")
    module.save_pretrained(tmp_path)
    model = LanguageModel(str(tmp_path))
    found: list[int] = []
    probe = own_runs.probe

    def counted(*args: Any) -> Any:
        found.append(1)
        return probe(*args)

    monkeypatch.setattr(own_runs, "probe", counted)
    runs: list[int] = []
    for count in (2, 12):
        found.clear()
        with model.scan() as tracer:
            for number in range(count):
                with tracer.invoke([5, 6, 7 + number]):
                    shape = model.model.layers[0].mlp.output.shape
                    model.output.logits.save()
        assert shape == (1, 3, model.config.hidden_size)
        runs.append(len(found))
    assert runs[0] >= runs[1]
    costs = model.check(tracer.job)
    assert costs.peak_bytes.value > costs.weight_bytes
