"""Steps of a generation, gradients and functions."""

from typing import assert_type

import torch

import insitu
from insitu import LanguageModel
from insitu.graph.proxy import Proxy
from insitu.graph.saved import SavedTensor

model = LanguageModel("insitu/eiffel")

with model.generate("The Louvre is in", max_new_tokens=3) as generator:
    with generator.step(1):
        second = model.blocks[0].residual_out.save()
    with generator.step[2]:
        third = model.logits.save(optional=True)
    for step in generator.steps:
        assert_type(step, int)
        model.blocks[0].mlp_out[:] = 0
    assert_type(generator.tokens[1], Proxy)
    generator.tokens[1] = generator.tokens(0)
    generator.logits[2] = generator.logits(2) * 2
    with generator.every_step():
        each = model.blocks[4].residual_out[0, -1].save()

assert_type(second, SavedTensor)
norms = [value.norm() for value in each]

vector = torch.zeros(128, requires_grad=True)
with model.trace("The Louvre is in"):
    model.blocks[2].residual_out = model.blocks[2].residual_out + vector
    saliency = model.transformer.wte.output.grad.norm(dim=-1).save()
    loss = -model.logits[0, -1].log_softmax(-1).max()
    with loss.backward(create_graph=True):
        slope = model.blocks[1].residual_out.grad.save()
    kept = loss.save(keep_graph=True)

assert_type(kept, SavedTensor)
kept.backward()
optimiser = torch.optim.SGD([vector], lr=0.1)

# To checkers a function of torch gives a tensor, which has no `save`: `apply` gives any value.
with model.trace("The Louvre is in"):
    one, other = model.blocks[0].residual_out[0, -1], model.blocks[1].residual_out[0, -1]
    similarity = insitu.apply(torch.cosine_similarity, one, other, dim=0).save()
    picked = insitu.cond(one.mean() > 0, lambda: one, lambda: other).save()

# Slips are errors.
generator.step("last")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
generator.tokns(1)  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue]
model.generate("The Louvre", on_token=3)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
