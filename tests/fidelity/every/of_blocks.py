"""Compares what has a standard name in a block: residual stream, MLP and experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.fidelity.every.case import Case
from tests.fidelity.every.plain import Layer, changed, layers_with
from tests.fidelity.every.verdict import close, constant, demand, same

_STREAM = ("residual_in", "residual_mid", "residual_out")
_ADDED = ("attention_out", "cross_attention_out", "mixer_out", "mlp_out", "extra_out")


def residual(case: Case, block: Any) -> None:
    """What is added to what the block is given makes what it returns."""
    there = case.there("residual", block, *_STREAM, "mlp_out")
    there += [one for one in _ADDED if one not in there and case.has(block, one)]
    if not there:
        return
    values = dict(zip(there, case.read(*((block, name) for name in there)), strict=True))
    call = case.plain.calls[block.path][0]
    if "residual_in" in there:
        seen = any(same(values["residual_in"], one) for one in call.given)
        if not seen:  # a first block may normalise what it is given, before anything is added
            own = (c for p, c in case.plain.calls.items() if p.startswith(f"{block.path}."))
            seen = any(same(values["residual_in"], one) for c in own for one in c[0].returned)
        demand(seen, f"{block.path} residual_in is not what the block is given")
    if "residual_out" in there:
        seen = any(same(values["residual_out"], one) for one in call.returned)
        demand(seen, f"{block.path} residual_out is not what the block returns")
    added = [values[name] for name in _ADDED if name in there]
    if {"residual_in", "residual_out"} <= values.keys() and added:
        right = adds_up([values["residual_in"], *added], values["residual_out"])
        demand(right, f"{block.path}: residual_in and what is added")
    if {"residual_mid", "residual_out", "mlp_out"} <= values.keys():
        names = [name for name in ("residual_mid", "mlp_out", "extra_out") if name in values]
        right = adds_up([values[name] for name in names], values["residual_out"])
        demand(right, f"{block.path}: residual_mid and mlp_out")
    if "residual_in" not in values:
        normalised(case, block, {name: values[name] for name in _ADDED if name in values})


def adds_up(terms: list[torch.Tensor], total: torch.Tensor) -> bool:
    """Whether the stream and what is added to it make a value.

    With a factor for each channel and a bias it may be the stream that has these, or the sum; of
    several that are added one after the other, each may have its own.
    """
    stream, *added = terms
    whole = torch.stack(added).sum(0)
    if same(total, stream + whole):
        return True
    size = float(total.std())
    if fits([stream], total - whole, size) or fits([stream + whole], total, size):
        return True
    return len(added) > 1 and fits(terms, total, size)


def fits(terms: list[torch.Tensor], total: torch.Tensor, size: float) -> bool:
    """Whether values make another one with a factor for each channel, and a bias.

    Args:
        terms: these.
        total: the other one.
        size: how much each of them has to make of it, by a large factor at least.
    """
    for channel in range(total.shape[-1]):
        columns = [term[..., channel].flatten().double() for term in terms]
        given = torch.stack([*columns, torch.ones_like(columns[0])], 1)
        made = total[..., channel].flatten().double()
        factors = torch.linalg.pinv(given) @ made
        scale = float((given * factors).abs().max())
        if float((given @ factors - made).abs().max()) > 1e-4 * max(scale, 1e-3):
            return False
        if float((factors[:-1] * given[:, :-1].std(0)).abs().min()) < 1e-5 * size:
            return False  # one of them is not in it
    return True


def normalised(case: Case, block: Any, added: Mapping[str, torch.Tensor]) -> None:
    """Each value that is added makes what a norm is given, with what the norm before returned.

    It begins with what the block is given, or with a norm of that, and ends with what it returns.
    """
    own = case.plain.calls[block.path][0]
    inside = [(p, c) for p, c in case.plain.calls.items() if p.startswith(f"{block.path}.")]
    norms = [c for p, made in inside for c in made if "norm" in f"{p} {_kind(case, p)}".lower()]
    norms = [call for call in norms if call.given and call.returned]
    last = own.returned[0]
    steps = [*((call.given[0], call.returned[0]) for call in norms), (last, last)]
    steps = [(one, made) for one, made in steps if one.numel() == last.numel()]
    whole = [own.given[0], *(made for one, made in steps if same(one, own.given[0]))]
    for name, value in added.items():
        before = [one.reshape(value.shape) for one in whole if one.numel() == value.numel()]
        sums = [(one.reshape(value.shape), made) for one, made in steps]
        whole = [
            made for total, made in sums if any(adds_up([one, value], total) for one in before)
        ]
        demand(bool(whole), f"{block.path} {name} is not in what a norm is given")
    if added:
        demand(any(same(one, last) for one in whole), f"{block.path}: something else is added")


def _kind(case: Case, path: str) -> str:
    return type(case.module.get_submodule(path)).__name__


def is_given(case: Case, layer: Layer, value: torch.Tensor) -> bool:
    """Whether plain hooks see that a layer is given a value, in whatever shape."""
    calls = case.plain.calls.get(layer.path, ())
    seen = [one.given[0] for one in calls if one.given]
    return any(
        one.numel() == value.numel() and same(one.reshape(value.shape), value) for one in seen
    )


def check_source(case: Case, block: Any, name: str, layer: Layer) -> None:
    """What is added comes from a layer: without that it is the same at all positions."""
    if not case.has(block, name):
        return
    part = case.module.get_submodule(layer.path)
    with changed(part, torch.zeros_like):
        (found,) = case.read((block, name))
    flat = found.flatten(0, -2)
    demand(
        same(flat, flat[:1].expand_as(flat)), f"{block.path} {name} does not come from {layer.path}"
    )


def mlp(case: Case, block: Any) -> None:
    """`post` goes into the layer with `W_out` and comes from `pre`, which the first one makes."""
    part = block.role["mlp"]
    there = case.there("MLP", part, "pre", "post", "W_in", "W_out")
    there += [name for name in ("W_gate",) if case.has(part, name)]
    names = [name for name in ("pre", "post") if name in there]
    values = dict(zip(names, case.read(*((part, name) for name in names)), strict=True))
    where = f"{block.path} mlp"
    for name, value in values.items():
        positions = [one.shape[:2] for one in case.plain.calls[block.path][0].given[:1]]
        demand(value.shape[:2] in positions, f"{where} {name} is {tuple(value.shape)}")
    if "post" in values and "W_out" in there:
        layers = list(layers_with(case.module, block.path, part.role["W_out"].float()))
        layer = next((one for one in layers if is_given(case, one, values["post"])), None)
        demand(layer is not None, f"{where} post is not what a layer with W_out is given")
        if not case.has(block, "experts"):  # which would add to `mlp_out` too
            check_source(case, block, "mlp_out", layer)
    if "pre" in values and "post" in values:
        with case.opened():
            part.role["pre"][:] = 0
            post = part.role["post"].save()
        flat = post.value.float().flatten(0, -2)
        demand(same(flat, flat[:1].expand_as(flat)), f"{where} post does not come from pre")
    first = "W_gate" if "W_gate" in there else "W_in"
    if "pre" in values and first in there:
        matrix = part.role[first].float()
        layers = list(layers_with(case.module, block.path, matrix))
        demand(bool(layers), f"{where} {first} is the matrix of no layer")
        given = [
            one.given[0]
            for layer in layers
            for one in case.plain.calls.get(layer.path, ())
            if one.given
            and one.given[0].numel() * matrix.shape[1] == values["pre"].numel() * matrix.shape[0]
        ]
        made = [one.reshape(*values["pre"].shape[:2], -1) @ matrix for one in given]
        right = any(constant(values["pre"] - one) for one in made)
        demand(right, f"{where} {first} does not make pre")


def experts(case: Case, block: Any) -> None:
    """Without weights the block adds what it adds with experts that give nothing."""
    part = block.role["experts"]
    there = case.there("experts", part, "router", "weights")
    where = f"{block.path} experts"
    if "router" in there:
        (router,) = case.read((part, "router"))
        positions = case.plain.calls[block.path][0].given[0].shape[:2]
        demand(router.shape[:2] == positions, f"{where} router is {tuple(router.shape)}")
    if "weights" not in there or not case.has(block, "mlp_out"):
        return
    with case.opened():
        part.role["weights"][:] = 0
        found = block.role["mlp_out"].save()
    own = [
        parameter
        for path, module in block.module.named_modules()
        if "expert" in f"{path} {type(module).__name__}".lower()
        if not any(word in path for word in ("shared", "attention", "attn"))
        for parameter in module.parameters(recurse=False)
    ]
    demand(bool(own), f"{where} have no weights of their own")
    before = [parameter.detach().clone() for parameter in own]
    try:
        with torch.no_grad():
            for parameter in own:
                parameter.zero_()
        (expected,) = case.read((block, "mlp_out"))
    finally:
        with torch.no_grad():
            for parameter, values in zip(own, before, strict=True):
                parameter.copy_(values)
    close(found.value.float(), expected, f"{where} weights")
