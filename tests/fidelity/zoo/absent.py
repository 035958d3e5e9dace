"""What architectures of the zoo do not have, and why.

This is written down from what they are made of, and not found out: tests of a capability are for
all others, and a test shows of these that what is not there is said not to be there.
"""

from __future__ import annotations

from tests.fidelity.zoo import EVERY, ZOO

# They have a state in the place of attention, in all blocks.
NO_ATTENTION = dict.fromkeys(("mamba", "mamba2", "rwkv"), "it has no attention")
# Blocks of these normalise the sum of the stream and what is added to it.
POST_NORM = ("bert", "roberta", "distilbert", "bart")
WITH_EXPERTS = {
    *("mixtral", "qwen3-moe", "deepseek-v3", "gpt-oss", "llama4", "jamba", "qwen3-next"),
}
# What attention is given is wider than the residual stream, or goes through a bottleneck.
NO_MATRIX = ("deepseek-v3", "zamba2")
NO_MLP = "it has no MLP but experts, or none at all"

ABSENT: dict[str, dict[str, str]] = {
    "cache": {
        one.name: "it has a state in the place of keys and values"
        for one in EVERY
        if one.generates and not one.cached
    },
    "residual": dict.fromkeys(
        POST_NORM, "its blocks normalise the sum of the residual stream and each addition to it"
    ),
    "heads": NO_ATTENTION,
    "W_Q": {
        **NO_ATTENTION,
        **dict.fromkeys(NO_MATRIX, "no single matrix makes its queries, keys and values"),
    },
    "patterns": NO_ATTENTION,
    "MLP": {
        **dict.fromkeys(("mixtral", "gpt-oss", "qwen3-next", "mamba", "mamba2"), NO_MLP),
        "zamba2": "its MLP stands in what blocks share, and has no name",
    },
    "experts": {one.name: "it has no experts" for one in EVERY if one.name not in WITH_EXPERTS},
    "logits": {"clip": "it gives no logits"},
    "W_E": dict.fromkeys(("vit", "clip"), "its ends are no tokens"),
}
"""Reasons, by the title of the capability and the name of the architecture."""

# Stacks whose blocks have no standard names: what a model makes of images before it has text.
UNNAMED = {"llava": ("vision_tower",)}


def having(title: str) -> list[str]:
    """The names of those architectures of the zoo that have something."""
    return [name for name in ZOO if name not in ABSENT[title]]


def lacking(title: str) -> list[str]:
    """The names of those that have not."""
    return [name for name in ZOO if name in ABSENT[title]]
