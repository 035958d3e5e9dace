"""What is said of an architecture where the dataflow of its forward does not tell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import insitu
from insitu import LanguageModel, Model, OptionError, PathError
from insitu.models.architectures import Description
from insitu.models.checking import check
from tests.conftest import tiny_llama
from tests.fidelity.zoo import ZOO


class Halfway(nn.Module):
    """A block whose sums are written in a way that nobody would guess."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm, self.attn = block.input_layernorm, block.self_attn
        self.norm_b, self.mlp = block.post_attention_layernorm, block.mlp

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        added = self.attn(self.norm(hidden_states), *args, **kwargs)[0]
        middle = torch.lerp(hidden_states, hidden_states + 2 * added, 0.5)
        return torch.lerp(middle, middle + 2 * self.mlp(self.norm_b(middle)), 0.5)


DESCRIPTION = Description(
    names={
        "residual_in": "input",
        "residual_mid": "ops.lerp[0].output",
        "residual_out": "output[0]",
        "attention_out": "attn.output[0]",
        "mlp_out": "mlp.output",
    }
)


def odd() -> LlamaForCausalLM:
    module = tiny_llama()
    blocks = module.model.layers
    for layer, block in enumerate(blocks):
        blocks[layer] = Halfway(block)
    return module.eval()


@pytest.mark.thorough
def test_what_the_dataflow_does_not_tell_is_missing_until_it_is_said() -> None:
    model = LanguageModel(odd())
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(PathError, match="residual_mid"):
        with model.trace(ids):
            model.blocks[1].residual_mid  # noqa: B018
    model.describe_blocks(DESCRIPTION)
    seen: list[torch.Tensor] = []
    handles = [
        model.module.model.layers[1].norm_b.register_forward_pre_hook(
            lambda module, args: seen.append(args[0])
        ),
        model.module.model.layers[1].attn.register_forward_hook(
            lambda module, args, output: seen.append(output[0])
        ),
    ]
    with torch.no_grad():
        model.module(ids)
    for handle in handles:
        handle.remove()
    added, middle = seen
    block = model.blocks[1]
    with model.trace(ids):
        found = block.residual_mid.save()
        total = (block.residual_in + block.attention_out + block.mlp_out).save()
        leaving, own = block.residual_out.save(), block.attention_out.save()
    assert torch.equal(found.value, middle)
    assert torch.equal(own.value, added)
    torch.testing.assert_close(total.value, leaving.value)
    assert check(model).ok


@pytest.mark.thorough
def test_what_a_wrong_description_says_is_refused() -> None:
    model = LanguageModel(odd())
    names = {**DESCRIPTION.names, "mlp_out": "norm_b.output"}
    model.describe_blocks(Description(names=names))
    refused = [one for one in check(model).checks if one.outcome == "refused"]
    assert refused and all("`mlp_out`" in one.note for one in refused)
    with pytest.raises(PathError, match=r"no `mlp_out`: .* is not residual_out"):
        with model.trace(torch.tensor([[5, 6, 7]])):
            model.blocks[1].mlp_out  # noqa: B018


def test_descriptions_say_what_is_wrong_with_them() -> None:
    with pytest.raises(ValueError, match="residual_middle"):
        Description(names={"residual_middle": "input"})
    with pytest.raises(ValueError, match="no place in a block"):
        Description(names={"residual_mid": "lerp"})
    with pytest.raises(OptionError, match="Transformers"):
        Model(nn.Linear(2, 2)).describe_blocks(Description())


class Normed(nn.Module):
    """A block that norms what it is given before the residual stream begins."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.before, self.block = nn.LayerNorm(16), block

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
        return self.block(self.before(hidden_states), *args, **kwargs)


@pytest.mark.thorough
def test_the_stream_may_begin_behind_a_module_that_only_some_blocks_have() -> None:
    module = tiny_llama()
    module.model.layers[0] = Normed(module.model.layers[0]).eval()
    model = LanguageModel(module)
    model.describe_blocks(Description(begins="before"))
    seen: list[torch.Tensor] = []
    handles = [
        module.model.layers[0].before.register_forward_hook(
            lambda module, args, output: seen.append(output)
        ),
        module.model.layers[1].register_forward_pre_hook(
            lambda module, args: seen.append(args[0]),
        ),
    ]
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        module(ids)
    for handle in handles:
        handle.remove()
    with model.trace(ids):
        found = [model.blocks[layer].residual_in.save() for layer in (0, 1)]
        first = model.blocks[0]
        total = (first.residual_in + first.attention_out + first.mlp_out).save()
    for one, expected in zip(found, seen, strict=True):
        assert torch.equal(one.value, expected)
    torch.testing.assert_close(total.value, seen[1])


def test_no_architecture_is_named_outside_of_descriptions() -> None:
    package = Path(insitu.__file__).parent
    names = {name.partition("-moe")[0].replace("-", "[-_ ]?") for name in ZOO}
    words = {"bart", "clip", "mpt", "opt", "phi", "t5", "vit"}  # mean other things in small letters
    plain = re.compile(rf"(?<![a-z])({'|'.join(names - words)})", re.I)
    capital = re.compile(rf"\b({'|'.join(name.upper() for name in words)}|ViT|Phi)\b")
    naming = [
        path.relative_to(package).parts
        for path in package.rglob("*.py")
        if plain.search(path.read_text()) or capital.search(path.read_text())
    ]
    assert naming and all("architectures" in parts or parts[0] == "zoo" for parts in naming), naming
