"""What a harvest stores is what plain hooks see of each sequence alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from insitu import LanguageModel
from insitu.graph.errors import ExecutionError, OptionError
from insitu.harvest import SaeSite, harvest
from tests.conftest import tiny_gpt2
from tests.fidelity.architectures import tiny_bert, tiny_mamba, tiny_mixtral, tiny_t5
from tests.harvest.folders import each_sequence, shards, whole
from tests.harvest.test_sites import autoencoder
from tests.thinning import sampled

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def of_config(name: str, **options: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**{**SIZES, **IDS, **options})
        return getattr(transformers, f"{name}ForCausalLM")(config).eval()

    return make


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    return made


GROUPED = {"num_key_value_heads": 2}
KINDS = {
    "gpt2": (tiny_gpt2, "transformer.h.2"),
    "llama": (of_config("Llama", **GROUPED), "model.layers.1"),
    "gemma2": (of_config("Gemma2", head_dim=4, sliding_window=6, **GROUPED), "model.layers.1"),
    "mistral": (of_config("Mistral", sliding_window=6, **GROUPED), "model.layers.2"),
    "qwen2": (of_config("Qwen2", **GROUPED), "model.layers.1"),
    "neox": (of_config("GPTNeoX"), "gpt_neox.layers.1"),
    "mixtral": (seeded(tiny_mixtral), "model.layers.1"),
    "mamba": (seeded(tiny_mamba), "backbone.layers.1"),
    "bert": (seeded(tiny_bert), "bert.encoder.layer.1"),
}


def documents(lengths: list[int], vocabulary: int = 100) -> list[list[int]]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(1, vocabulary, (n,), generator=random).tolist() for n in lengths]


def seen_alone(module: nn.Module, paths: list[str], ids: list[int]) -> list[torch.Tensor]:
    """What hooks see at the outputs of modules, in a forward of one sequence."""
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for path in paths:

        def hook(_: nn.Module, args: object, output: object, path: str = path) -> None:
            value = output[0] if isinstance(output, tuple) else output
            seen[path] = (value[0] if value.ndim == 3 else value).clone()

        handles.append(module.get_submodule(path).register_forward_hook(hook))
    try:
        with torch.no_grad():
            module(torch.tensor([ids]))
    finally:
        for handle in handles:
            handle.remove()
    return [seen[path] for path in paths]


RAGGED = [7, 1, 12, 12, 3, 20, 19, 12, 7, 25]


@pytest.mark.parametrize("kind", sampled(KINDS, ["gpt2", "bert"]))
def test_values_are_those_of_each_sequence_alone(kind: str, tmp_path: Path) -> None:
    make, path = KINDS[kind]
    module = make()
    data = documents(RAGGED)
    harvest(
        LanguageModel(module), data, f"{path}.output", to=tmp_path,
        context=20, batch_tokens=60, shard_tokens=50,
    )  # fmt: skip
    found = [*each_sequence(tmp_path, f"{path}.output")]
    cut = [ids[at : at + 20] for ids in data for at in range(0, len(ids), 20)]
    assert [one["token_ids"].tolist() for one in found] == cut
    assert len(shards(tmp_path)) > 1
    for one, ids in zip(found, cut, strict=True):
        (expected,) = seen_alone(module, [path], ids)
        torch.testing.assert_close(one[f"{path}.output"], expected, atol=1e-5, rtol=1e-5)
        assert one["position"].tolist() == [*range(len(ids))]


class Counting(nn.Module):
    """Counts its calls, as no hook does without changing how Insitu runs a model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += not isinstance(x, FakeTensor)
        return self.inner(x)


@pytest.mark.thorough
@pytest.mark.no_wire  # it counts forwards
def test_several_sites_come_from_one_forward(tmp_path: Path) -> None:
    module = tiny_gpt2()
    first, last = (Counting(module.transformer.h[at].mlp.act) for at in (0, 3))
    module.transformer.h[0].mlp.act, module.transformer.h[3].mlp.act = first, last
    model = LanguageModel(module.eval())
    sites = ["residual_out:0-2", "mlp.post:1", "z:2", "transformer.h.1.mlp.output", "q:0"]
    data = documents([9] * 12 + [5, 6])
    harvest(model, data[:1], sites, to=tmp_path / "before")  # what is tried is tried here
    first.calls = last.calls = 0
    harvest(model, data, sites, to=tmp_path / "a", batch_tokens=36, shard_tokens=1000)
    # The short ones, three batches of four rows of nine; and one trial whether rows keep apart.
    assert (first.calls, last.calls) == (5, 0)
    for one in each_sequence(tmp_path / "a", "z:2", "post:1", "residual_out:1"):
        ids = one["token_ids"].tolist()
        block, z = seen_alone(module, ["transformer.h.1", "transformer.h.1.mlp.act"], ids)
        torch.testing.assert_close(one["residual_out:1"], block, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one["post:1"], z, atol=1e-5, rtol=1e-5)
        assert one["z:2"].shape == (len(ids), 4, 4)
        # The heads, one behind the other, are what the projection is given.
        given = []
        hook = module.transformer.h[2].attn.c_proj.register_forward_pre_hook(
            lambda _, args, given=given: given.append(args[0][0].clone())
        )
        with torch.no_grad():
            module(torch.tensor([ids]))
        hook.remove()
        torch.testing.assert_close(one["z:2"].flatten(1), given[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reduce", sampled(["last", "mean", (-1, -2, 0)], ["mean"]))
def test_what_is_kept_of_a_sequence(reduce: object, tmp_path: Path) -> None:
    module = tiny_gpt2()
    data = documents([5, 1, 8, 8, 3])
    harvest(LanguageModel(module), data, "residual_out:2", to=tmp_path, reduce=reduce)
    rows = whole(tmp_path, "residual_out:2")
    expected, positions, tokens, sequences = [], [], [], []
    for number, ids in enumerate(data):
        (values,) = seen_alone(module, ["transformer.h.2"], ids)
        if reduce == "mean":
            own, taken = values.mean(0, keepdim=True), [-1]
        else:
            taken = [-1] if reduce == "last" else [at for at in reduce if -len(ids) <= at]
            taken = [at % len(ids) for at in taken]
            own = values[taken]
        expected.append(own)
        positions += taken
        tokens += [-1] if reduce == "mean" else [ids[at] for at in taken]
        sequences += [number] * len(taken)
    torch.testing.assert_close(rows["residual_out:2"], torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert rows["position"].tolist() == positions
    assert rows["token_ids"].tolist() == tokens
    assert rows["sequence"].tolist() == rows["document"].tolist() == sequences


class Looked(nn.Module):
    """Shows numbers of a kind, made of what another module is given, and calls that one."""

    def __init__(self, inner: nn.Module, made: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.shown, self.made = inner, nn.Identity(), made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 0 * self.shown(self.made(x)).sum().real


def shows(made: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    module = tiny_gpt2()
    module.transformer.h[1].mlp = Looked(module.transformer.h[1].mlp, made)
    return module.eval()


SHOWN = "transformer.h.1.mlp.shown.output"


def test_a_mean_is_neither_cut_to_integers_nor_rounded_to_float32(tmp_path: Path) -> None:
    for name, module, site in [
        ("integers", shows(lambda x: x.topk(2).indices), SHOWN),
        ("float64", tiny_gpt2().double(), "residual_out:2"),
    ]:
        model, data = LanguageModel(module), documents([6, 7])
        harvest(model, data, site, to=tmp_path / name / "all")
        harvest(model, data, site, to=tmp_path / name / "mean", reduce="mean")
        every, mean = (whole(tmp_path / name / kind, site) for kind in ("all", "mean"))
        for number in range(2):
            expected = every[site][every["sequence"] == number].double().mean(0)
            atol = 1e-14 if name == "float64" else 1e-6
            assert (mean[site][number].double() - expected).abs().max() < atol


@pytest.mark.parametrize("made", [lambda x: x > 0, lambda x: torch.complex(x, x)])
def test_values_that_a_folder_cannot_hold_are_refused(
    made: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="a folder cannot hold"):
        harvest(LanguageModel(shows(made)), documents([5]), SHOWN, to=tmp_path)


def tiny_albert() -> nn.Module:
    """Its blocks are one module, called several times, so it has no list of blocks."""
    config = transformers.AlbertConfig(**{**SIZES, **IDS, "embedding_size": 8})
    return transformers.AlbertForMaskedLM(config)


NO_NAMES = {
    "albert": (tiny_albert, "predictions.dense"),
    "t5": (tiny_t5, "encoder.block.1"),
}


@pytest.mark.parametrize("kind", NO_NAMES)
def test_modules_of_models_without_blocks_or_with_two_lists(kind: str, tmp_path: Path) -> None:
    make, path = NO_NAMES[kind]
    module, data = seeded(make)(), documents([7, 3, 7])
    harvest(LanguageModel(module), data, f"{path}.output", to=tmp_path, bos=False)
    alone = module.get_encoder() if kind == "t5" else module
    own = path.removeprefix("encoder.") if kind == "t5" else path
    for one, ids in zip(each_sequence(tmp_path, f"{path}.output"), data, strict=True):
        (expected,) = seen_alone(alone, [own], ids)
        torch.testing.assert_close(one[f"{path}.output"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("vocabulary", "positions"), [(2, 3), (3, 2), (113, 3)])
def test_a_toy_of_few_tokens_and_positions(vocabulary: int, positions: int, tmp_path: Path) -> None:
    sizes = {"vocab_size": vocabulary, "n_positions": positions, "n_embd": 8, "n_head": 2}
    config = transformers.GPT2Config(**sizes, n_layer=2, **IDS)
    torch.manual_seed(0)
    module = transformers.GPT2LMHeadModel(config).eval()
    data = [[(at * 5) % vocabulary for at in range(size)] for size in (positions, 1, positions)]
    harvest(LanguageModel(module), data, "transformer.h.1.output", to=tmp_path)
    for one, ids in zip(each_sequence(tmp_path, "transformer.h.1.output"), data, strict=True):
        assert one["token_ids"].tolist() == ids
        (expected,) = seen_alone(module, ["transformer.h.1"], ids)
        torch.testing.assert_close(one["transformer.h.1.output"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.thorough
def test_bfloat16_is_the_rounding_of_the_same_run(tmp_path: Path) -> None:
    model, data = LanguageModel(tiny_gpt2()), documents(RAGGED)
    for dtype in ("float32", "bfloat16", "float16"):
        harvest(model, data, "residual_out:2", to=tmp_path / dtype, dtype=dtype)
    exact = whole(tmp_path / "float32", "residual_out:2")["residual_out:2"]
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        rounded = whole(tmp_path / name, "residual_out:2")["residual_out:2"]
        assert rounded.dtype == dtype
        assert torch.equal(rounded, exact.to(dtype))


def places(values: torch.Tensor) -> torch.Tensor:
    """Numbers in 16 bits as integers in the same order, so that neighbours differ by one."""
    bits = values.view(torch.int16).int()
    return torch.where(bits < 0, -32768 - bits, bits)


@pytest.mark.parametrize("kind", sampled(KINDS, ["gpt2"]))
def test_bfloat16_is_within_a_unit_in_the_last_place_of_hooks(kind: str, tmp_path: Path) -> None:
    make, path = KINDS[kind]
    module, data = make(), documents(RAGGED)
    site = f"{path}.output"
    harvest(LanguageModel(module), data, site, to=tmp_path, dtype="bfloat16", batch_tokens=60)
    for one, ids in zip(each_sequence(tmp_path, site), data, strict=True):
        (expected,) = seen_alone(module, [path], ids)
        found = one[site]
        assert found.dtype == torch.bfloat16
        apart = (places(found) - places(expected.bfloat16())).abs()
        assert apart.max() <= 1, f"{apart.max()} units in the last place"


def test_gradients_are_those_of_autograd(tmp_path: Path) -> None:
    module, data = tiny_gpt2(), documents([6, 6, 9, 4, 1])
    sites = ["grad.residual_out:1", "residual_out:1", "grad.z:2"]
    harvest(LanguageModel(module), data, sites, to=tmp_path, metric="loss", batch_tokens=20)
    for one in each_sequence(tmp_path, *sites):
        ids = one["token_ids"].long()[None]
        kept = {}

        def keep(_: nn.Module, args: object, output: object, kept: dict = kept) -> None:
            value = output[0] if isinstance(output, tuple) else output
            value.retain_grad()
            kept["block"] = value

        def keep_input(_: nn.Module, args: tuple, kept: dict = kept) -> None:
            args[0].retain_grad()
            kept["z"] = args[0]

        hooks = [
            module.transformer.h[1].register_forward_hook(keep),
            module.transformer.h[2].attn.c_proj.register_forward_pre_hook(keep_input),
        ]
        logits = module(ids).logits[0]
        loss = -logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
        loss.backward()
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(
            one["grad.residual_out:1"], kept["block"].grad[0], atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            one["grad.z:2"].flatten(1), kept["z"].grad[0], atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            one["residual_out:1"], kept["block"][0].detach(), atol=1e-5, rtol=1e-5
        )


def test_statistics_are_sums_over_rows(tmp_path: Path) -> None:
    model = LanguageModel(tiny_gpt2())
    harvest(model, documents(RAGGED), ["residual_out:2", "z:1"], to=tmp_path, shard_tokens=40)
    for one in shards(tmp_path):
        for label in ("residual_out:2", "z:1"):
            rows = one[label].double()
            flat = rows.flatten(1)
            torch.testing.assert_close(one[f"{label}/sum"], rows.sum(0))
            torch.testing.assert_close(one[f"{label}/norm_sum"], flat.norm(dim=1).sum())
            torch.testing.assert_close(one[f"{label}/square_sum"], flat.square().sum())


def test_values_too_large_for_float16_are_an_error(tmp_path: Path) -> None:
    module = tiny_gpt2()
    with torch.no_grad():
        module.transformer.wte.weight *= 1e9
    with pytest.raises(ExecutionError, match="bfloat16"):
        harvest(
            LanguageModel(module), documents([5]), "residual_out:1", to=tmp_path, dtype="float16"
        )


def test_features_too_large_for_float16_are_an_error(tmp_path: Path) -> None:
    sae = autoencoder()
    sae.weights["W_enc"][:, 3] *= 1e8
    site = SaeSite("residual_out:1", sae, 4)
    with pytest.raises(ExecutionError, match="bfloat16"):
        harvest(LanguageModel(tiny_gpt2()), documents([5]), site, to=tmp_path, dtype="float16")
