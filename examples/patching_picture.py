"""Draws the picture of the README, `docs/patching.svg`: takes `insitu[plot]` and Chromium."""

from pathlib import Path

from insitu import LanguageModel
from insitu.methods import activation_patching, logit_difference

model = LanguageModel("insitu/eiffel", device_map="cpu")
result = activation_patching(
    model,
    "The Louvre is in the city of",
    "The Kremlin is in the city of",
    logit_difference(" Paris", " Moscow"),
    sites="residual_in",
)
result.to_picture(Path(__file__).parents[1] / "docs" / "patching.svg")
