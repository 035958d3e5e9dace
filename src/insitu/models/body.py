"""What is known of a Transformers model's parts: found in one forward, when first asked for."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from insitu.graph.errors import UnknownShapeError
from insitu.graph.location import here
from insitu.models.anatomy import Anatomist
from insitu.models.attention import attending
from insitu.models.parts import Block, Spot
from insitu.models.samples import sample_call, sample_lengths
from insitu.models.weights import Weights
from insitu.runtime.dataflow import Dataflow, watch
from insitu.runtime.probe import Call

if TYPE_CHECKING:
    from insitu.models.model import Model

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


class Body:
    """A model's blocks and what comes before and after them.

    Args:
        model: the model.
        stacks: the lists of its blocks, by path, and how long they are.

    Attributes:
        stacks: the paths of its blocks, a list for each stack, such as encoder and decoder.
        lengths: all numbers of positions that hidden states had in the forward that was watched.
        weights: the weights of its parts.
    """

    def __init__(self, model: Model, stacks: Mapping[str, int]) -> None:
        self._model = model
        self.stacks: Sequence[Sequence[str]] = [
            [f"{path}.{layer}" for layer in range(count)] for path, count in stacks.items()
        ]
        self._blocks: dict[str | None, Mapping[str, Block]] = {}
        self._after: tuple[str | None, Spot | None] | None = None
        self._paths = {path for stack in self.stacks for path in stack}
        self._said_eager = False
        self.lengths: frozenset[int] = frozenset()
        self.weights = Weights(self)

    @property
    def model(self) -> Model:
        """The model."""
        return self._model

    def sample(self) -> Call | None:
        """Returns arguments for a small forward, None if it is not known what the model takes."""
        return sample_call(self._model.module, self._config)

    @property
    def _config(self) -> Any:
        return self._model.module.config

    def blocks(self, implementation: str | None = None) -> Mapping[str, Block]:
        """Returns what the blocks consist of, by path.

        Args:
            implementation: with which attention; None for the model's own.

        Raises:
            UnknownShapeError: if that cannot be found out before the weights are loaded.
        """
        if implementation not in self._blocks:
            self._blocks[implementation] = self._watch(implementation)
        return self._blocks[implementation]

    def block_around(self, path: str) -> Block | None:
        """Returns the block that a module is or is in, None if it is in none."""
        parts = path.split(".")
        for count in range(len(parts), 0, -1):
            block = ".".join(parts[:count])
            if block in self._paths:
                return self.blocks().get(block)
        return None

    @property
    def embedding(self) -> str | None:
        """The path of the embedding of tokens."""
        return self._path_of("get_input_embeddings")

    @property
    def unembedding(self) -> str | None:
        """The path of the layer that makes logits."""
        return self._path_of("get_output_embeddings")

    def final_norm(self) -> str | None:
        """Returns the path of the norm whose output is unembedded."""
        self.blocks()
        return self._after[0] if self._after else None

    def logits(self) -> Spot | None:
        """Returns where the logits are."""
        self.blocks()
        return self._after[1] if self._after else None

    def number(self, name: str) -> int | None:
        """Returns a size of the model: "n_heads" and so on; None if it has none."""
        blocks = [self.blocks()[path] for path in self.stacks[-1]] if self.stacks else []
        if name == "n_layers":
            return len(blocks)
        if name == "vocab_size":
            logits = self.logits()
            if logits is not None:
                return logits.shape[-1]
            embedding = self.embedding
            module = self._model.modules[embedding] if embedding is not None else None
            return getattr(module, "num_embeddings", None)
        for block in blocks:
            heads, mlp = block.attention, block.mlp
            if name == "d_model":
                return block.width
            if name == "n_heads" and heads is not None:
                return heads.count
            if name == "d_head" and heads is not None:
                return heads.q.shape[-1] if heads.q is not None else heads.size
            if name == "d_mlp" and mlp is not None and mlp.post is not None:
                return mlp.post.shape[-1]
        return None

    def say_eager(self) -> None:
        """Says once that runs will be with eager attention."""
        if not self._said_eager:
            self._said_eager = True
            warnings.warn(
                "Attention scores and patterns exist in eager attention only, so runs in which "
                "they are used have that in the place of the model's own implementation. "
                "`attn_implementation='eager'`, given where the model is made, says so for all.",
                stacklevel=2,
            )

    def _path_of(self, getter: str) -> str | None:
        find = getattr(self._model.module, getter, None)
        wanted: nn.Module | None = None
        with contextlib.suppress(Exception):  # some models refuse to be asked
            wanted = find() if find else None
        if wanted is None:
            return None
        return next((path for path, part in self._model.modules.items() if part is wanted), None)

    def _watch(self, implementation: str | None) -> Mapping[str, Block]:
        """Makes a forward and reads the anatomy of every block out of it."""
        flow = self._flow(implementation)
        modules = self._model.modules
        lengths = set(sample_lengths(self._config))
        sizes: dict[str, tuple[int, int]] = {}
        for path in self._paths:
            index = next(flow.calls(path), None)
            if index is not None and flow.events[index].outputs:
                shape = flow.shapes[flow.events[index].outputs[0]]
                if len(shape) >= 2:
                    sizes[path] = shape[:2]
                    lengths.add(shape[1])
        self.lengths = frozenset(lengths)
        experts = self._experts()
        found: dict[str, Block] = {}
        for path, size in sizes.items():
            block = Anatomist(flow, modules, size, lengths, experts).block(path)
            if block is not None:
                found[path] = block
        if self._after is None:
            self._after = self._ending(flow)
        return found

    def _flow(self, implementation: str | None) -> Dataflow:
        model = self._model
        call = self.sample()
        if call is None:
            raise UnknownShapeError(
                "What the parts of this model are is not known, because it is not known what it "
                "is called with."
            )
        with model.in_use(), attending(model.module, implementation):
            try:
                return watch(model.module, model.modules, call, fake=True)
            except Exception as error:  # whatever a model does not do without data
                failure = error
            if model.loaded:
                return watch(model.module, model.modules, call, fake=False)
        raise UnknownShapeError(
            "What the parts of this model are cannot be found out before its weights are there "
            f"({type(failure).__name__}: {failure}): call `model.load()` first.",
            here(),
        ) from failure

    def _experts(self) -> int:
        text = self._config.get_text_config()
        counts = (getattr(text, name, None) for name in _EXPERTS)
        return next((count for count in counts if isinstance(count, int)), 0)

    def _ending(self, flow: Dataflow) -> tuple[str | None, Spot | None]:
        """The last norm, and the logits."""
        whole = next(flow.calls(""), None)
        head = self.unembedding
        norm: str | None = None
        if head is not None:
            for index in flow.calls(head):
                norm = _norm_before(flow, flow.events[index].inputs[0], self._model.modules)
        if whole is None:
            return norm, None
        results = flow.results[whole]
        value = results.get("logits") if isinstance(results, Mapping) else None
        if type(value) is not int:
            return norm, None
        for returned in flow.returned[value]:
            event = flow.events[returned.event]
            if event.path == head and not returned.item:
                return norm, Spot(head, "output", event.call, (), flow.shapes[value])
        return norm, Spot("", "output", 0, ("logits",), flow.shapes[value])


# What a norm's output may go through before it is unembedded: it is cut, reshaped or scaled.
_LEAVES = frozenset(
    (
        *("clone", "contiguous", "div", "flatten", "getitem", "mul", "reshape", "rmul", "select"),
        *("squeeze", "to", "truediv", "type", "type_as", "unsqueeze", "view"),
    )
)


def _norm_before(flow: Dataflow, value: int, modules: Mapping[str, nn.Module]) -> str | None:
    """The norm that a value comes from, through what only moves or scales it."""
    while True:
        for returned in flow.returned.get(value, ()):
            path = flow.events[returned.event].path
            if "norm" in type(modules[path]).__name__.lower():
                return path
        maker = flow.maker(value)
        if maker is None or not maker.inputs or maker.function not in _LEAVES:
            return None
        value = maker.inputs[0]
