"""What has to hold of a block's residual stream, and of what is added to it."""

from __future__ import annotations

import torch

from insitu.models.proof import identities
from insitu.models.proof.evidence import Evidence, Reasons, sizes

STREAM = ("residual_in", "residual_mid", "residual_out")
ADDED = ("attention_out", "cross_attention_out", "mixer_out", "mlp_out")


def reasons_of_stream(evidence: Evidence, path: str) -> Reasons:
    """Returns which names of a block's residual stream are refused, and why.

    Args:
        evidence: what was read of the model.
        path: the block's path.
    """
    names = [name for name in (*STREAM, *ADDED) if evidence.named(path, name) is not None]
    values = {name: evidence.value(path, name) for name in names}
    expected = (evidence.rows, evidence.positions(path), evidence.block(path).width)
    for name, value in values.items():
        if value is None:
            return dict.fromkeys(names, f"its `{name}` does not come to pass.")
        if tuple(value.shape) != expected:
            why = f"its `{name}` is {sizes(value)}, and not (batch, position, d_model)."
            return dict.fromkeys(names, why)
    there = {name: value for name, value in values.items() if value is not None}
    if not {"residual_in", "residual_out"} <= there.keys():
        return {}
    if not any(name in there for name in ADDED):
        return {}  # what is added has no names, and a block's ends are what hooks see of it
    terms = [there[name] for name in ("residual_in", *ADDED) if name in there]
    if not identities.summed(terms, there["residual_out"]).is_rounding:
        added = " + ".join(name for name in ADDED if name in there)
        return dict.fromkeys(names, f"residual_in + {added} is not residual_out in it.")
    found: Reasons = {}
    middle = there.get("residual_mid")
    if middle is not None and "mlp_out" in there:
        before = [there[name] for name in ("residual_in", *ADDED[:-1]) if name in there]
        first = identities.summed(before, middle)
        second = identities.summed([middle, there["mlp_out"]], there["residual_out"])
        if not (first.is_rounding and second.is_rounding):
            found["residual_mid"] = "it does not stand between what its two parts add."
    returned = evidence.base.places.get((path, "output", 0))
    returned = returned[0] if isinstance(returned, tuple) else returned
    if not isinstance(returned, torch.Tensor) or not torch.equal(returned, there["residual_out"]):
        found["residual_out"] = "it is not what the block returns."
    return found


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
