"""What is written is what is read: `harvest`, `Activations` and `live` on the same data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from insitu import LanguageModel, NotCachedError, OptionError
from insitu.harvest import Activations, SaeSite, harvest, live
from insitu.methods import SparseAutoencoder, feature_examples
from tests.conftest import hooked_hidden, tiny_gpt2
from tests.methods.test_sae import written

pytestmark = pytest.mark.no_wire

IDS = [torch.randint(0, 100, (n,)).tolist() for n in (9, 3, 20, 14, 1, 9, 9, 30)]


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(tiny_gpt2())


def test_rows_are_those_of_plain_hooks(model: LanguageModel, tmp_path: Path) -> None:
    sites = ["residual_out:1", "z:0"]
    harvest(model, IDS, sites, to=tmp_path / "a", shard_tokens=32, context=16)
    activations = Activations.open(tmp_path / "a")
    assert activations.complete and activations.check() == [] and len(activations) == 95
    assert activations.shape("z:0") == (4, 4)
    rows = activations["residual_out:1"][:]
    for sequence in range(activations.sequences):
        own = activations.sequence[:] == sequence
        ids = activations.token_ids[own].long()
        expected = hooked_hidden(model.module, "transformer.h.1", ids[None])[0]
        torch.testing.assert_close(rows[own], expected, atol=1e-5, rtol=1e-5)
    statistics = activations.statistics("residual_out:1")
    torch.testing.assert_close(statistics.mean, rows.double().mean(0))
    trace = float(rows.double().T.cov(correction=0).trace())
    assert abs(statistics.covariance_trace / trace - 1) < 1e-9


def test_a_live_model_gives_the_rows_of_its_folder(model: LanguageModel, tmp_path: Path) -> None:
    harvest(model, IDS, "residual_out:1", to=tmp_path / "a", context=16)
    activations = Activations.open(tmp_path / "a")
    at = {
        (int(s), int(p)): row
        for row, (s, p) in enumerate(
            zip(activations.sequence[:], activations.position[:], strict=True)
        )
    }
    with live(model, IDS, "residual_out:1", 8, buffer=40, context=16) as batches:
        for _ in range(2):
            seen = []
            for batch in batches:
                for row, place in enumerate(
                    zip(batch["sequence"].tolist(), batch["position"].tolist(), strict=True)
                ):
                    seen.append(at[place])
                    stored = activations["residual_out:1"][at[place]]
                    found = batch["residual_out:1"][row]
                    torch.testing.assert_close(found, stored, atol=1e-5, rtol=1e-5)
            assert sorted(seen) == list(range(95))


def test_a_live_model_ends_at_some_tokens(model: LanguageModel) -> None:
    with live(model, IDS, "residual_out:1", 8, tokens=40, context=16) as batches:
        assert sum(len(batch["position"]) for batch in batches) == 40
    with pytest.raises(OptionError, match="no option 'contxt'.*'context'"):
        live(model, IDS, "residual_out:1", 8, contxt=16)


def test_sequences_without_the_positions_that_are_kept_have_no_rows(
    model: LanguageModel, tmp_path: Path
) -> None:
    harvest(model, IDS, "residual_out:1", to=tmp_path / "a", shard_tokens=10, reduce=14)
    activations = Activations.open(tmp_path / "a")
    assert activations.sequence[:].tolist() == [2, 7] and activations.check() == []
    assert activations.token_ids[:].tolist() == [IDS[2][14], IDS[7][14]]
    harvest(model, IDS, "residual_out:1", to=tmp_path / "b", reduce=(35,))
    empty = Activations.open(tmp_path / "b")
    assert len(empty) == 0 and empty.check() == [] and [*empty.batches(3)] == []


def test_data_that_is_used_up_is_told_of_in_the_next_epoch(model: LanguageModel) -> None:
    batches = live(model, iter(IDS), "residual_out:1", 8)
    assert sum(len(batch["position"]) for batch in batches) == sum(map(len, IDS))
    with pytest.raises(OptionError, match="read only once, and it was"):
        next(iter(batches))


def test_features_on_the_fly_are_those_that_were_stored(
    model: LanguageModel, tmp_path: Path
) -> None:
    sae = SparseAutoencoder.load(written(tmp_path / "sae", "standard", width=16))
    stored = SaeSite("residual_out:1", sae, 8)
    harvest(model, IDS, ["residual_out:1", stored], to=tmp_path / "a", context=16)
    activations = Activations.open(tmp_path / "a")
    label = next(site for site in activations.sites if site != "residual_out:1")
    largest = activations[label][:]
    features = sae.encode(activations["residual_out:1"][:])
    torch.testing.assert_close(largest.values, features.topk(8).values, atol=1e-4, rtol=1e-4)
    chosen = largest.indices[:, 0].unique().tolist()[:4]
    found = feature_examples(activations, None, chosen, site=label, top=3)
    expected = feature_examples(activations, sae, chosen, site="residual_out:1", top=3)
    for feature in chosen:
        assert found[feature]
        assert [o.row for o in found[feature][:1]] == [o.row for o in expected[feature][:1]]


@pytest.mark.thorough
def test_a_site_is_found_as_it_was_asked_for(eiffel: LanguageModel, tmp_path: Path) -> None:
    harvest(
        eiffel,
        ["The Louvre is in"],
        ["mlp.post:4", "grad.residual_out:3"],
        to=tmp_path,
        metric="loss",
    )
    activations = Activations.open(tmp_path)
    for asked, label in (("mlp.post:4", "post:4"), ("grad.residual_out:3",) * 2):
        assert asked in activations and label in activations
        assert torch.equal(activations[asked][:], activations[label][:])
        mean = activations[label][:].double().mean(0)
        torch.testing.assert_close(activations.statistics(asked).mean.double(), mean)
    for wrong in ("mlp.post:3", "residual_out:3", "post", 4):
        assert wrong not in activations
        with pytest.raises(NotCachedError, match="post:4"):
            activations[wrong]
