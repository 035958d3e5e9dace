"""Gradients by name on every architecture, against those of autograd and finite differences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.fidelity.named import (
    ADDED,
    Seen,
    attention_roles,
    by_heads,
    close,
    eager_is_expected,  # noqa: F401
    kept,
    last_blocks,
    opened,
    plain_forward,
    scores_of,
    tapped,
    there,
    values_of,
)
from tests.fidelity.zoo import ZOO
from tests.fidelity.zoo.layers import layer

pytestmark = pytest.mark.no_wire  # what is sent does not depend on the architecture

LAYERS = ("attention.out", "cross_attention.out", "mlp.out")


def loss_of(scores: Any) -> Any:
    return scores.double().sin().sum()


@pytest.mark.parametrize("name", ZOO)
def test_gradients_by_name_are_those_of_autograd(name: str) -> None:
    model, inputs = kept(name), ZOO[name].inputs(2, 7)
    for block in last_blocks(name, model):
        module = block.module
        layers = {"block": module, **{role: layer(module, role) for role in LAYERS}}
        with tapped(layers) as seen:
            loss_of(plain_forward(name, inputs)).backward()
        model.module.zero_grad()
        with opened(model, name, inputs):
            saved = {
                (key, of): getattr(part, of).grad.save()
                for key, part, of in values_of(block)
                if of not in ("q", "k", "v", "scores", "pattern", "pre", "router", "weights")
            }
            loss_of(scores_of(name)).backward()
        assert all(parameter.grad is None for parameter in model.module.parameters())
        found = {of if key[0] == "." else key: one.value for (key, of), one in saved.items()}
        assert found or "experts" in list(block.role)
        for key, expected in expected_gradients(block, seen):
            assert float(expected.abs().max()) > 0, (block.path, key)
            close(found[key], expected, f"{block.path} {key}", 1e-4, 1e-2)
        for key, expected in handed_on(block, found):
            close(found[key], expected, f"{block.path} {key}", 1e-4, 1e-2)


def expected_gradients(block: Any, seen: Seen) -> Iterator[tuple[str, torch.Tensor]]:
    """What autograd gives for all that has a name and that a hook can see."""
    leaving = seen["block", "output"][0].grad
    if there(block, "residual_in"):
        yield "residual_in", seen["block", "input"][0].grad
        yield "residual_out", leaving
    for role in attention_roles(block):
        given, made = seen[f"{role}.out", "input"][0], seen[f"{role}.out", "output"][0]
        heads = block.role[role].W_O.shape[0]
        yield f"{role}.z", by_heads(given.grad.view(*made.shape[:2], -1), heads)
        yield f"{role}.result", made.grad.unsqueeze(1).expand(-1, heads, -1, -1)
    if seen["mlp.out", "input"]:
        given = seen["mlp.out", "input"][0].grad
        yield "mlp.post", given.view(*leaving.shape[:2], -1)


def handed_on(block: Any, found: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """What a sum hands on to what it is the sum of."""
    leaving = found.get("residual_out")
    middle = found.get("residual_mid", leaving)
    if leaving is None:
        return  # a norm comes between
    for key in there(block, *ADDED):
        if key == "attention_out" and "cross_attention_out" in found:
            continue  # what attends to the encoder comes between
        yield key, leaving if key == "mlp_out" else middle


# Gradients of one kind are about as large: together, each of them shows in the sum.
# What heads add comes first: it is written as their sum, whatever was written to that before.
KINDS = (
    ("result", "residual_in", "residual_mid", "residual_out", *ADDED),
    ("v", "z", "pre", "post", "weights"),
    ("q", "k", "scores", "pattern", "router"),
)


@pytest.mark.parametrize("name", ZOO)
def test_gradients_by_name_are_slopes(name: str) -> None:
    """A loss changes by as much as the gradients of what is changed a little say."""
    model, inputs = kept(name), ZOO[name].inputs(1, 5)
    for block in last_blocks(name, model):
        places = list(values_of(block))
        with opened(model, name, inputs):
            saved = [(getattr(p, of).save(), getattr(p, of).grad.save()) for _, p, of in places]
            loss_of(scores_of(name)).backward()
        values = [(value.value, grad.value) for value, grad in saved]
        for kind in KINDS:
            chosen = [
                (place, pair)
                for place, pair in zip(places, values, strict=True)
                if place[2] in kind
            ]
            if not chosen:
                continue
            least = min(reach(*pair) for _, pair in chosen)
            steps = [(part, of, step(*pair, least)) for (_, part, of), pair in chosen]
            steps.sort(key=lambda one: kind.index(one[1]))
            found = loss_with(name, inputs, steps, 1) - loss_with(name, inputs, steps, -1)
            expected = 2 * least * len(steps)
            # To a twentieth of what one of them adds.
            assert found == pytest.approx(expected, abs=0.1 * least), (block.path, kind)


def reach(value: torch.Tensor, grad: torch.Tensor) -> float:
    """How far a loss goes if a value goes a little way along its gradient."""
    seen = value.abs() < 1e4  # what is masked stays masked
    size = float(value[seen].square().mean().sqrt())
    assert float(grad.norm()) > 0
    return 5e-3 * size * float(grad.norm())


def step(value: torch.Tensor, grad: torch.Tensor, length: float) -> torch.Tensor:
    """A small change of a value by which a loss goes so far, if this is its gradient."""
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    noise = noise * (value.abs() < 1e4)
    noise = noise - grad * (noise * grad).sum() / grad.square().sum()
    return length / grad.norm() * (grad / grad.norm() + 0.5 * noise / noise.norm())


def loss_with(
    name: str, inputs: dict[str, torch.Tensor], steps: list[tuple[Any, str, torch.Tensor]], by: int
) -> float:
    """The loss of a run in which something is added to some values."""
    with opened(kept(name), name, inputs):
        for part, of, change in steps:
            setattr(part, of, getattr(part, of) + by * change)
        loss = loss_of(scores_of(name)).save()
    return float(loss.value)
