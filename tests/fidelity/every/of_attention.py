"""Compares what has a standard name in an attention: heads, patterns and their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.fidelity.every.case import Case
from tests.fidelity.every.of_blocks import check_source, is_given
from tests.fidelity.every.plain import layers_with
from tests.fidelity.every.projections import leads_to_heads, makes
from tests.fidelity.every.verdict import close, demand, same

Tensor = torch.Tensor


def _count(case: Case, block: Any) -> int | None:
    """How many heads the config has for a block, None where it does not say."""
    config = case.module.config
    if case.has(case.model, "encoder_blocks"):
        decoder = block.path not in [b.path for b in case.model.role["encoder_blocks"]]
        side = "decoder" if decoder else "encoder"
        return getattr(config, f"{side}_attention_heads", None)
    if "decoder" in block.path.split(".") and hasattr(config, "decoder_attention_heads"):
        return config.decoder_attention_heads  # a decoder without its encoder
    said = getattr(config.get_text_config(), "num_attention_heads", None)
    return said if isinstance(said, int) else None


def heads(case: Case, block: Any, part: Any, role: str) -> None:
    """`z` is what the layer with `W_O` is given, and its heads are as many as the config has."""
    there = case.there("heads", part, "q", "k", "v", "z", "result")
    count = _count(case, block)
    values = dict(zip(there, case.read(*((part, name) for name in there)), strict=True))
    where = f"{block.path} {role}"
    for name in {"q", "z", "result"} & values.keys():
        demand(values[name].ndim == 4, f"{where} {name} is {tuple(values[name].shape)}")
        found = values[name].shape[1]
        right = count is None or found == count
        demand(right, f"{where} {name} has {found} heads, and the config {count}")
    if "z" in there and case.has(part, "W_O"):
        z, w_o = values["z"], part.role["W_O"].float()
        layers = list(layers_with(case.module, block.path, w_o.flatten(0, 1)))
        layers = [one for one in layers if one.matrix.shape[1] == w_o.shape[2]]
        demand(bool(layers), f"{where} W_O is the matrix of no layer")
        merged = z.transpose(1, 2).flatten(2)
        layer = next((one for one in layers if is_given(case, one, merged)), None)
        demand(layer is not None, f"{where} z is not what the layer with W_O is given")
        made = torch.einsum("bhtd,hdm->bhtm", z, w_o)
        if "result" in there:
            close(values["result"], made, f"{where} result")
        check_source(case, block, f"{role}_out", layer)
    if {"z", "v"} <= values.keys() and not case.has(part, "pattern"):
        _only_own(case, part, "v", "z", values, where)


def _only_own(
    case: Case, part: Any, written: str, read: str, values: Mapping[str, Tensor], where: str
) -> None:
    """A head that is taken out takes out its own part of a value, and no other's."""
    before, heads = values[read], values[read].shape[1]
    own = values[written].shape[1]
    demand(heads % own == 0, f"{where}: {own} heads of {written} and {heads} of {read}")
    with case.opened():
        part.role[written][:, own - 1] = 0
        after = part.role[read].save()
    group = slice(heads - heads // own, None)
    others = slice(0, heads - heads // own)
    kept = same(after.value[:, others].float(), before[:, others])
    demand(kept, f"{where}: a head of {written} changes other heads of {read}")
    changed_own = not same(after.value[:, group].float(), before[:, group])
    demand(changed_own, f"{where}: a head of {written} changes nothing of its {read}")


def pattern(case: Case, block: Any, part: Any, role: str) -> None:
    """Weights sum to 1 or less, weight `v` to `z`, and are what the model itself returns."""
    there = case.there("pattern", part, "scores", "pattern")
    if "pattern" not in there:
        return
    others = [name for name in ("q", "k", "v", "z", "scores") if case.has(part, name)]
    names = ("pattern", *others)
    values = dict(zip(names, case.read(*((part, name) for name in names)), strict=True))
    weights = values["pattern"]
    where, count = f"{block.path} {role}", _count(case, block)
    demand(weights.ndim == 4, f"{where} pattern is {tuple(weights.shape)}")
    found = weights.shape[1]
    right = count is None or found == count
    demand(right, f"{where} pattern has {found} heads, and the config {count}")
    sums = weights.sum(-1)
    demand(bool((weights >= 0).all()), f"{where} pattern has negative weights")
    demand(float(sums.max()) < 1.001, f"{where} pattern: weights of a query are {sums.max()}")
    if "scores" in values and float(sums.min()) > 0.999:
        made = values["scores"].softmax(-1)
        close(made, weights, f"{where} softmax of scores", limit=1e-3)
    if {"v", "z"} <= values.keys():
        repeated = values["v"].repeat_interleave(heads_ratio(weights, values["v"]), 1)
        made = weights @ repeated
        if not leads_to_heads(made, values["z"]):  # then there is a gate between
            _only_own(case, part, "pattern", "z", values, where)
    elif "z" in values:
        _only_own(case, part, "pattern", "z", values, where)
    _products(case, part, values, where)
    others = case.model.role["encoder_blocks"] if case.has(case.model, "encoder_blocks") else ()
    if case.module.config.is_encoder_decoder or block.path not in [one.path for one in others]:
        _as_returned(case, weights, role, where)  # a tower's are not returned with those of text


def _products(case: Case, part: Any, values: Mapping[str, Tensor], where: str) -> None:
    """Of scores, queries make their products with keys, times one number; the rest is bias."""
    if not {"q", "k", "scores"} <= values.keys():
        return
    q, k, scores = values["q"], values["k"], values["scores"]
    with case.opened():
        part.role["q"][:] = 0
        base = part.role["scores"].save()
    products = q @ k.repeat_interleave(heads_ratio(q, k), 1).transpose(-1, -2)
    demand(products.shape == scores.shape, f"{where}: scores are {tuple(scores.shape)}")
    visible = (scores > -1e4) & (base.value.float() > -1e4)
    added = (scores - base.value.float()).masked_fill(~visible, 0)
    products = products.masked_fill(~visible, 0)
    scale = (added * products).sum() / (products * products).sum()
    if same(added, scale * products, 1e-3):
        return
    # A softcap, or the largest of a query taken away: more is more, in each head alone.
    _only_own(case, part, "q", "scores", values, where)


def _as_returned(case: Case, weights: Tensor, role: str, where: str) -> None:
    """The pattern is among the attentions that the model itself returns."""
    theirs = case.attentions
    if role == "cross_attention":
        theirs = [value for name, value in theirs if name.startswith("cross")]
    else:
        theirs = [value for name, value in theirs if not name.startswith("cross")]
    alike = [one for one in theirs if one.ndim == 4 and one.shape[:3] == weights.shape[:3]]
    if not theirs:
        return
    demand(bool(alike), f"{where} pattern: the model returns {tuple(theirs[0].shape)}")
    shown = [one if bool((one >= 0).all()) else one.softmax(-1) for one in alike]  # or its scores
    seen = any(same(one[..., : weights.shape[-1]], weights, 1e-3) for one in shown)
    demand(seen, f"{where} pattern is none of the model's attentions")


def projections(case: Case, part: Any) -> None:
    """Queries at the first position, and values at all, come from what a layer is given."""
    there = case.there("W_Q", part, "W_Q", "W_K", "W_V", "W_O")
    for weight, name in (("W_Q", "q"), ("W_K", "k"), ("W_V", "v")):
        if weight not in there or not case.has(part, name):
            continue
        matrix = part.role[weight].float()
        flat = matrix.transpose(0, 1).flatten(1)
        layers = list(layers_with(case.module, "", flat))
        where = f"{part.path} {weight}"
        demand(bool(layers), f"{where} is the matrix of no layer")
        (value,) = case.read((part, name))
        given = [
            one.given[0]
            for layer in layers
            for one in case.plain.calls.get(layer.path, ())
            if one.given and one.given[0].shape[-1] == matrix.shape[1]
        ]
        made = [
            torch.einsum("btm,hmd->bhtd", one.reshape(len(value), -1, one.shape[-1]), matrix)
            for one in given
            if one.numel() == len(value) * value.shape[2] * matrix.shape[1]
        ]
        demand(bool(made), f"{where}: no layer with it is called")
        for layer in layers:  # with the bias, which a norm behind the layer sees too
            columns = layer.columns(flat)
            for one in case.plain.calls.get(layer.path, ()):
                full = one.returned[0] if one.returned else columns
                if full.shape[-1] != layer.matrix.shape[1] or full.ndim < 2:
                    continue
                heads = full[..., columns].reshape(len(value), -1, *matrix.shape[::2])
                made.append(heads.transpose(1, 2))
        right = any(one.shape == value.shape and makes(one, value, name) for one in made)
        demand(right, f"{where} does not make {name}")


def heads_ratio(many: Tensor, few: Tensor) -> int:
    """How many heads share one."""
    demand(many.shape[1] % few.shape[1] == 0, f"{many.shape[1]} and {few.shape[1]} heads")
    return many.shape[1] // few.shape[1]
