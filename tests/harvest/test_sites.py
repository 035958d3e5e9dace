"""How sites are written, and what is refused."""

from pathlib import Path

import pytest
import torch

from insitu import LanguageModel
from insitu.graph.errors import InsituError, OptionError
from insitu.harvest import SaeSite, harvest, plan
from insitu.harvest.running.sites import sites_of, split_sites
from insitu.methods.sae import SparseAutoencoder
from tests.conftest import tiny_gpt2
from tests.fidelity.architectures import tiny_bert, tiny_t5
from tests.harvest.folders import each_sequence, whole
from tests.thinning import sampled

DATA = [[5, 6, 7, 8, 9], [1, 2], [3, 4, 5]]


def autoencoder(width: int = 16, features: int = 40) -> SparseAutoencoder:
    torch.manual_seed(3)
    weights = {
        "W_enc": torch.randn(width, features), "W_dec": torch.randn(features, width),
        "b_enc": torch.randn(features), "b_dec": torch.randn(width),
    }  # fmt: skip
    return SparseAutoencoder("standard", weights, "blocks.1.hook", True, "none", 0, False, {})


def labels(*given: object) -> list[str]:
    return [site.label for site in sites_of(LanguageModel(tiny_gpt2()), given)]


def test_layers_of_a_name() -> None:
    assert labels("residual_out:1-3") == ["residual_out:1", "residual_out:2", "residual_out:3"]
    assert labels("residual_out:*") == [f"residual_out:{layer}" for layer in range(4)]
    assert labels("z:0,2", "attention.q:-1") == ["z:0", "z:2", "q:3"]
    assert labels("mlp.post:1", "grad.mlp_out:0") == ["post:1", "grad.mlp_out:0"]
    path = "transformer.h.1.mlp.output"
    assert labels(path, "transformer.h.1.output", "lm_head.input")[0] == path


def test_a_list_with_commas() -> None:
    assert split_sites("residual_out:4,6,mlp.post:1-2, 3") == ["residual_out:4,6", "mlp.post:1-2,3"]
    assert split_sites("sae(/a,b):3@z:1,grad.z:0") == ["sae(/a,b):3@z:1", "grad.z:0"]


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ("residual_uot:1", "nearest: 'residual_out'"),
        ("residual_out:9", "9"),
        ("residual_out", "is no site"),
        ("residual_out:3-1", "names no layers"),
        ("pattern:1", "no rows of one shape"),
        ("transformer.h.1.mpl.output", "mpl"),
        ("transformer.h.1.attn.output", "name one, 'transformer.h.1.attn.output.0'"),
        ("transformer.wpe.output", "does not begin with these"),
        ("sae(/nowhere):3@residual_out:1", "/nowhere"),
        (5, "A site is a text"),
        ((), "at least one site"),
        (("residual_out:1", "residual_out:0-2"), "is there twice"),
        (SaeSite("residual_out:1", autoencoder(), 41), "has 40"),
        (SaeSite("residual_out:1", autoencoder(8)), "takes vectors of 8"),
        (SaeSite("grad.residual_out:1", autoencoder()), "takes values such as"),
    ],
)
def test_sites_that_are_refused(site: object, said: str, tmp_path: Path) -> None:
    given = site if isinstance(site, tuple) else (site,)
    with pytest.raises(InsituError, match=said):
        harvest(LanguageModel(tiny_gpt2()), DATA, given, to=tmp_path)  # pyright: ignore


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context": 0}, "`context` is a number of at least 1"),
        ({"context": 41}, "more than the 40 positions"),
        ({"tokens": 2.5}, "`tokens` is a number"),
        ({"dtype": "float23"}, "There is no dtype 'float23'"),
        ({"reduce": "first"}, "`reduce` is"),
        ({"metric": "loss"}, "go together"),
        ({"bos": True, "context": 1}, "no place for another"),
        ({"separator": 3}, "`pack=True`"),
        ({"pack": True, "separator": 100}, "is no token"),
        ({"split": "train"}, "means nothing"),
        ({"max_skipped": 2}, "a share from 0 to 1"),
        ({"on": "slurm"}, "`on` is"),
    ],
)
def test_options_that_are_refused(options: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=said):
        harvest(LanguageModel(tiny_gpt2()), DATA, "residual_out:1", to=tmp_path, **options)


def test_metrics_that_are_refused(tmp_path: Path) -> None:
    model, site = LanguageModel(tiny_gpt2()), "grad.residual_out:1"
    with pytest.raises(OptionError, match="go together"):
        harvest(model, DATA, site, to=tmp_path)
    with pytest.raises(OptionError, match="takes a name"):
        harvest(model, DATA, site, to=tmp_path, metric=lambda logits, ids: logits.sum())
    torch.manual_seed(0)
    bert = LanguageModel(tiny_bert().eval())
    with pytest.raises(OptionError, match="looks ahead"):
        harvest(bert, DATA, "grad.block_out:1", to=tmp_path, metric="loss")


def last_logit(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 5].sum()


def test_a_metric_of_ones_own(tmp_path: Path) -> None:
    module = tiny_gpt2()
    harvest(LanguageModel(module), DATA, "grad.residual_out:3", to=tmp_path, metric=last_logit)
    rows = whole(tmp_path, "grad.residual_out:3")
    # Behind the last block only the last position has a say.
    zero = rows["grad.residual_out:3"].abs().sum(1) == 0
    assert zero.tolist() == [True] * 4 + [False, True, False, True, True, False]


def mean_log_prob(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1)[..., 5].mean()


def test_a_mean_in_a_metric_is_over_one_sequence(tmp_path: Path) -> None:
    module, data = tiny_gpt2(), [[5, 6, 7], [1, 2, 3], [4, 4], [8, 9, 8]]
    harvest(LanguageModel(module), data, "grad.lm_head.output", to=tmp_path, metric=mean_log_prob)
    for one, ids in zip(each_sequence(tmp_path, "grad.lm_head.output"), data, strict=True):
        logits = module(torch.tensor([ids])).logits
        logits.retain_grad()
        mean_log_prob(logits, torch.tensor([ids])).backward()
        torch.testing.assert_close(one["grad.lm_head.output"], logits.grad[0])


def test_a_model_in_training_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="training mode"):
        harvest(LanguageModel(tiny_gpt2().train()), DATA, "residual_out:1", to=tmp_path)


def test_a_decoder_that_reads_an_encoder_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(InsituError, match="does not begin with these"):
        harvest(LanguageModel(tiny_t5().eval()), DATA, "residual_out:0", to=tmp_path)


@pytest.mark.parametrize("reduce", sampled([None, "last", "mean"], ["last"]))
def test_the_largest_features(reduce: str | None, tmp_path: Path) -> None:
    model, sae = LanguageModel(tiny_gpt2()), autoencoder()
    sites = ["residual_out:1", SaeSite("residual_out:1", sae, 4, "mine"), "residual_out:2"]
    harvest(model, DATA, sites, to=tmp_path, reduce=reduce)
    label = "sae(mine):4@residual_out:1"
    rows = whole(tmp_path, "residual_out:1", f"{label}/values", f"{label}/indices")
    features = sae.encode(rows["residual_out:1"])
    if reduce == "mean":  # of the features, not the features of the mean
        harvest(model, DATA, "residual_out:1", to=tmp_path / "all")
        every = whole(tmp_path / "all", "residual_out:1")
        whose, encoded = every["sequence"], sae.encode(every["residual_out:1"])
        features = torch.stack([encoded[whose == at].mean(0) for at in range(len(DATA))])
    expected = features.topk(4, dim=-1)
    values, indices = rows[f"{label}/values"], rows[f"{label}/indices"]
    assert indices.dtype == torch.int32 and values.shape == indices.shape == (len(features), 4)
    torch.testing.assert_close(values, expected.values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.gather(-1, indices.long()), values, atol=1e-5, rtol=1e-5)


def test_another_autoencoder_is_another_specification(tmp_path: Path) -> None:
    model, sae = LanguageModel(tiny_gpt2()), autoencoder()
    harvest(model, DATA, SaeSite("residual_out:1", sae, 4), to=tmp_path)
    sae.weights["b_enc"][3] += 1
    with pytest.raises(OptionError, match=r"sae\(sae\):4@residual_out:1.dictionary is"):
        harvest(model, DATA, SaeSite("residual_out:1", sae, 4), to=tmp_path)


@pytest.mark.thorough
def test_a_plan_counts_what_is_then_written(tmp_path: Path) -> None:
    model, options = LanguageModel(tiny_gpt2()), {"context": 4, "batch_tokens": 8}
    found = plan(model, DATA, "residual_out:1", **options)
    harvested = harvest(model, DATA, "residual_out:1", to=tmp_path, **options)
    assert found.exact and (found.tokens, found.rows) == (harvested.tokens, harvested.rows)
    assert found.bytes <= harvested.bytes <= found.bytes + 2000 and found.shards == 1
    assert found.passes == 2 and found.operations > 0 and found.seconds > 0
    assert "on the disk" in str(found)
    many = [[1 + number % 9] * 10 for number in range(100)]
    about = plan(model, many, "residual_out:1", shard_tokens=100)
    assert not about.exact and (about.tokens, about.rows, about.shards) == (1000, 1000, 10)
    assert plan(model, many, "residual_out:1", shard_tokens=100, tokens=300).tokens == 300
    with pytest.raises(OptionError, match="read only once"):
        plan(model, iter(many), "residual_out:1")
