"""The facts of a Transformers model's parts: found in one forward, when first asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from insitu.engine.dataflow import Dataflow, watch
from insitu.engine.probe import Call
from insitu.graph.errors import UnknownShapeError
from insitu.graph.location import here
from insitu.graph.user_warnings import warn_user
from insitu.models.anatomy import Reading, block_of
from insitu.models.anatomy.hidden_states import hidden_sizes
from insitu.models.anatomy.logits import final_norm_of, logits_of
from insitu.models.architectures import DESCRIPTIONS, Description
from insitu.models.attention import OPTION, attending, implementations
from insitu.models.blocks import CACHES
from insitu.models.configuration import expert_counts, said, text_config
from insitu.models.parts import Block, Spot
from insitu.models.proof.outcome import Proven
from insitu.models.samples import sample_call, sample_lengths
from insitu.models.visible_softmax import VisibleSoftmax
from insitu.tracing.invocation import innermost

if TYPE_CHECKING:
    from insitu.models.wrapped_module import WrappedModule

_RESTLESS = (
    "The model exchanges modules of its own in a forward of a few tokens, and has not done so yet, "
    "so what its parts are is not known. Names are there once it has: in the block of such a "
    "prompt, and after it (`with model.trace(prompt): pass`). From then on it computes with those "
    "modules, as it does outside of blocks. Until then read its values by path."
)


class Body:
    """A model's blocks and what comes before and after them.

    Args:
        model: the model.
        stacks: the lists of its blocks, by path, and how long they are.
        description: the description of its blocks; None for that of its architecture.
        prove: gives the proofs of its parts; None where all that was found counts.

    Attributes:
        stacks: the paths of its blocks, a list for each stack, such as encoder and decoder.
        paths: those of all of them.
        lengths: all numbers of positions that hidden states had in the forward that was watched.
        description: the description of its blocks.
        softmax: finds with which options the softmax of its attention can be seen.
    """

    def __init__(
        self,
        model: WrappedModule,
        stacks: Mapping[str, int],
        description: Description | None,
        prove: Callable[[Body], Proven] | None = None,
    ) -> None:
        self._model = model
        self.stacks: Sequence[Sequence[str]] = [
            [f"{path}.{layer}" for layer in range(count)] for path, count in stacks.items()
        ]
        known = DESCRIPTIONS.get(getattr(model.module.config, "model_type", ""))
        self.description = description or known or Description()
        self._found: dict[tuple[tuple[str, Any], ...], Mapping[str, Block]] = {}
        self._kinds: dict[tuple[tuple[str, Any], ...], Mapping[str, str]] = {}
        self._blocks: dict[tuple[tuple[str, Any], ...], Mapping[str, Block]] = {}
        self.softmax = VisibleSoftmax(model, self._seen, self.placed_sample, self._proven_options)
        self._after: tuple[str | None, Spot | None] | None = None
        self.paths = {path for stack in self.stacks for path in stack}
        self._said_eager = False
        self.lengths: frozenset[int] = frozenset()
        self._prove = prove

    @cached_property
    def proofs(self) -> Proven | None:
        """What was proven of its parts; None where all that was found counts."""
        return None if self._prove is None else self._prove(self)

    @property
    def model(self) -> WrappedModule:
        """The model."""
        return self._model

    def sample(self) -> Call | None:
        """Returns arguments for a small forward, None if it is not known what the model takes."""
        return sample_call(self._model.module, self._config)

    def placed_sample(self) -> Call | None:
        """Returns the same for a model with its weights, on their device."""
        call = self.sample()
        weight = next(self._model.module.parameters(), None)
        device = getattr(self._model, "device", None if weight is None else weight.device)
        if call is None or device is None:
            return call
        return Call((), {name: _on(device, value) for name, value in call.kwargs.items()})

    @property
    def is_unusual(self) -> bool:
        """Whether attention is computed by something else than torch's own functions."""
        usual = (None, "eager", "sdpa")
        return any(one not in usual for one in implementations(self._model.module))

    @property
    def _config(self) -> Any:
        return self._model.module.config

    def blocks(self) -> Mapping[str, Block]:
        """Returns what the blocks consist of, by path.

        Raises:
            UnknownShapeError: if that cannot be found out before the weights are loaded.
        """
        return self.blocks_of_a_run({})

    def blocks_of_a_run(self, options: Mapping[str, Any]) -> Mapping[str, Block]:
        """Returns the same for a run with further options.

        Args:
            options: keyword arguments of the forward, or which implementation of attention.

        Raises:
            UnknownShapeError: as of `blocks`.
        """
        key = tuple(options.items())
        if key not in self._blocks:
            found, proofs = self._seen(options), self.proofs
            if proofs is not None:
                kinds = self._kinds[key]
                found = {path: proofs.applied(b, kinds[path]) for path, b in found.items()}
            self._blocks[key] = found
        return self._blocks[key]

    def kinds(self, options: Mapping[str, Any]) -> Mapping[str, str]:
        """Returns the kind of each block by its path: see `proof/signature.py`.

        Args:
            options: as of `blocks_of_a_run`.

        Raises:
            UnknownShapeError: as of `blocks`.
        """
        self._seen(options)
        return self._kinds[tuple(options.items())]

    def _seen(self, options: Mapping[str, Any]) -> Mapping[str, Block]:
        """What was found of the blocks, proven or not."""
        key = tuple(options.items())
        if key not in self._found:
            self._found[key] = self._watch(options)
        return self._found[key]

    def _proven_options(self) -> Mapping[str, Any] | None:
        """With which options the softmax was seen in a proof, None if there is no proof."""
        return None if self.proofs is None else self.proofs.showing()

    def block_around(self, path: str) -> Block | None:
        """Returns the block that a module is or is in, None if it is in none."""
        parts = path.split(".")
        for count in range(len(parts), 0, -1):
            block = ".".join(parts[:count])
            if block in self.paths:
                return self.blocks().get(block)
        return None

    @property
    def embedding(self) -> str | None:
        """The path of the embedding of tokens: of an encoder and a decoder, the encoder's.

        What those give for it may be a module that is never called, whose weights both share.
        """
        if len(self.stacks) > 1:
            module: Any = self._model.module
            with contextlib.suppress(Exception):  # some models refuse to be asked
                found = module.get_encoder().get_input_embeddings()
                if isinstance(found, nn.Embedding):
                    return self._path_to(found)
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

    def stack(self, name: str) -> Sequence[str] | str | None:
        """Returns the blocks that have a name; or why none have it, None if there are none.

        Args:
            name: "blocks" or "encoder_blocks".
        """
        if not self.stacks:
            return None
        if self.proofs is None:
            return self.stacks[-1 if name == "blocks" else 0]
        found = self.proofs.stack(name)
        if not isinstance(found, int):
            return found
        if found >= len(self.stacks):  # a config that lacks an attribute may hide a list
            return "its lists of blocks are others than those of the small model that was proven."
        return self.stacks[found]

    def number(self, name: str) -> int | str | None:
        """Returns a size of the model: "n_heads" and so on; or why it has none, or None."""
        paths = self.stack("blocks") or []
        if name == "n_layers" or isinstance(paths, str):
            return paths if isinstance(paths, str) else len(paths) or None
        if name == "vocab_size":
            logits = self.logits()
            if logits is not None and self.unembedding is not None:  # else they are of labels
                return logits.shape[-1]
            embedding = self.embedding
            module = self._model.modules[embedding] if embedding is not None else None
            return getattr(module, "num_embeddings", None)
        found = {_size(self.blocks()[path], name) for path in paths if path in self.blocks()}
        sizes = sorted(size for size in found if size is not None)
        if len(sizes) > 1:
            return f"its blocks differ in it: {', '.join(map(str, sizes))}."
        if sizes or name != "n_heads":
            return sizes[0] if sizes else None
        for path in paths:
            if path in self.blocks() and (why := self.blocks()[path].refused.get(name)):
                return why
        config = text_config(getattr(self._model.module, "config", None))
        count = said(config, "decoder_attention_heads", "num_attention_heads")
        return count if type(count) is int else None

    def say_eager(self) -> None:
        """Says once that runs will be with eager attention."""
        if not self._said_eager:
            self._said_eager = True
            warn_user(
                "Attention scores and patterns exist in eager attention only. Runs in which "
                "they are used have that in the place of the model's own implementation. "
                "`attn_implementation='eager'`, given where the model is made, says so for all.",
            )

    @contextmanager
    def quiet(self) -> Generator[None, None, None]:
        """Says nothing in its block of how runs will be: there is none."""
        said, self._said_eager = self._said_eager, True
        try:
            yield
        finally:
            self._said_eager = said

    def _path_of(self, getter: str) -> str | None:
        find = getattr(self._model.module, getter, None)
        wanted: nn.Module | None = None
        with contextlib.suppress(Exception):  # some models refuse to be asked
            wanted = find() if find else None
        return None if wanted is None else self._path_to(wanted)

    def _path_to(self, wanted: nn.Module) -> str | None:
        return next((path for path, part in self._model.modules.items() if part is wanted), None)

    def _watch(self, options: Mapping[str, Any]) -> Mapping[str, Block]:
        """Makes a forward and reads the anatomy of every block out of it."""
        flow = self._flow(dict(options))
        if flow is None:
            self._settle()
            flow = self._flow(dict(options))
        if flow is None:
            raise UnknownShapeError(_RESTLESS, here())
        modules = self._model.modules
        sizes, self.lengths = hidden_sizes(flow, self.paths, sample_lengths(self._config))
        experts = expert_counts(self._config)
        found: dict[str, Block] = {}
        for path, size in sizes.items():
            reading = Reading(flow, modules, size, self.lengths, *experts)
            block = block_of(reading, path, self.description.begins)
            if block is not None:
                found[path] = self.description.applied(block, flow)
        if self._after is None:
            head = self.unembedding
            norm = final_norm_of(flow, modules, self.paths, head)
            self._after = (norm, logits_of(flow, head))
        from insitu.models.proof.signature import signatures

        self._kinds[tuple(options.items())] = signatures(found, flow, modules)
        return found

    def _settle(self) -> None:
        """Lets the model exchange modules of its own, as the prompt of an open block makes it."""
        invocation, _ = innermost(self._model, 2)
        if invocation is not None and self._model.settle(invocation.call):
            vars(self).pop("proofs", None)  # they are made anew

    def _flow(self, options: dict[str, Any]) -> Dataflow | None:
        """The dataflow of a small forward; None if the model exchanges modules of its own in it."""
        model = self._model
        call = self.sample()
        if call is None:
            raise UnknownShapeError(
                "What the parts of this model are is not known, because it is not known what it "
                "is called with."
            )
        # What other implementations do is not seen; what stands before and after is the same.
        implementation = options.pop(OPTION, "eager" if self.is_unusual else None)
        call = Call(call.args, {**call.kwargs, **options})
        failure: Exception | None = None
        with model.in_use(), attending(model.module, implementation):
            # Some models want to know what their tokens or masks say. One with weights is run on
            # data last: it may compute otherwise there, and be of another kind than without them.
            attempts = [(True, False), (True, True), (False, False)]
            for fake, contents in attempts if model.loaded else attempts[:2]:
                module, modules = model.without_data if fake else (model.module, model.modules)
                if not fake:
                    placed = self.placed_sample()
                    assert placed is not None
                    call = Call((), {**placed.kwargs, **options})
                try:
                    flow = watch(module, modules, call, fake, caches=CACHES, contents=contents)
                    return None if model.snapshot.has_changed() else flow
                except Exception as error:  # whatever a model makes of the call, or of no data
                    failure = error
        raise UnknownShapeError(
            f"What the parts of this model are cannot be found out ({type(failure).__name__}: "
            f"{failure}){'' if model.loaded else ' before its weights are there: load it first'}.",
            here(),
        ) from failure


def _size(block: Block, name: str) -> int | None:
    """A size of a block, None if it has none."""
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


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
