"""The weights of a model's parts, all the same way round: `x @ W`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from insitu.engine.interpose import Taps
from insitu.engine.places import Stop
from insitu.graph.changes import changing
from insitu.graph.node import SEPARATOR
from insitu.models.attention import attending
from insitu.models.blocks import CACHES
from insitu.models.parts import Block, Feedforward, Heads, Spot
from insitu.tracing.vocabulary import Missing

if TYPE_CHECKING:
    from insitu.models.body import Body


@contextmanager
def in_memory(module: nn.Module) -> Generator[None, None, None]:
    """Has the weights of a module where Accelerate computes with them, and not on disk or away.

    Args:
        module: the module; Accelerate's hook fetches its weights for each call.
    """
    away = any(weight.is_meta for weight in module.parameters())
    if not away or not any("_hf_hook" in vars(part) for part in module.modules()):
        yield
        return
    from accelerate.utils import align_module_device

    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(align_module_device(part))
        yield


_LETTERS = {"W_Q": "q", "W_K": "k", "W_V": "v"}


class NoMatrixError(Exception):
    """What a module does is no multiplication with a matrix."""


def _of_matrices(find: Callable[[], torch.Tensor | Missing]) -> torch.Tensor | Missing:
    """Weights; or why there are none, where a module has no matrix."""
    try:
        return find()
    except NoMatrixError as error:
        return Missing(str(error))


class Weights:
    """Finds the weights of a model's parts.

    Args:
        body: the facts of the model's parts.
    """

    def __init__(self, body: Body) -> None:
        self._body = body
        self._columns: dict[tuple[str, str, int], torch.Tensor | None] = {}

    def embedding(self) -> torch.Tensor | Missing:
        """Returns the embedding of tokens, `(vocabulary, d_model)`."""
        self._body.model.load()
        path = self._body.embedding
        weight: object = None
        if path is not None:
            module = self._body.model.modules[path]
            with in_memory(module):
                weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            return Missing("this model has no embedding of tokens.")
        return weight.detach()

    def unembedding(self) -> torch.Tensor | Missing:
        """Returns what makes logits, `(d_model, vocabulary)`."""
        path = self._body.unembedding
        if path is None:
            return Missing("this model has no unembedding.")
        return _of_matrices(lambda: self.matrix(path))

    def of_heads(self, block: Block, heads: Heads, name: str) -> torch.Tensor | Missing:
        """Returns the weights of an attention: `(head, d_model, d_head)`, of W_O its transpose.

        Args:
            block: the block.
            heads: its attention.
            name: which.
        """
        return _of_matrices(lambda: self._of_heads(block, heads, name))

    def _of_heads(self, block: Block, heads: Heads, name: str) -> torch.Tensor | Missing:
        if name == "W_O":
            if heads.out is None or not heads.count:
                return Missing("it has no output projection.")
            return self.matrix(heads.out).unflatten(0, (heads.count, -1))
        letter = _LETTERS[name]
        path = heads.projections.get(letter)
        if path is None:
            return Missing(f"no linear layer makes its {letter}.")
        matrix = self.matrix(path)
        if matrix.shape[0] != block.width and heads in (block.attention,):
            return Missing(f"its {letter} is made in more than one step, by no single matrix.")
        spot: Spot | None = heads.raw.get(letter)
        count, size = self._count(heads, letter)
        columns = None if spot is None else self._found(block, path, spot, matrix.shape[1])
        if columns is None:
            if matrix.shape[1] != count * size:
                return Missing(f"its {letter} cannot be told from what else its layer makes.")
            columns = torch.arange(count * size).reshape(count, size)
        return matrix[:, columns.to(matrix.device)].transpose(0, 1)

    def of_mlp(self, block: Block, mlp: Feedforward, name: str) -> torch.Tensor | Missing:
        """Returns the weights of an MLP: `(d_model, d_mlp)`, of W_out its transpose.

        Args:
            block: the block.
            mlp: its MLP.
            name: which.
        """
        return _of_matrices(lambda: self._of_mlp(mlp, name))

    def _of_mlp(self, mlp: Feedforward, name: str) -> torch.Tensor | Missing:
        if mlp.router is not None:
            return Missing("its MLP consists of experts, each with its own.")
        if name == "W_out":
            return Missing("it has no linear layer.") if mlp.out is None else self.matrix(mlp.out)
        if mlp.into is None or mlp.pre is None or mlp.post is None:
            return Missing("no linear layer stands before its nonlinearity.")
        width = mlp.post.shape[-1]
        matrix = self.matrix(mlp.into)
        if matrix.shape[1] == 2 * width:  # gate and values in one, side by side
            first, second = matrix[:, :width], matrix[:, width:]
            gate_is_first = self._gate_is_first(mlp)
            if gate_is_first is None:
                return Missing("its gate cannot be told from what else its layer makes.")
            return first if gate_is_first == (name == "W_gate") else second
        if mlp.gate is None:
            return matrix if name == "W_in" else Missing("its MLP has no gate.")
        return matrix if name == "W_gate" else self.matrix(mlp.gate)

    def matrix(self, path: str) -> torch.Tensor:
        """Returns the weights of a linear layer as `x @ W` has them, `(d_in, d_out)`.

        Of a layer that is no plain one, such as a quantised or sparse one or one with an adapter,
        they are what it makes of the unit vectors.

        Args:
            path: the layer's path.

        Raises:
            NoMatrixError: if the module gives no tensor.
        """
        self._body.model.load()
        module = self._body.model.modules[path]
        with in_memory(module):
            return self._matrix(module, path)

    def _matrix(self, module: nn.Module, path: str) -> torch.Tensor:
        weight: object = getattr(module, "weight", None)
        is_leaf = next(module.children(), None) is None
        if is_leaf and isinstance(weight, torch.Tensor) and weight.layout is torch.strided:
            if type(module) is nn.Linear:
                return weight.detach().T
            if getattr(module, "nf", None) == weight.shape[-1]:  # Transformers' Conv1D
                return weight.detach()
        width = int(getattr(module, "in_features", None) or self._width_of(path))
        unit = torch.eye(width)
        floats = [part for part in module.parameters() if part.is_floating_point()]
        if floats:
            unit = unit.to(floats[0].dtype).to(
                next((p for p in floats if not p.is_meta), unit).device
            )
        with torch.no_grad(), self._body.model.in_use():
            made, none = module(unit), module(torch.zeros_like(unit[:1]))
        if not isinstance(made, torch.Tensor) or not isinstance(none, torch.Tensor):
            raise NoMatrixError(f"`{path}` gives no tensor, so no single matrix makes it.")
        return made - none

    def _width_of(self, path: str) -> int:
        block = self._body.block_around(path)
        assert block is not None
        for heads in (block.attention, block.cross_attention):
            if heads is not None and heads.out == path and heads.z is not None:
                return heads.z.shape[-1]
        mlp = block.mlp
        if mlp is not None and mlp.out == path and mlp.post is not None:
            return mlp.post.shape[-1]
        return block.width

    def _count(self, heads: Heads, letter: str) -> tuple[int, int]:
        spot: Spot | None = getattr(heads, letter)
        if spot is None:
            return heads.count, heads.size
        lengths = self._body.lengths
        axes = spot.shape[1:3]
        return (axes[0] if axes[1] in lengths else axes[1]), spot.shape[-1]

    def _gate_is_first(self, mlp: Feedforward) -> bool | None:
        """Whether of a layer that makes gate and values the gate comes first, None if unknown."""
        assert mlp.into is not None and mlp.pre is not None
        width = mlp.post.shape[-1] if mlp.post is not None else 0
        found = self._run_with_numbers(mlp.into, mlp.pre, 2 * width)
        return None if found is None else int(found.flatten()[0]) == 0

    def _found(self, block: Block, path: str, spot: Spot, width: int) -> torch.Tensor | None:
        """Which columns of a layer's output are where in `spot`: `(head, size)`."""
        inside = spot.path.removeprefix(block.path)
        key = (path.removeprefix(block.path), f"{inside}{spot.kind}{spot.call}{spot.item}", width)
        if key not in self._columns:
            found = self._run_with_numbers(path, spot, width)
            if found is not None:
                swapped = spot.shape[2] not in self._body.lengths
                found = found[0, 0] if swapped else found[0, :, 0]
            self._columns[key] = found
        return self._columns[key]

    def _run_with_numbers(self, path: str, spot: Spot, width: int) -> torch.Tensor | None:
        """What stands at a spot if a layer's output is the numbers of its columns.

        The numbers are written with digits, each in a forward of its own, since half precision
        knows whole numbers only up to 256.
        """
        model = self._body.model
        call = self._body.placed_sample()
        module = model.load()
        numbers = torch.arange(width)
        total: torch.Tensor | None = None
        place = 1
        assert call is not None
        # What other implementations do is not seen: the spot is one of a run with eager attention.
        implementation = "eager" if self._body.is_unusual else None
        while place <= max(width - 1, 1):
            digits = (numbers // place) % _BASE
            with model.in_use(), attending(module, implementation):
                seen = _seen(module, model.modules, call, path, digits, spot)
            if seen is None:
                return None
            seen = seen.round().long().cpu() * place
            total = seen if total is None else total + seen
            place *= _BASE
        return total


_BASE = 128


def _seen(
    module: nn.Module,
    modules: Mapping[str, nn.Module],
    call: Any,
    path: str,
    digits: torch.Tensor,
    spot: Spot,
) -> torch.Tensor | None:
    """What stands at a spot in a forward in which a layer gives the same numbers everywhere."""
    found: list[torch.Tensor] = []
    owner, inside, function = spot.path.partition(SEPARATOR)
    count = -1

    def replace(part: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        return digits.to(output).expand_as(output)

    def stop(value: Any) -> None:
        for at in spot.item:
            value = value[at]
        found.append(value.detach().clone())
        raise Stop

    def before(part: nn.Module, args: Any, kwargs: Any) -> None:
        stop(args[0])

    def after(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        stop(output)

    def visit(name: str, func: Any, args: Any, kwargs: Any) -> Any:
        nonlocal count
        result = func(*args, **kwargs)
        if name == function:
            count += 1
            if count == spot.call:
                stop(result if spot.kind == "output" else args[0])
        return result

    with changing() as changes:
        taps = Taps(changes)
        taps.after(modules[path], replace)
        if inside:
            taps.functions(modules[owner], visit, CACHES)
        elif spot.kind == "input":
            taps.before(modules[owner], before)
        else:
            taps.after(modules[owner], after)
        changes.gradients(False)
        try:
            module(*call.args, **call.kwargs)
        except Stop:
            return found[0]
    return None
