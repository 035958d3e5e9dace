"""What has to hold of a block's residual stream, and of the values added to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from insitu.graph.node import Place
from insitu.models.proof import identities
from insitu.models.proof.evidence import Evidence, Reasons, sizes
from insitu.models.proof.runs import Tensor

STREAM = ("residual_in", "residual_mid", "residual_out")
ADDED = ("attention_out", "cross_attention_out", "mixer_out", "mlp_out", "extra_out")


def reasons_of_stream(evidence: Evidence, path: str) -> Reasons:
    """Returns which names of a block's residual stream are refused, and why.

    Args:
        evidence: what was read of the model.
        path: the block's path.
    """
    names = [name for name in (*STREAM, *ADDED) if evidence.named(path, name) is not None]
    values = {name: evidence.value(path, name) for name in names}
    expected = (evidence.rows, evidence.positions(path) or 0, evidence.block(path).width)
    for name, value in values.items():
        if value is None:
            return dict.fromkeys(names, f"its `{name}` does not come to pass.")
        if tuple(value.shape) != expected:
            why = f"its `{name}` is {sizes(value)}, and not (batch, position, d_model)."
            return dict.fromkeys(names, why)
    there = {name: value for name, value in values.items() if value is not None}
    if evidence.block(path).summed and there:
        return _reasons_of_normalised(evidence, path, there, expected)
    if not {"residual_in", "residual_out"} <= there.keys():
        return {}
    if not any(name in there for name in ADDED):
        return {}  # what is added has no names, and a block's ends are what hooks see of it
    added = [name for name in ADDED if name in there]
    parts, scaled = [there[name] for name in added], evidence.block(path).scaled
    if not _adds_up(there["residual_in"], parts, there["residual_out"], scaled):
        with_factors = ", with factors or none" if scaled else ""
        why = f"residual_in + {' + '.join(added)} is not residual_out in it{with_factors}."
        return dict.fromkeys(names, why)
    found: Reasons = {}
    middle = there.get("residual_mid")
    if middle is not None and "mlp_out" in there:
        later = added.index("mlp_out")
        first = _adds_up(there["residual_in"], parts[:later], middle, scaled)
        if not (first and _adds_up(middle, parts[later:], there["residual_out"], scaled)):
            found["residual_mid"] = "it does not stand between what its two parts add."
    returned = _first(evidence, (path, "output", 0))
    if returned is None or not torch.equal(returned, there["residual_out"]):
        found["residual_out"] = "it is not what the block returns."
    return found


def _adds_up(stream: Tensor, added: Sequence[Tensor], total: Tensor, scaled: bool) -> bool:
    """Whether a value is the stream with the values added to it.

    Where there are factors, either the stream has one before something is added, or the sum has
    one. Of several that are added one after the other, each may have its own.
    """
    if identities.summed([stream, *added], total).is_rounding:
        return True
    if not scaled or not added:
        return scaled and identities.combined([stream], total).is_rounding
    whole = torch.stack([one.double() for one in added]).sum(0)
    if identities.combined([stream], total, beside=whole).is_rounding:
        return True
    if identities.combined([stream.double() + whole], total).is_rounding:
        return True
    return len(added) > 1 and identities.combined([stream, *added], total).is_rounding


def _reasons_of_normalised(
    evidence: Evidence, path: str, there: Mapping[str, Tensor], shape: tuple[int, ...]
) -> Reasons:
    """What a block adds, where norms stand between its sums: each goes into its norm."""
    whole = _first(evidence, (path, "input", 0), shape)
    named: set[str] = set()
    for summed in evidence.block(path).summed:
        where: Place = (summed.norm or path, "input" if summed.norm else "output", summed.call)
        total = _first(evidence, where, shape)
        terms = [there[name] for name in summed.added if name in there]
        named.update(summed.added)
        into = f"`{summed.norm.removeprefix(f'{path}.')}`" if summed.norm else "what it returns"
        if whole is None or total is None or not _adds_up(whole, terms, total, True):
            said = " + ".join(("what is given", *summed.added))
            return dict.fromkeys(there, f"{said} is not what goes into {into} in it.")
        whole = total
        if summed.norm is not None:
            whole = _first(evidence, (summed.norm, "output", summed.call), shape)
    returned = _first(evidence, (path, "output", 0), shape)
    if whole is None or returned is None or not torch.equal(whole, returned):
        return dict.fromkeys(there, "what its last norm returns is not what the block does.")
    why = "it is added to nothing that is normalised."
    return {name: why for name in there if name not in named}


def _first(evidence: Evidence, place: Place, shape: tuple[int, ...] | None = None) -> Tensor | None:
    """What passed a place, of a tuple the first, in a shape; None if that is no such tensor."""
    value = evidence.base.places.get(place)
    value = value[0] if isinstance(value, tuple) and value else value
    if not isinstance(value, torch.Tensor):
        return None
    if shape is None:
        return value
    return value.reshape(shape) if value.numel() == math.prod(shape) else None


def reasons_of_returned(evidence: Evidence, path: str) -> Reasons:
    """Returns why `block_out` of a block is refused, if it is.

    Args:
        evidence: what was read of the model.
        path: the block's path.
    """
    value = evidence.value(path, "block_out", evidence.plain)
    hooked = evidence.plain.returned.get(path)
    if value is None or hooked is None or not torch.equal(value, hooked):
        return {"block_out": "it is not what the block returns first."}
    if value.shape[-1] != evidence.block(path).width:
        return {"block_out": f"it is {sizes(value)}, and not (batch, position, d_model)."}
    return {}
