"""What has to hold of a model as a whole: which its blocks are, and what stands around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from insitu.engine.probe import Call
from insitu.graph.node import Place
from insitu.models.configuration import all_said
from insitu.models.proof import identities
from insitu.models.proof.evidence import Evidence, Reasons, noise
from insitu.models.proof.runs import Runs, Tensor
from insitu.models.weights import in_memory
from insitu.tracing.named import Named
from insitu.tracing.vocabulary import Role

_TOKENS = ("input_ids", "decoder_input_ids")
_NO_TEXT = "what passes them does not depend on the text that the model is given."


def stacks_of_model(evidence: Evidence) -> tuple[dict[str, int], Reasons]:
    """Returns which lists of blocks have names, by their numbers, and why others have none.

    `blocks` are those that the text passes: of an encoder and a decoder, the decoder's.

    Args:
        evidence: what was read of the model.
    """
    found: dict[str, int] = {}
    refused: Reasons = {}
    stacks = evidence.body.stacks
    reasons = [_why_not_passed(evidence, stack) for stack in stacks]
    for number, stack in enumerate(stacks):
        why = reasons[number]
        if why is None and not _reads_tokens(evidence, stack[0]):
            why = _NO_TEXT
        if why is None:
            found["blocks"] = number
        else:
            refused["blocks"] = why
    others = [number for number in range(len(stacks)) if number != found.get("blocks")]
    for number in others if "blocks" in found else ():
        why = reasons[number]
        if why is None:
            found.setdefault("encoder_blocks", number)
        else:
            refused.setdefault("encoder_blocks", why)
    return found, {name: why for name, why in refused.items() if name not in found}


def _why_not_passed(evidence: Evidence, paths: Sequence[str]) -> str | None:
    """Why what the model is given does not pass some blocks one by one, None if it does."""
    places = evidence.base.places
    order = [path for path, kind, _ in places if kind == "output" and path in set(paths)]
    if not order:
        return "in a forward of text none of them runs: use the paths of their modules."
    missed = [path for path in paths if path not in order]
    if missed:
        return f"what the model is given does not pass `{missed[0]}`."
    if order != list(paths) or any((path, "output", 1) in places for path in paths):
        return "what the model is given does not pass them once and in their order."
    depths = _depths(evidence.config)
    if depths and len(paths) not in depths:
        return f"they are {len(paths)}, where its config has {' or '.join(map(str, depths))}."
    seen = evidence.runs.run([], {Named(paths[-1], "output", 0, (0,)): lambda x: x + noise(x)})
    if all(map(_equal, seen.results, evidence.base.results)):
        return "what leaves the last of them has no part in what the model returns."
    return None


def _depths(config: Any) -> list[int]:
    """How many blocks a model has by its config; none of one that consists of several."""
    if getattr(config, "is_encoder_decoder", False) or config.get_text_config() is not config:
        return []
    # A block of several attentions may count as several layers beside.
    depths = all_said(config, "num_hidden_layers", "num_layers")
    return sorted({depth for depth in depths if type(depth) is int and depth > 0})


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _reads_tokens(evidence: Evidence, first: str) -> bool:
    """Whether what enters a block depends on the text, if the model takes text."""
    runs = evidence.runs
    tokens = {name: runs.call.kwargs[name] for name in _TOKENS if name in runs.call.kwargs}
    place: Place = (first, "input", 0)
    before = evidence.base.places.get(place)
    for name, ids in tokens.items():
        others = Call((), {**runs.call.kwargs, name: ids.flip(-1)})
        after = Runs(runs.model, others, runs.options).run([place]).places.get(place)
        if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
            return False
        if not _alike(after, before):
            return True
    return not tokens


def reasons_of_ends(evidence: Evidence) -> Reasons:
    """Returns which names before and after the blocks are refused, and why.

    Args:
        evidence: what was read of the model.
    """
    found: Reasons = {}
    entries, places = evidence.entries[""], evidence.base.places
    embedding = entries.get("embedding")
    takes_text = any(name in evidence.runs.call.kwargs for name in _TOKENS)
    if takes_text and isinstance(embedding, Role) and not _looks_up(evidence, embedding.path):
        found["embedding"] = found["W_E"] = "what it gives is not what its weights have for tokens."
    logits = entries.get("logits")
    if isinstance(logits, Named):
        shown, returned = evidence.base.raw(logits), places.get(("", "output", 0))
        made = cast("Any", returned)["logits"] if isinstance(returned, Mapping) else None
        if shown is None or not isinstance(made, torch.Tensor) or not _equal(shown, made):
            found["logits"] = "what stands there is not what the model returns as logits."
    head = entries.get("unembedding")
    if not isinstance(head, Role):
        return found
    given, made = (places.get((head.path, kind, 0)) for kind in ("input", "output"))
    if not isinstance(given, torch.Tensor) or not isinstance(made, torch.Tensor):
        found["unembedding"] = found["W_U"] = "it does not run in a forward."
        return found
    weight = evidence.names.weights.unembedding()
    if isinstance(weight, torch.Tensor):
        rows, results = (
            given.reshape(1, -1, given.shape[-1]),
            made.reshape(1, 1, -1, made.shape[-1]),
        )
        difference = identities.projected(rows, weight[None], results)
        if not difference.is_rounding:
            found["W_U"] = "what the unembedding gives is not made with it."
    norm = entries.get("final_norm")
    if isinstance(norm, Role):
        normed = places.get((norm.path, "output", 0))
        if not isinstance(normed, torch.Tensor) or normed.numel() < given.numel():
            found["final_norm"] = "what it gives is not what is unembedded."
        elif normed.shape == given.shape:
            times = identities.proportion(given, normed)
            if not _alike(given, times * normed):
                found["final_norm"] = "what it gives is not what is unembedded."
    return found


def _looks_up(evidence: Evidence, path: str) -> bool:
    """Whether an embedding gives its weights' rows, scaled perhaps, for the tokens of a prompt."""
    made = evidence.base.places.get((path, "output", 0))
    module = evidence.runs.model.modules[path]
    with in_memory(module):
        weight = getattr(module, "weight", None)
    if not isinstance(made, torch.Tensor) or not isinstance(weight, torch.Tensor):
        return False
    kwargs = evidence.runs.call.kwargs
    for name in _TOKENS:
        ids = kwargs.get(name)
        if not isinstance(ids, torch.Tensor) or made.shape[:2] != ids.shape:
            continue
        rows = weight[ids]
        if rows.shape == made.shape and _alike(made, identities.proportion(made, rows) * rows):
            return True
    return False


def _alike(found: Tensor, expected: Tensor) -> bool:
    size = expected.abs().amax().clamp_min(1e-6)
    return identities.compared(found, expected, size, (found, expected)).is_rounding
