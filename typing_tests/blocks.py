"""Blocks of a model by their standard names: reading, writing, slips."""

from typing import assert_type

import torch

from insitu import LanguageModel, Proxy
from insitu.graph.saved import SavedTensor
from insitu.tracing.block_types import MLP, Attention, TransformerBlock
from insitu.tracing.handle import Submodule
from insitu.tracing.handles import Handles

model = LanguageModel("insitu/eiffel")

assert_type(model.blocks, Handles[TransformerBlock])
assert_type(model.blocks[1:], Handles[TransformerBlock])
assert_type(model.blocks[3], TransformerBlock)
assert_type(model.blocks[3].attention, Attention)
assert_type(model.blocks[3].mlp, MLP)
assert_type(model.blocks[3].attention.W_Q, torch.Tensor)
assert_type(model.blocks[3].path, str)
assert_type(model.blocks[3].module, torch.nn.Module)
assert_type(model.final_norm, Submodule)
assert_type(model.n_layers, int)
assert_type(model.W_U, torch.Tensor)

with model.trace("The Louvre is in"):
    pattern = model.blocks[3].attention.pattern
    last: Proxy = pattern[0, :, -1]
    assert_type(pattern.save(), SavedTensor)
    assert_type(pattern.mean(-1).save(), SavedTensor)
    assert_type((2 * pattern - 1).max().save(), SavedTensor)
    assert_type([block.residual_out.save() for block in model.blocks], list[SavedTensor])
    best, places = model.logits[0, -1].topk(3)
    middle = torch.relu(model.blocks[2].residual_mid)  # a proxy goes where a tensor goes

    model.blocks[1].attention.z[:, 2] = 0
    model.blocks[2].mlp.post[..., 7] *= 2
    model.blocks[2].residual_mid = middle
    model.blocks[4].attention_out = torch.zeros(1, 4, 128)
    model.blocks[5].skip(model.blocks[5].input)
    model.logits *= 2

    saved = model.blocks[3].residual_out.save(to="cpu")

# After the run it is a tensor.
assert_type(saved.value, torch.Tensor)
assert_type(saved.shape, torch.Size)
assert_type(saved[0] @ model.W_U, torch.Tensor)
torch.stack([saved, saved])


def heads(block: TransformerBlock) -> Proxy:
    """Takes a block by its standard name, and by its path."""
    return block.attention.z


heads(model.blocks[0])
heads(model.transformer.h[0])

# Slips are errors.
model.blocks[3].attention.patern  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue]
model.blocks[3].residual_ot = 0  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue]
model.blocks.attention  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue]
model.blocks["3"]  # type: ignore[call-overload] # pyright: ignore[reportArgumentType, reportCallIssue]
model.blocks[3].attention.pattern.save("name", when="now")  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
