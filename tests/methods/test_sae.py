"""Sparse autoencoders, against encoders and decoders written out here, and forward hooks."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from insitu import (
    BlockError,
    LanguageModel,
    LoadError,
    OperationError,
    OptionError,
    PathError,
    ShapeError,
)
from insitu.methods import SparseAutoencoder, sae_features, use_sae
from tests.conftest import hooked_hidden
from tests.thinning import sampled

FEATURES = 40
IDS = [5, 6, 7, 8, 9]
KINDS = ["standard", "jumprelu", "topk", "gated"]


def written(folder: Path, kind: str, width: int = 16, **config: Any) -> Path:
    """A folder as SAELens leaves it, with random weights."""
    draw = torch.Generator().manual_seed(KINDS.index(kind))

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw) * 0.4

    weights = {"W_enc": some(width, FEATURES), "W_dec": some(FEATURES, width), "b_dec": some(width)}
    names = {"gated": ["b_gate", "b_mag", "r_mag"]}.get(kind, ["b_enc"])
    weights |= {name: some(FEATURES) for name in names}
    if kind == "jumprelu":
        weights["threshold"] = some(FEATURES).abs()
    told = {
        "architecture": kind,
        "d_in": width,
        "d_sae": FEATURES,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.0.0", "hook_name": "blocks.1.hook_resid_post"},
    }
    if kind == "topk":
        told |= {"k": 5, "rescale_acts_by_decoder_norm": False}
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(told | config))
    return folder


def plain(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
    """The oracle: features by the papers' definitions, one vector at a time, and the decoder."""
    w, told = (
        load_file(folder / "sae_weights.safetensors"),
        json.loads((folder / "cfg.json").read_text()),
    )
    size, mean = torch.ones(*x.shape[:-1], 1), torch.zeros(*x.shape[:-1], 1)
    if told["normalize_activations"] == "constant_norm_rescale":
        size = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        x = x / size
    if told["normalize_activations"] == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        size = ((x - mean) ** 2).sum(-1, keepdim=True).div(x.shape[-1] - 1).sqrt()
        x = (x - mean) / (size + 1e-5)
    inputs = x - w["b_dec"] if told["apply_b_dec_to_input"] else x
    by_norm = told.get("rescale_acts_by_decoder_norm", False)
    norms = w["W_dec"].norm(dim=1) if by_norm else torch.ones(FEATURES)
    rows = []
    for row in inputs.reshape(-1, x.shape[-1]):
        found = torch.zeros(FEATURES)
        gates = torch.stack([row @ w["W_enc"][:, n] for n in range(FEATURES)])
        if told["architecture"] == "gated":
            sizes = F.relu(gates * w["r_mag"].exp() + w["b_mag"])
            found = torch.where(gates + w["b_gate"] > 0, sizes, 0.0)
        elif told["architecture"] == "topk":
            pre = (gates + w["b_enc"]) * norms
            for n in sorted(range(FEATURES), key=lambda n: -pre[n])[: told["k"]]:
                found[n] = max(pre[n], torch.tensor(0.0))
        else:
            pre = gates + w["b_enc"]
            least = w.get("threshold", torch.zeros(FEATURES))
            found = torch.where(pre > torch.maximum(least, torch.tensor(0.0)), pre, 0.0)
        rows.append(found)
    features = torch.stack(rows).reshape(*x.shape[:-1], FEATURES)

    def decode(features: torch.Tensor) -> torch.Tensor:
        made = sum((features[..., n, None] / norms[n]) * w["W_dec"][n] for n in range(FEATURES))
        return (made + w["b_dec"]) * size + mean

    return features, decode


OPTIONS: list[dict[str, Any]] = [
    {},
    {"apply_b_dec_to_input": False},
    {"normalize_activations": "layer_norm"},
    {"normalize_activations": "constant_norm_rescale"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_encode_and_decode(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder = written(tmp_path / kind, kind, **options)
    sae = SparseAutoencoder.load(folder)
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(9)) * 2 + 0.5
    features, decode = plain(folder, x)
    assert 0 < (features > 0).float().mean() < 0.9
    torch.testing.assert_close(sae.encode(x), features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(x), x), decode(features), atol=1e-5, rtol=1e-5)
    assert (sae.width, sae.n_features) == (16, FEATURES)


def test_older_and_other_ways_to_write_it_down(tmp_path: Path) -> None:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    folder = written(tmp_path / "topk", "topk", rescale_acts_by_decoder_norm=True)
    features, decode = plain(folder, x)
    sae = SparseAutoencoder.load(folder)
    torch.testing.assert_close(sae.encode(x), features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(features, x), decode(features), atol=1e-5, rtol=1e-5)

    old = {"hook_point": "blocks.0.hook_mlp_out", "activation_fn_str": "topk"}
    told = {**old, "activation_fn_kwargs": {"k": 5}, "normalize_activations": None}
    (folder / "cfg.json").write_text(json.dumps(told))
    older = SparseAutoencoder.load(folder)
    assert (older.architecture, older.k) == ("topk", 5) and older.hook_name == old["hook_point"]

    folder = written(
        tmp_path / "scaled", "standard", normalize_activations="expected_average_only_in"
    )
    with pytest.raises(LoadError, match="scale="):
        SparseAutoencoder.load(folder)
    scaled, one = (SparseAutoencoder.load(folder, scale=s) for s in (3.0, 1.0))
    w = one.weights
    expected = F.relu((3 * x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    shifted = F.relu((x - w["b_dec"] / 3) @ (3 * w["W_enc"]) + w["b_enc"])
    torch.testing.assert_close(scaled.encode(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(expected, shifted, atol=1e-5, rtol=1e-5)
    made = (expected @ w["W_dec"] + w["b_dec"]) / 3
    torch.testing.assert_close(scaled.decode(expected, x), made, atol=1e-5, rtol=1e-5)


def test_notes_in_the_metadata_change_nothing(tmp_path: Path) -> None:
    """SAELens takes where it belongs from there, and nothing that is computed."""
    folder = written(tmp_path / "sae", "standard")
    told = {"hook_name": "blocks.0.hook_mlp_out", "sae_lens_version": "6.0.0"}
    notes = {"apply_b_dec_to_input": False, "normalize_activations": "layer_norm", "k": 3}
    sae = SparseAutoencoder.load(written(folder, "standard", metadata={**told, **notes}))
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    assert sae.hook_name == "blocks.0.hook_mlp_out"
    torch.testing.assert_close(sae.encode(x), plain(folder, x)[0], atol=1e-5, rtol=1e-5)


def test_tensors_are_those_that_sae_lens_takes(tmp_path: Path) -> None:
    """SAELens refuses all others, casts them to the config's dtype, and leaves out scales of 1."""
    folder = written(tmp_path / "sae", "standard", finetuning_scaling_factor=True)
    file = folder / "sae_weights.safetensors"
    weights = load_file(file)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))

    def loaded(**others: torch.Tensor) -> SparseAutoencoder:
        save_file(weights | others, file)
        return SparseAutoencoder.load(folder)

    for name in ("threshold", "W_skip", "b_dec_out"):  # as of other architectures
        with pytest.raises(LoadError, match=f"'standard' one has no tensor '{name}'"):
            loaded(**{name: torch.ones(FEATURES)})
    with pytest.raises(LoadError, match="scales of their own"):
        loaded(scaling_factor=torch.full((FEATURES,), 2.0))
    expected = plain(folder, x)[0]
    sae = loaded(scaling_factor=torch.ones(FEATURES))
    torch.testing.assert_close(sae.encode(x), expected, atol=1e-5, rtol=1e-5)
    half = loaded(W_enc=weights["W_enc"].bfloat16())
    features, encoder = half.encode(x), weights["W_enc"].bfloat16().float()
    assert features.dtype == torch.float32
    expected = F.relu((x - weights["b_dec"]) @ encoder + weights["b_enc"])
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


def test_a_model_that_was_processed_is_told(tmp_path: Path) -> None:
    """Centred weights write centred activations, which a model of Hugging Face does not have."""
    told = {"hook_name": "blocks.0.hook_resid_pre"}
    for kwargs, processed in (
        ({"center_writing_weights": True, "fold_ln": False}, True),
        ({"center_writing_weights": False, "dtype": "float16"}, False),
    ):
        metadata = told | {"model_from_pretrained_kwargs": kwargs}
        folder = written(tmp_path / "sae", "standard", metadata=metadata)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            SparseAutoencoder.load(folder)
        assert ["center_writing_weights" in str(one.message) for one in said] == [True] * processed
        assert all(one.filename == __file__ for one in said)


@pytest.mark.parametrize("scale", [0, 0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_is_above_0(scale: float, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="scale"):
        SparseAutoencoder.load(written(tmp_path / "sae", "standard"), scale=scale)


def logits_with(model: LanguageModel, change: Callable[[torch.Tensor], torch.Tensor]):
    def hook(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = model.module.get_submodule(model.blocks[1].path).register_forward_hook(hook)
    with torch.no_grad():
        logits = model.module(torch.tensor([IDS]), use_cache=False).logits
    handle.remove()
    return logits


@pytest.mark.parametrize("language_model", sampled(["gpt2", "llama"], ["gpt2"]), indirect=True)
@pytest.mark.parametrize("kind", sampled(KINDS, ["standard", "topk"]))
def test_spliced_in(language_model: LanguageModel, kind: str, tmp_path: Path) -> None:
    folder = written(tmp_path / kind, kind)
    sae, model = SparseAutoencoder.load(folder), language_model

    with model.trace() as tracer:
        with tracer.invoke(IDS):
            untouched = use_sae(model, sae)
            features, same = untouched.features.save(), model.logits.save()
        with tracer.invoke(IDS):
            use_sae(model, sae, error_term=False)
            rebuilt = model.logits.save()
        with tracer.invoke(IDS):
            spliced = use_sae(model, sae)
            spliced.features[..., 3] = 0
            spliced.features[:, -1, 7] += 4
            spliced.features *= 2
            changed, seen = model.logits.save(), spliced.features.save()
        with tracer.invoke(IDS):
            whole = use_sae(model, sae, error_term=False)
            whole.features = torch.ones(1, 5, FEATURES)
            ones = model.logits.save()

    x = hooked_hidden(model.module, model.blocks[1].path, torch.tensor([IDS]))
    found, decode = plain(folder, x)
    error = x - decode(found)
    torch.testing.assert_close(features.value, found, atol=1e-5, rtol=1e-5)
    plain_logits = logits_with(model, lambda value: value)
    torch.testing.assert_close(same.value, plain_logits, atol=1e-5, rtol=1e-5)
    expected = logits_with(model, lambda value: decode(found))
    torch.testing.assert_close(rebuilt.value, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(rebuilt.value, plain_logits, atol=1e-3)
    other = found.clone()
    other[..., 3] = 0
    other[:, -1, 7] += 4
    other *= 2
    torch.testing.assert_close(seen.value, other, atol=1e-5, rtol=1e-5)
    expected = logits_with(model, lambda value: decode(other) + error)
    torch.testing.assert_close(changed.value, expected, atol=1e-4, rtol=1e-4)
    expected = logits_with(model, lambda value: decode(torch.ones(1, 5, FEATURES)))
    torch.testing.assert_close(ones.value, expected, atol=1e-4, rtol=1e-4)


def test_gradients_of_features(gpt2: LanguageModel, tmp_path: Path) -> None:
    folder = written(tmp_path / "sae", "standard")
    sae = SparseAutoencoder.load(folder)
    with gpt2.trace(IDS):
        spliced = use_sae(gpt2, sae)
        grad = spliced.features.grad.save()
        gpt2.logits[0, -1, 3].backward()
    x = hooked_hidden(gpt2.module, gpt2.blocks[1].path, torch.tensor([IDS]))
    found, decode = plain(folder, x)
    found.requires_grad_(True)
    error = (x - decode(found)).detach()

    def hook(module: Any, args: Any, output: Any) -> Any:
        made = decode(found) + error
        return (made, *output[1:]) if isinstance(output, tuple) else made

    handle = gpt2.module.transformer.h[1].register_forward_hook(hook)
    loss = gpt2.module(torch.tensor([IDS]), use_cache=False).logits[0, -1, 3]
    handle.remove()
    (expected,) = torch.autograd.grad(loss, found)
    torch.testing.assert_close(grad.value, expected, atol=1e-5, rtol=1e-4)


def test_features_of_heads_and_in_every_step(gpt2: LanguageModel, tmp_path: Path) -> None:
    told = {"hook_name": "blocks.2.attn.hook_z"}
    folder = written(tmp_path / "z", "standard", metadata=told, reshape_activations="hook_z")
    sae = SparseAutoencoder.load(folder)
    with gpt2.trace(IDS):
        z = gpt2.blocks[2].attention.z.save()
        features = use_sae(gpt2, sae).features.save()
        logits = gpt2.logits.save()
    flat = z.value.transpose(1, 2).flatten(2)
    torch.testing.assert_close(features.value, plain(folder, flat)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        logits.value, logits_with(gpt2, lambda value: value), atol=1e-5, rtol=1e-5
    )
    with gpt2.generate(IDS, max_new_tokens=3) as generator:
        with generator.every_step():
            spliced = use_sae(gpt2, sae)
            spliced.features[..., 1] = 2.0
            kept = spliced.features.save()
    assert [tuple(one.shape) for one in kept.value] == [(1, 5, 40), (1, 1, 40), (1, 1, 40)]
    assert all(bool((one[..., 1] == 2).all()) for one in kept.value)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_features_are_of_all_heads_together(name: str, gpt2: LanguageModel, tmp_path: Path) -> None:
    """Never of each head by itself, which one of a single head would fit."""
    told = {"hook_name": f"blocks.2.attn.hook_{name}"}
    sae = SparseAutoencoder.load(written(tmp_path / "all", "standard", metadata=told))
    seen: list[torch.Tensor] = []
    module: Any = gpt2.module
    hook = module.transformer.h[2].attn.c_attn.register_forward_hook(
        lambda module, args, output: seen.append(output.chunk(3, -1)["qkv".index(name)])
    )
    with gpt2.trace(IDS):
        features = use_sae(gpt2, sae).features.save()
        logits = gpt2.logits.save()
    hook.remove()
    expected = plain(tmp_path / "all", seen[-1])[0]
    torch.testing.assert_close(features.value, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        logits.value, logits_with(gpt2, lambda value: value), atol=1e-5, rtol=1e-5
    )
    found = sae_features(gpt2, IDS, sae, top=3).values
    torch.testing.assert_close(found, expected[0].topk(3).values, atol=1e-5, rtol=1e-5)
    one = SparseAutoencoder.load(written(tmp_path / "one", "standard", 4, metadata=told))
    with pytest.raises(ShapeError), gpt2.trace(IDS):
        use_sae(gpt2, one)


def test_in_an_edit_of_a_model_that_is_not_loaded_yet(tmp_path: Path) -> None:
    eiffel = LanguageModel("insitu/eiffel", device_map="cpu")
    sae = SparseAutoencoder.load(written(tmp_path / "sae", "jumprelu", 128))
    assert not eiffel.loaded
    with eiffel.edit() as edited:
        use_sae(edited, sae, error_term=False)
    with edited.trace(IDS):
        after = edited.blocks[1].residual_out.save()
    x = hooked_hidden(eiffel.module, eiffel.blocks[1].path, torch.tensor([IDS]))
    features, decode = plain(tmp_path / "sae", x)
    torch.testing.assert_close(after.value, decode(features), atol=1e-4, rtol=1e-4)


def test_the_largest_features(language_model: LanguageModel, tmp_path: Path) -> None:
    folder = written(tmp_path / "sae", "topk")
    sae = SparseAutoencoder.load(folder)
    result = sae_features(language_model, [IDS, [1, 2, 3]], sae, top=3)
    assert result.sizes == {"prompt": 2, "position": 5, "rank": 3}
    for number, ids in enumerate([IDS, [1, 2, 3]]):
        path = language_model.blocks[1].path
        x = hooked_hidden(language_model.module, path, torch.tensor([ids]))[0]
        values, features = plain(folder, x)[0].topk(3)
        torch.testing.assert_close(result.values[number, : len(ids)], values, atol=1e-5, rtol=1e-5)
        assert torch.equal(result.details["feature"][number, : len(ids)].long(), features)
        one = result.select(prompt=number)
        assert one.texts == tuple(map(str, features.flatten().tolist()))
    assert bool(result.values[1, 3:].isnan().all())
    assert sae_features(language_model, IDS, sae).sizes == {"position": 5, "rank": 10}


def test_mistakes(gpt2: LanguageModel, tmp_path: Path) -> None:
    folder = written(tmp_path / "sae", "standard")
    sae = SparseAutoencoder.load(folder)
    with pytest.raises(BlockError) as caught:
        use_sae(gpt2, sae)
    assert "test_sae.py" in str(caught.value)
    with pytest.raises(PathError, match="hook_nothing"), gpt2.trace(IDS):
        use_sae(gpt2, sae, site="blocks.1.hook_nothing")
    with pytest.raises(OperationError, match="assign to `features`"), gpt2.trace(IDS):
        use_sae(gpt2, sae).features[..., 3].mul_(2)
    with pytest.raises(OptionError, match="1 to 40 features, not 41"):
        sae_features(gpt2, IDS, sae, top=41)
    with pytest.raises(LoadError, match="no sparse autoencoder"):
        SparseAutoencoder.load(tmp_path / "nothing")
    for change, message in (
        ({"architecture": "temporal"}, "'temporal' is not known"),
        ({"normalize_activations": "covariance_whitening"}, "'covariance_whitening'"),
        ({"architecture": "gated"}, "no tensor 'b_gate'"),
        ({"metadata": {}}, "no `hook_name`"),
        ({"architecture": "topk"}, "how many features"),
        ({"dtype": "int8"}, "'int8' of weights"),
        ({"activation_fn_str": "tanh-relu"}, "'tanh-relu' is not known"),
    ):
        with pytest.raises(LoadError, match=message):
            SparseAutoencoder.load(written(tmp_path / "sae", "standard", **change))
