from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from insitu import LanguageModel, OptionError
from insitu.methods import (
    activation_patching,
    attribution_patching,
    causal_tracing,
    distributed_alignment_search,
    probe,
    steering_vector,
)
from insitu.methods.sites import chosen, site_of
from tests.conftest import hooked
from tests.fidelity.zoo import module_of

IDS, OTHER = [3, 1, 4, 1, 5], [3, 1, 40, 1, 5]


def outputs(model: LanguageModel, path: str) -> torch.Tensor:
    """What a hook sees leave a module."""
    out = hooked(model.load(), path, torch.tensor([IDS]))
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("residual_out", {"gpt2": "transformer.h.1", "llama": "model.layers.1"}),
        ("mlp_out", {"gpt2": "transformer.h.1.mlp", "llama": "model.layers.1.mlp"}),
        ("attention_out", {"gpt2": "transformer.h.1.attn", "llama": "model.layers.1.self_attn"}),
    ],
)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_site_reads_what_a_hook_sees(request, kind: str, name: str, paths: dict) -> None:
    model = request.getfixturevalue(kind)
    site = site_of(name)
    with model.trace(IDS):
        found = site.read(model, 1).save()
    assert torch.allclose(found.value, outputs(model, paths[kind]), atol=1e-6)
    assert found.value.ndim == 1 + len(site.axes)


def test_heads_are_the_input_of_the_projection_cut_up(gpt2: LanguageModel) -> None:
    seen: list[torch.Tensor] = []
    module = gpt2.load().get_submodule("transformer.h.2.attn.c_proj")
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        gpt2.load()(torch.tensor([IDS]))
    handle.remove()
    site = site_of("z")
    with gpt2.trace(IDS):
        one = site.read(gpt2, 2)[site.index(head=3, position=-1)].save()
    assert site.axes == ("head", "position", "d_head")
    assert torch.allclose(one.value[0], seen[0][0, -1, 12:16], atol=1e-6)


def test_what_is_written_is_what_the_model_goes_on_with(language_model: LanguageModel) -> None:
    site = site_of("mlp_out")
    with language_model.trace(IDS):
        site.write(language_model, 1, site.read(language_model, 1) * 0)
        before = site_of("residual_mid").read(language_model, 1).save()
        after = site_of("residual_out").read(language_model, 1).save()
    assert torch.allclose(before.value, after.value, atol=1e-6)


def test_names_may_be_written_in_short_or_in_full() -> None:
    assert site_of("z") == site_of("attention.z")
    assert (site_of("pattern").key, site_of("pattern").name) == ("attention.pattern", "pattern")
    assert site_of("pattern").index(query=-1) == (slice(None), slice(None), -1, slice(None))
    with pytest.raises(OptionError, match=r"'residual_ot'.*nearest: 'residual_out'"):
        site_of("residual_ot")
    with pytest.raises(OptionError, match="W_Q"):
        site_of("W_Q")
    with pytest.raises(OptionError) as refused:
        site_of("mlpout")
    assert str(refused.value).count("'mlp_out'") == 1


def test_layers_are_chosen_by_number_from_either_end() -> None:
    assert chosen("layer", None, 3) == [0, 1, 2]
    assert chosen("layer", -1, 3) == [2]
    assert chosen("head", range(2), 3) == [0, 1]
    with pytest.raises(OptionError, match="no layer 3: there are 3"):
        chosen("layer", [0, 3], 3)


@pytest.mark.parametrize(
    "given", [[1, -1], (1, -1), iter([1, -1]), np.array([1, -1]), torch.tensor([1, -1])]
)
def test_numbers_may_come_from_anywhere(given: Any) -> None:
    assert chosen("layer", given, 4) == [1, 3]


def test_a_number_of_another_library_is_a_number() -> None:
    assert chosen("layer", np.int64(2), 4) == chosen("layer", torch.tensor(2), 4) == [2]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "given",
    [
        *("1", 1.0, slice(0, 2), [0, 1.5], [[0, 1]], True),
        # masks, of which 1 and 0 would be made
        *([True, False], np.array([True, False]), torch.tensor([True, False])),
        [torch.tensor(True), torch.tensor(False)],
    ],
)
def test_what_is_no_number_is_refused(given: Any) -> None:
    with pytest.raises(OptionError, match="A layer is given as a number, or several as a list"):
        chosen("layer", given, 4)


def test_none_at_all_is_refused() -> None:
    with pytest.raises(OptionError, match="No head was chosen"):
        chosen("head", [], 4)


OF_POSITIONS: dict[str, Callable[[LanguageModel], object]] = {
    "activation patching": lambda model: activation_patching(model, IDS, OTHER, _first),
    "queries": lambda model: activation_patching(
        model, IDS, OTHER, _first, sites="pattern", by=("layer", "query")
    ),
    "chosen positions": lambda model: activation_patching(
        model, IDS, OTHER, _first, sites="z", by=("layer", "head"), positions=-1
    ),
    "attribution patching": lambda model: attribution_patching(model, IDS, OTHER, _first),
    "causal tracing": lambda model: causal_tracing(model, IDS, 1, 3),
    "alignment": lambda model: distributed_alignment_search(
        model, [IDS] * 4, [OTHER] * 4, [3] * 4, layer=0, position=-1, dimensions=1
    ),
    "a steering vector": lambda model: steering_vector(model, [IDS], [OTHER], position=1),
    "probe": lambda model: probe(model, [IDS, OTHER] * 8, [0, 1] * 8, positions=None),
}


@pytest.mark.parametrize("name", OF_POSITIONS)
def test_positions_of_a_prompt_are_not_those_of_a_decoder(name: str) -> None:
    model = LanguageModel(module_of("t5"))
    with pytest.raises(OptionError, match="positions of the prompt are none of theirs"):
        OF_POSITIONS[name](model)


def test_heads_of_a_decoder_are_patched_as_hooks_do() -> None:
    module = module_of("t5")
    given: dict[str, Any] = {"sites": "z", "by": ("layer", "head"), "normalised": False}
    found = activation_patching(LanguageModel(module), IDS, OTHER, _first, **given)
    assert found.sizes == {"layer": 2, "head": 4}
    run = partial(module, decoder_input_ids=torch.tensor([[module.config.decoder_start_token_id]]))
    owner = module.decoder.block[1].layer[0].SelfAttention.o
    with torch.no_grad():
        seen: list[torch.Tensor] = []
        handle = owner.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        run(input_ids=torch.tensor([IDS]))
        handle.remove()

        def put(_: object, args: Any) -> Any:
            value = args[0].clone()
            width = value.shape[-1] // 4
            value[..., 2 * width : 3 * width] = seen[0][..., 2 * width : 3 * width]
            return (value,)

        handle = owner.register_forward_pre_hook(put)
        logits = run(input_ids=torch.tensor([OTHER])).logits[0]
        handle.remove()
    assert found.values[1, 2].item() == pytest.approx(_first(logits).item(), rel=1e-4)


def _first(logits: Any) -> Any:
    return logits[-1, 3]


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("resid_pre", "residual_in"),
        ("hook_z", "z"),
        ("hook_v", "v"),
        ("blocks.3.hook_resid_mid", "residual_mid"),
        ("attn_weights", "pattern"),
    ],
)
def test_a_word_of_another_library_names_the_site_to_write(word: str, name: str) -> None:
    with pytest.raises(OptionError, match=f": write '{name}'"):
        site_of(word)
    assert site_of(name).name == name
