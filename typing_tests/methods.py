"""The cache, methods and harvests."""

from typing import assert_type

import torch

import insitu
from insitu import ActivationCache, LanguageModel, Result
from insitu.harvest import Activations, Harvested, harvest
from insitu.methods import (
    Metric,
    Steered,
    activation_patching,
    logit_difference,
    logit_lens,
    steer,
    steering_vector,
)

model = LanguageModel("insitu/eiffel")

cache = model.run_with_cache("The Louvre is in", ["blocks.*.attention.z", "residual_out"])
assert_type(cache, ActivationCache)
assert_type(cache["blocks.3.attention.z"], torch.Tensor)
assert_type(cache["z", -1], torch.Tensor)
assert_type(cache.stack("residual_out"), torch.Tensor)
assert_type(cache.logits, torch.Tensor)

metric = logit_difference(" Paris", " Moscow")
assert_type(metric, Metric)
result = activation_patching(
    model, "The Louvre is in", "The Kremlin is in", metric, sites="residual_in"
)
assert_type(result, Result)
assert_type(result.select(position=" Louvre").values, torch.Tensor)
assert_type(logit_lens(model, "The Louvre is in"), Result)
assert_type(insitu.methods.logit_lens(model, "The Louvre is in"), Result)

vector = steering_vector(model, ["good"], ["bad"])
assert_type(vector[2], torch.Tensor)
assert_type(steer(model, "The Louvre", vector, strengths=[1.0, 2.0]), Steered)

assert_type(harvest(model, ["a text"], "residual_out:6", to="folder"), Harvested)
activations = Activations.open("folder")
for batch in activations.batches(8):
    print(batch)

# Slips are errors.
cache.stak("residual_out")  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue]
result.vales  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue]
activation_patching(model, "a", "b", metric, direction="noise")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
insitu.methods.logit_lense  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue]
insitu.LanguageModle  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue]
