"""What tests of standard names on every architecture share: models, blocks, and runs of them."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import nn

from insitu import LanguageModel, Model, PathError
from tests.fidelity.zoo import ZOO, module_of
from tests.fidelity.zoo.absent import UNNAMED
from tests.fidelity.zoo.layers import layer

# Their eager attention computes something else, so it is chosen for the whole model.
EAGER = {"falcon-alibi"}


@cache
def kept(name: str) -> Any:
    module = module_of(name)
    if name in EAGER:
        vars(module.config)["_attn_implementation_internal"] = "eager"
    one = ZOO[name]
    return LanguageModel(module) if one.takes_text else Model(module)


def opened(model: Any, name: str, inputs: dict[str, torch.Tensor]) -> Any:
    """A block of one run with these inputs."""
    if isinstance(model, LanguageModel):
        others = {key: value for key, value in inputs.items() if key != "input_ids"}
        return model.trace(inputs["input_ids"], **others)
    return model.trace(**inputs)


def stacks(name: str, model: Any) -> list[list[Any]]:
    found = []
    for path in ZOO[name].stacks_in(model.module):
        handle = model
        for part in path.split("."):
            handle = handle[part]
        found.append(list(handle))
    return found


def named_stacks(name: str, model: Any) -> list[list[Any]]:
    """The stacks whose blocks have standard names, which are all but those said to have none."""
    found = []
    for stack in stacks(name, model):
        unnamed = any(part in stack[0].path.split(".") for part in UNNAMED.get(name, ()))
        assert all(bool(list(block.role)) != unnamed for block in stack), stack[0].path
        if not unnamed:
            found.append(stack)
    assert found
    return found


def last_blocks(name: str, model: Any) -> list[Any]:
    """A block of each kind in each stack with standard names: the last."""
    found = []
    for stack in named_stacks(name, model):
        kinds: dict[Any, Any] = {}
        for block in stack:
            kinds[tuple(block.role)] = block
        found.extend(kinds.values())
    return found


def missing(part: Any, name: str, *, match: str) -> None:
    """Asserts that a name of a model, a block or a part of it is said not to be there, and why."""
    assert name not in list(part.role), part.path
    with pytest.raises(PathError, match=f"has no `{name}`: .*{match}"):
        part.role[name]


def close(
    found: torch.Tensor,
    expected: torch.Tensor,
    what: str = "",
    limit: float = 2e-5,
    floor: float = 1.0,
) -> None:
    """Asserts that tensors are the same to rounding, of no less than `floor`."""
    assert found.shape == expected.shape, (what, found.shape, expected.shape)
    scale = max(float(expected.abs().max()), floor)
    assert float((found - expected).abs().max()) <= limit * scale, what


@contextmanager
def hooked(module: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """What a block is given and returns, as plain hooks see it."""
    seen: dict[str, torch.Tensor] = {}

    def before(part: nn.Module, args: Any, kwargs: Any) -> None:
        value = args[0] if args else kwargs["hidden_states"]
        seen["input"] = value.detach().clone()

    def after(part: nn.Module, args: Any, output: Any) -> None:
        value = output if isinstance(output, torch.Tensor) else output[0]
        seen["output"] = value.detach().clone()

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def shape_of(name: str, part: Any, key: str) -> torch.Size:
    with opened(kept(name), name, ZOO[name].inputs(2, 7)):
        value = getattr(part, key).save()
    return value.value.shape


ADDED = ("attention_out", "cross_attention_out", "mlp_out", "mixer_out", "extra_out")


OF_HEADS = ("q", "k", "v", "scores", "pattern", "z", "result")
VALUES = {
    "": ("residual_in", "residual_mid", "residual_out", *ADDED),
    "attention": OF_HEADS,
    "cross_attention": OF_HEADS,
    "mlp": ("pre", "post"),
    "experts": ("router", "weights"),
}


def there(part: Any, *names: str) -> list[str]:
    return [name for name in names if name in list(part.role)]


def values_of(block: Any) -> Iterator[tuple[str, Any, str]]:
    """All that has a name in a block: a key, the part, and what it is called there."""
    for role, names in VALUES.items():
        if role and role not in list(block.role):
            continue
        part = block.role[role] if role else block
        for name in there(part, *names):
            yield f"{role}.{name}", part, name


def scores_of(name: str) -> Any:
    """The logits in a run, or what else a model gives."""
    model = kept(name)
    return model.output["logits_per_image"] if ZOO[name].kind == "contrastive" else model.logits


Change = Callable[[torch.Tensor], torch.Tensor]
Seen = dict[tuple[str, str], list[torch.Tensor]]


@contextmanager
def tapped(
    layers: Mapping[str, nn.Module | None],
    before: Mapping[str, Change] | None = None,
    after: Mapping[str, Change] | None = None,
) -> Iterator[Seen]:
    """What passes some layers, call by call, as plain hooks see it; and what is done to it.

    Args:
        layers: the layers, or blocks, by whatever name; those that are None are left out.
        before: what is made of what some are given.
        after: what is made of what some return, or of the first thing that they return.
    """
    seen: Seen = defaultdict(list)

    def noted(key: tuple[str, str], value: torch.Tensor) -> None:
        if value.requires_grad:
            value.retain_grad()
        seen[key].append(value if value.requires_grad else value.clone())

    def enter(key: str, part: nn.Module, args: Any, kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        new = before[key](given) if before and key in before else given
        noted((key, "input"), new)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def leave(key: str, part: nn.Module, args: Any, output: Any) -> Any:
        first = output if isinstance(output, torch.Tensor) else output[0]
        new = after[key](first) if after and key in after else first
        noted((key, "output"), new)
        return new if isinstance(output, torch.Tensor) else type(output)((new, *output[1:]))

    with ExitStack() as stack:
        for key, part in layers.items():
            if part is not None:
                hook = part.register_forward_pre_hook(partial(enter, key), with_kwargs=True)
                stack.callback(hook.remove)
                hook = part.register_forward_hook(partial(leave, key), prepend=True)
                stack.callback(hook.remove)
        yield seen


def by_heads(value: torch.Tensor, heads: int) -> torch.Tensor:
    """`(batch, position, head * size)` as `(batch, head, position, size)`."""
    return value.unflatten(-1, (heads, -1)).transpose(1, 2)


# Where a block is changed by plain hooks: what a layer is given, and by what name that goes.
CHANGED = (
    ("attention.out", "attention", "z"),
    ("mlp.out", "mlp", "post"),
    ("mixer", "", "mixer_out"),
)


def changed_place(block: Any) -> tuple[str, nn.Module, Any, str]:
    """A layer of a block, by its role, and by what part and name of it is changed what passes it.

    Of attention and of an MLP that is what the layer is given, of a mixer what it returns.
    """
    for role, part, key in CHANGED:
        module = layer(block.module, role)
        if module is not None:
            return role, module, block.role[part] if part else block, key
    raise AssertionError(block.path)


def plain_forward(name: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a forward without Insitu gives for these inputs, without a cache as in a trace."""
    model = kept(name)
    if isinstance(model, LanguageModel) and model.traits.takes_use_cache:
        output = model.module(**inputs, use_cache=False)
    else:
        output = model.module(**inputs)
    return output["logits_per_image" if ZOO[name].kind == "contrastive" else "logits"]


def without(name: str, part: Any, key: str, *read: str) -> list[torch.Tensor]:
    """What there is in a run in which one value is all zeros."""
    zeros = torch.zeros(shape_of(name, part, key))
    with opened(kept(name), name, ZOO[name].inputs(2, 7)):
        setattr(part, key, zeros)
        saved = [getattr(part, other).save() for other in read]
    return [one.value for one in saved]


def attention_roles(block: Any) -> list[str]:
    """Which attention there is in a block: where there is a layer that it ends in."""
    roles = [r for r in ("attention", "cross_attention") if layer(block.module, f"{r}.out")]
    assert there(block, "attention", "cross_attention") == roles, block.path
    return roles


def attentions(block: Any) -> list[Any]:
    return [block.role[role] for role in attention_roles(block)]


def attentions_of(name: str, inputs: Any, stack: str) -> dict[str, tuple[torch.Tensor, ...]]:
    """The patterns that the model itself returns with eager attention, of a stack, by role."""
    module = kept(name).module
    configs = {id(p.config): p.config for p in module.modules() if hasattr(p, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            vars(config)["_attn_implementation_internal"] = "eager"
        with torch.no_grad():
            output = module(**inputs, output_attentions=True)
    finally:
        for key, config in configs.items():
            vars(config)["_attn_implementation_internal"] = before[key]
    if ZOO[name].kind == "contrastive":  # a tower each for images and text
        output = output[f"{stack.partition('.')[0]}_output"]
    names = {"attention": "attentions"}
    if "encoder_attentions" in output:
        side = "decoder" if "decoder" in stack.split(".") else "encoder"
        names = {"attention": f"{side}_attentions"}
        if side == "decoder":
            names["cross_attention"] = "cross_attentions"
    return {role: output[key] for role, key in names.items()}


@pytest.fixture(autouse=True)
def eager_is_expected() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attention scores and patterns")
        yield
