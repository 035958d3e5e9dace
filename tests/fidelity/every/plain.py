"""What plain hooks see in one forward of a module, and the layers that hold a matrix."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor
Inputs = Mapping[str, Tensor]


@dataclass
class Call:
    """One call of a module, as plain hooks see it.

    Attributes:
        given: the tensors among its arguments, in order.
        returned: the tensors in what it returned, in order.
    """

    given: list[Tensor]
    returned: list[Tensor] = field(default_factory=list)


@dataclass
class Plain:
    """One forward without the library.

    Attributes:
        output: what the module returned.
        calls: the calls of each module by path, in order.
        order: the paths of the calls, in the order in which they began.
    """

    output: Any
    calls: dict[str, list[Call]]
    order: list[str]


def run_plainly(module: nn.Module, inputs: Inputs) -> Plain:
    """Runs one forward with a hook on every module, and none of the library's.

    Args:
        module: the model.
        inputs: keyword arguments of its forward.
    """
    calls: dict[str, list[Call]] = {}
    order: list[str] = []

    def before(path: str, part: nn.Module, args: Any, kwargs: Any) -> None:
        order.append(path)
        given = [value.clone() for value in tensors_in((args, kwargs))]
        calls.setdefault(path, []).append(Call(given))

    def after(path: str, part: nn.Module, args: Any, output: Any) -> None:
        open_call = next(call for call in reversed(calls[path]) if not call.returned)
        open_call.returned = [value.clone() for value in tensors_in(output)]

    with ExitStack() as stack, torch.no_grad():
        for path, part in module.named_modules():
            hook = part.register_forward_pre_hook(partial(before, path), with_kwargs=True)
            stack.callback(hook.remove)
            hook = part.register_forward_hook(partial(after, path))
            stack.callback(hook.remove)
        output = forward(module, inputs)
    return Plain(output, calls, order)


def forward(module: nn.Module, inputs: Inputs, **options: Any) -> Any:
    """A forward without a cache, where the model has such an option."""
    try:
        return module(**inputs, **options, use_cache=False)
    except TypeError as error:
        if "use_cache" not in str(error):
            raise
        return module(**inputs, **options)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of numbers in nested containers, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)


@contextmanager
def changed(part: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Changes the first tensor that a module returns, by a plain hook."""

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output)
        return type(output)((change(output[0]), *output[1:]))

    hook = part.register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class Layer:
    """A linear layer.

    Attributes:
        path: the module's path.
        matrix: what it multiplies its input with, `(input, output)`.
    """

    path: str
    matrix: Tensor

    def columns(self, matrix: Tensor) -> Tensor:
        """Returns which of its columns are those of another matrix."""
        return _apart(matrix, self.matrix).argmin(1)


def _apart(matrix: Tensor, wide: Tensor) -> Tensor:
    """How far each column of a matrix is from each of another."""
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(matrix.float().T, wide.float().T, compute_mode=exact)


def layers_in(module: nn.Module, within: str = "") -> Iterator[Layer]:
    """The modules that multiply with a matrix of their own, one each way round.

    Args:
        module: the model.
        within: the path of the part in which they are.
    """
    for path, part in module.named_modules():
        weight = part._parameters.get("weight")
        if weight is None or weight.ndim != 2 or isinstance(part, nn.Embedding):
            continue
        if not within or path == within or path.startswith(f"{within}."):
            yield Layer(path, weight.detach().T)
            yield Layer(path, weight.detach())


def layers_with(module: nn.Module, within: str, matrix: Tensor) -> Iterator[Layer]:
    """The layers whose matrix has the columns of another one, whatever else it has.

    Args:
        module: the model.
        within: the path of the part in which they are.
        matrix: `(input, output)`.
    """
    for layer in layers_in(module, within):
        wide = layer.matrix
        if wide.shape[0] != matrix.shape[0] or wide.shape[1] < matrix.shape[1]:
            continue
        if float(_apart(matrix, wide).min(1).values.max()) < 1e-4:
            yield layer


def with_eager_attention(module: nn.Module) -> nn.Module:
    """A copy of a model whose attention is computed eagerly."""
    other = copy.deepcopy(module)
    for part in other.modules():
        config = getattr(part, "config", None)
        if config is not None:
            vars(config)["_attn_implementation_internal"] = "eager"
    return other
