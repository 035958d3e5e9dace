"""Statistics of a site: in closed form, and as NumPy computes them of all rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from insitu import OptionError
from insitu.harvest import Activations
from tests.harvest.made_folders import LABEL, dense, sparse, write_folder


def test_of_four_points_on_a_circle(tmp_path: Path) -> None:
    """(±3, 1) and (0, 1 ± 3): the mean is (0, 1), and each is 3 from it."""
    rows = torch.tensor([[3.0, 1.0], [-3.0, 1.0], [0.0, 4.0], [0.0, -2.0]])
    write_folder(tmp_path / "a", [[2], [1], [1]], [dense(shape=(2,))], values={LABEL: rows})
    found = Activations.open(tmp_path / "a").statistics(LABEL)
    assert found.rows == 4
    assert torch.equal(found.mean, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert found.covariance_trace == pytest.approx(9, abs=1e-12)
    assert found.mean_norm == pytest.approx((2 * 10**0.5 + 4 + 2) / 4, abs=1e-12)
    assert repr(found) == (
        "<Statistics of 4 rows: mean of norm 1, mean norm 3.081, trace of the covariance 9>"
    )


def test_as_numpy_computes_them(tmp_path: Path) -> None:
    sites = [dense(), dense("z:0", (2, 3), "bfloat16"), dense("norm:0", (), "float16")]
    whole = write_folder(tmp_path / "a", [[40, 3], [20], [1]], sites)
    activations = Activations.open(tmp_path / "a")
    for site in sites:
        rows = whole[site.label].double().reshape(64, -1).numpy()
        found = activations.statistics(site.label)
        assert found.mean.shape == site.shape and found.mean.dtype == torch.float64
        np.testing.assert_allclose(found.mean.flatten(), rows.mean(0), atol=1e-12)
        np.testing.assert_allclose(found.mean_norm, np.linalg.norm(rows, axis=1).mean(), rtol=1e-12)
        trace = np.cov(rows.T, bias=True).reshape(rows.shape[1], -1).trace()
        np.testing.assert_allclose(found.covariance_trace, trace, rtol=1e-10)


def test_rows_that_are_alike_do_not_vary(tmp_path: Path) -> None:
    rows = torch.full((50, 4), 0.1)
    write_folder(tmp_path / "a", [[30], [20]], values={LABEL: rows})
    found = Activations.open(tmp_path / "a").statistics(LABEL)
    assert 0 <= found.covariance_trace < 1e-12


def test_of_features_there_are_none(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", [[30]], [sparse("sae:1", 3, 20)])
    with pytest.raises(OptionError, match="keeps the largest features"):
        Activations.open(tmp_path / "a").statistics("sae:1")
