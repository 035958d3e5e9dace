"""Where forwards may begin at a block: found out by running the model, which is left as it was."""

import pytest
import torch
from torch import nn

from insitu import LanguageModel
from insitu.batching.proposed_layouts import SIZES, find_layouts
from insitu.batching.shared_blocks import Chain
from insitu.engine.fallback import Fallback
from insitu.engine.probe import Call
from insitu.models.resume_trial import ResumeTrial
from tests.fidelity.architectures import MAKERS, spread_out


def chain_of(module: nn.Module) -> Chain | Fallback:
    model = LanguageModel(module)
    views, options = model.traits.block_views[False], {"use_cache": False}
    calls = [Call((), {"input_ids": torch.zeros(*size).long(), **options}) for size in SIZES]
    layouts = find_layouts([model.probe(call, views).seen for call in calls])
    with model.exclusive:
        given = (module, model.snapshot, views, layouts, options, 100, model.device)
        return ResumeTrial(*given).chain()


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    module = MAKERS[name]().eval()
    spread_out(module)
    return module


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_forwards_begin_at_blocks_where_each_row_is_as_it_is_alone(name: str) -> None:
    module = made(name)
    chain = chain_of(module)
    assert isinstance(chain, Chain)
    assert list(chain.paths) == list(LanguageModel(module).traits.block_views[False])
    for path in chain.paths:
        assert (path, "output", 0) in chain.whole & chain.tails
    for path, _ in module.named_modules():
        if path.endswith(("attn", "mlp")) and path.startswith(tuple(chain.paths[1:])):
            assert (path, "output", 0) in chain.whole, path


@pytest.mark.parametrize("layers", [1, 2])
def test_they_do_not_where_a_mask_is_made_for_each_row_of_the_ids(layers: int) -> None:
    """BLOOM's position biases have as many rows as there are prompts."""
    module = made("bloom")
    module.transformer.h = module.transformer.h[:layers]
    module.config.n_layer = layers
    assert isinstance(chain_of(module), Chain) == (layers == 1)  # there is no later block then


class LooksAhead(nn.Module):
    """Adds to each position what is at the last."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: torch.Tensor, *args: object, **kwargs: object) -> object:
        return self.block(hidden + hidden[:, -1:], *args, **kwargs)


class CountsPositions(LooksAhead):
    """Adds to each position what depends on its place among those that there are."""

    def forward(self, hidden: torch.Tensor, *args: object, **kwargs: object) -> object:
        places = torch.arange(hidden.shape[1])[:, None] * torch.arange(16)
        return self.block(hidden + places, *args, **kwargs)


@pytest.mark.parametrize("kind", [LooksAhead, CountsPositions])
def test_positions_are_not_left_out_where_the_others_would_be_other_ones(
    kind: type[LooksAhead],
) -> None:
    module = made("gpt2")
    module.transformer.h = nn.ModuleList([kind(block) for block in module.transformer.h])
    chain = chain_of(module)
    assert isinstance(chain, Chain)
    assert chain.whole
    assert not chain.tails


def test_trying_leaves_nothing_behind() -> None:
    module = made("llama")
    before = {path: dict(vars(part)) for path, part in module.named_modules()}
    tables = {
        (path, name): dict(value)
        for path, attributes in before.items()
        for name, value in attributes.items()
        if isinstance(value, dict)
    }
    state = torch.get_rng_state()
    assert isinstance(chain_of(module), Chain)
    assert torch.equal(torch.get_rng_state(), state)
    for path, part in module.named_modules():
        assert vars(part).keys() == before[path].keys()
        for name, value in vars(part).items():
            if isinstance(value, dict):
                assert dict(value) == tables[path, name]
