"""Proofs that are kept: on disk, and in the package."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from insitu import LanguageModel, Model
from insitu.graph.errors import UnknownShapeError
from insitu.models import body
from insitu.models.proof import given
from insitu.models.proof.remembered import as_data, from_data, key_of, recall
from tests.conftest import tiny_gpt2, tiny_llama
from tests.fidelity.proofs import PUBLISHED, body_of, large, proof_of
from tests.fidelity.zoo import ZOO, module_of
from tests.thinning import sampled

pytestmark = pytest.mark.no_wire  # what is sent does not depend on it


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INSITU_PROOFS", str(tmp_path / "proofs"))
    monkeypatch.setattr("insitu.models.proof.remembered._shipped", lambda version: {})
    return tmp_path / "proofs"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that proofs were made on."""
    found: list[Any] = []
    prove = given.prove

    def noted(model: Any, description: Any) -> Any:
        found.append(model)
        return prove(model, description)

    monkeypatch.setattr(given, "prove", noted)
    return found


@pytest.mark.thorough
def test_a_proof_is_made_once_for_all_sizes(folder: Path, made: list[Any]) -> None:
    assert len(LanguageModel(tiny_gpt2()).blocks) == 4
    assert len(made) == 1 and len(list(folder.iterdir())) == 1
    model = LanguageModel(tiny_gpt2())
    assert model.n_heads == 4 and "pattern" in list(model.blocks[3].attention.role)
    assert len(made) == 1
    assert LanguageModel(tiny_llama()).n_heads == 4
    assert len(made) == 2


def test_models_that_use_no_names_prove_nothing(folder: Path, made: list[Any]) -> None:
    model = LanguageModel(tiny_gpt2())
    with model.trace([5, 6, 7]):
        model.transformer.h[1].output[0].save()
    assert not made and not folder.exists()


@pytest.mark.parametrize(
    "content",
    sampled([
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"code": 1}',
        b'{"blocks": {"x": {"z": 1}}, "whole": {}, "stacks": {}, "showing": {}}',
    ], [b"{", b'{"code": 1}']),
)  # fmt: skip
def test_files_that_are_no_proofs_are_as_if_they_were_not_there(
    content: bytes, folder: Path, made: list[Any]
) -> None:
    assert LanguageModel(tiny_gpt2()).n_heads == 4
    (file,) = folder.iterdir()
    file.write_bytes(content)
    assert LanguageModel(tiny_gpt2()).n_heads == 4
    assert len(made) == 2 and json.loads(file.read_bytes())["blocks"]


def test_what_a_file_may_say_is_checked() -> None:
    good: dict[str, Any] = {"blocks": {}, "whole": {}, "stacks": {}, "showing": {}}
    assert from_data(good) is not None
    bad = [
        {**good, "showing": {"labels": True}}, {**good, "showing": {"attn_implementation": "x"}},
        {**good, "stacks": {"blocks": -1}}, {**good, "stacks": {"blocks": True}},
        {**good, "whole": {"blocks": 1}}, {**good, "blocks": []},
    ]  # fmt: skip
    assert [from_data(one) for one in bad] == [None] * len(bad)


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INSITU_PROOFS", str(tmp_path / "file" / "proofs"))
    assert LanguageModel(tiny_gpt2()).n_heads == 4


def test_no_other_user_can_write_what_is_kept(folder: Path) -> None:
    assert LanguageModel(tiny_gpt2()).n_heads == 4
    (file,) = folder.iterdir()
    if os.name == "posix":
        assert not stat.S_IMODE(file.stat().st_mode) & 0o022


def test_proofs_of_another_code_do_not_count(folder: Path, made: list[Any]) -> None:
    assert LanguageModel(tiny_gpt2()).n_heads == 4
    (file,) = folder.iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "code": "older"}))
    assert LanguageModel(tiny_gpt2()).n_heads == 4
    assert len(made) == 2


@pytest.mark.parametrize("name", ["mixtral", pytest.param("jamba", marks=pytest.mark.thorough)])
def test_without_weights_experts_and_grouped_heads_have_their_names(
    name: str, folder: Path, tmp_path: Path
) -> None:
    module = module_of(name)
    module.save_pretrained(tmp_path / "model")
    layers = [n for n, layer in enumerate(module.model.layers) if hasattr(layer, "self_attn")]
    model = LanguageModel(str(tmp_path / "model"))
    if transformers.__version__.startswith("4."):  # what it does depends on which experts are used
        with model.scan([5, 6, 7]), pytest.raises(UnknownShapeError, match="load it first"):
            _ = model.blocks[layers[0]].attention_out
        return
    with model.scan([5, 6, 7]):
        found = [(model.blocks[n].attention.z, model.blocks[n].attention_out) for n in layers]
        shapes = {(tuple(z.shape), tuple(out.shape)) for z, out in found}
    heads, width = module.config.num_attention_heads, module.config.hidden_size
    assert layers and not model.loaded
    assert shapes == {((1, heads, 3, width // heads), (1, 3, width))}


@pytest.mark.parametrize("loaded", [False, True])
def test_a_model_that_asks_what_tokens_say_is_watched_without_data(
    loaded: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On data some models compute otherwise, and would be of another kind than without weights."""
    module = tiny_llama()
    module.save_pretrained(tmp_path / "model")
    forward, watch = type(module).forward, body.watch
    made: list[bool] = []

    def asking(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        assert int(input_ids.amin()) >= 0  # fails on tensors without data or content
        return forward(self, input_ids, **kwargs)

    def watched(*args: Any, **kwargs: Any) -> Any:
        flow = watch(*args, **kwargs)
        made.append(args[3])
        return flow

    monkeypatch.setattr(type(module), "forward", asking)
    monkeypatch.setattr(body, "watch", watched)
    model = LanguageModel(module if loaded else str(tmp_path / "model"))
    assert len(body_of(model).kinds({})) == 3 and model.loaded is loaded
    assert made == [True]


@pytest.mark.thorough
def test_a_module_that_was_changed_is_proven_by_itself(folder: Path, made: list[Any]) -> None:
    """Another MLP is none that the config speaks of."""

    class Doubled(type(tiny_gpt2().transformer.h[0].mlp)):  # type: ignore[misc]
        def forward(self, hidden_states: Any) -> Any:
            return 2 * super().forward(hidden_states)

    module = tiny_gpt2()
    module.transformer.h[1].mlp.__class__ = Doubled
    model = LanguageModel(module)
    block = model.blocks[1]
    with model.trace([5, 6, 7]):
        total = (block.residual_in + block.attention_out + block.mlp_out).save()
        leaving = block.residual_out.save()
    assert float((total.value - leaving.value).abs().max()) < 1e-5
    # On a copy with random weights: those that are there may be nothing.
    proven = made[-1].module
    assert type(proven.transformer.h[1].mlp) is Doubled and proven is not module


@pytest.mark.thorough
def test_weights_that_are_nothing_hide_no_name(folder: Path) -> None:
    """Of a model of somebody's own making, whose queries are 0, as much has a name."""
    module = tiny_gpt2()
    for block in module.transformer.h:
        block.ln_1 = torch.nn.Identity()
        with torch.no_grad():
            block.attn.c_attn.weight[:, :16] = 0
            block.attn.c_attn.bias[:16] = 0
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    model = LanguageModel(module)
    with model.trace([5, 6, 7]):
        q = model.blocks[0].attention.q.save()
    assert q.value.shape == (1, 4, 3, 4) and not q.value.any()
    assert all(torch.equal(before[name], weight) for name, weight in module.state_dict().items())


# Of each kind of architecture one: all of them take a minute.
@pytest.mark.parametrize(
    "name",
    sampled(["gpt2", "llama", "mixtral", "mamba", "bert", "t5", "gemma2"], ["gpt2", "bert"]),
)
def test_what_the_package_ships_is_what_is_proven_today(name: str) -> None:
    key, data = proof_of(Model(module_of(name)))
    shipped = recall(key)
    assert shipped is not None, "run `make proofs`"
    assert {**as_data(shipped)["blocks"], **data["blocks"]} == as_data(shipped)["blocks"]
    assert (shipped.whole, dict(shipped.stacks)) == (data["whole"], data["stacks"])


PUBLISHED_ONES = [(name, {**one}) for name, every in PUBLISHED.items() for one in every]


@pytest.mark.parametrize(("name", "settings"), PUBLISHED_ONES, ids=str)
def test_names_of_well_known_models_are_proven_beforehand(
    name: str, settings: dict[str, Any]
) -> None:
    module = large(ZOO[name].model, settings)
    model = Model(module)
    key = key_of(module, model.modules, body_of(model).description)
    assert key is not None and recall(key) is not None, "run `make proofs`"


def test_keys_know_classes_and_configs_and_no_sizes() -> None:
    def key(module: Any) -> str | None:
        model = LanguageModel(module)
        return key_of(module, model.modules, model.vocabulary.body.description)  # type: ignore

    wide = tiny_llama()
    wide.config.hidden_size = 999
    other = tiny_llama()
    other.config.attention_bias = True
    assert key(tiny_llama()) == key(wide) != key(other)
    assert key(tiny_gpt2()) != key(tiny_llama())
