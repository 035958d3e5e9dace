"""What runs need to know of a language model: looked up once, and again when its module changes."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from insitu.batching.cost_model import Costs
from insitu.engine.tree import Tree
from insitu.models.blocks import block_views
from insitu.models.estimates import bytes_per_token, estimated_costs, weight_of
from insitu.models.options import Options
from insitu.models.placement import Placement
from insitu.models.reader import Reader
from insitu.models.rotary import LengthDependence, growing_parts, length_dependence
from insitu.models.tokens import decoder_start, decodes, limits_of, padding

if TYPE_CHECKING:
    from insitu.batching.shared_blocks import Chain
    from insitu.engine.fallback import Fallback
    from insitu.models.padding_trial import Padding
    from insitu.models.separation import Separation


class LanguageTraits:
    """What runs need to know of a language model's module.

    Args:
        module: the wrapped module, with or without weights.
        config: the model's config.
        tree: the module's tree.
        stacks: the paths of its lists of blocks.
        loaded: whether the weights are in memory.
        tokenizer: what reads text, None if there is nothing.
        processor: what reads media with text, None if there is nothing.

    Attributes:
        tokenizer: what reads text, None if there is nothing.
        reader: makes token ids of prompts.
        options: says which keyword arguments a run takes.
        placement: where token ids have to be.
        pad_id: the token with which prompts are padded.
        is_encoder_decoder: whether it has a decoder that reads what an encoder gives.
        decoder_start: the token with which that decoder begins, None if there is none.
        generating: the path of the module that generates, where an adapter is around it.
        unembedding_paths: the paths of the layer that makes logits, none if there is no such layer.
        block_views: how outputs of blocks are shown, by path, with a cache and without.
        forward_parameters: what the forward takes.
        takes_use_cache: whether `use_cache` is among it.
        growing: the modules that keep something of the longest prompt so far.
        lengths: how values depend on the length of a prompt.
        separations: how values are cut out of batches, as far as that was tried.
        chains: at which blocks forwards can begin, as far as that was tried.
        paddings: how it is padded, by implementation of attention, as far as that was tried.
        padded_generations: why padding shows in a generation, as far as that was tried.
    """

    def __init__(
        self,
        module: Any,
        config: Any,
        tree: Tree,
        stacks: Collection[str],
        loaded: bool,
        tokenizer: Any,
        processor: Any,
    ) -> None:
        self._module, self._tree = module, tree
        self.tokenizer = tokenizer
        self._costs: Costs | None = None
        embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
        self.pad_id = padding(module, config)
        self.options = options = Options(module)
        self.reader = Reader(
            tokenizer,
            limits_of(module, config),
            self.pad_id,
            weight_of(embedding).device.type == "cpu",
            processor,
            None if processor is None else module.dtype,
            lambda: options.forward is None or "token_type_ids" in options.forward,
        )
        self.placement = Placement(embedding, loaded)
        self.is_encoder_decoder = decodes(module, config)
        self.decoder_start = decoder_start(module, config)
        generating = module.get_base_model() if hasattr(module, "get_base_model") else module
        self.generating = next(path for path, part in tree.modules.items() if part is generating)
        self.unembedding_paths: Sequence[str] = (
            [path for path, part in tree.modules.items() if part is head] if head else []
        )
        self.block_views: Mapping[bool, dict[str, Any]] = {
            cached: block_views(module, config, cached, stacks) for cached in (True, False)
        }
        self.forward_parameters = _parameters_of(module)
        self.takes_use_cache = "use_cache" in self.forward_parameters
        self.growing: Sequence[nn.Module] = growing_parts(module)
        self.lengths: LengthDependence = length_dependence(module)
        self.separations: dict[tuple[str, bool], Separation | Fallback] = {}
        self.chains: dict[Hashable, Chain | Fallback] = {}
        self.paddings: dict[Any, Padding] = {}
        self.padded_generations: dict[Any, str | None] = {}

    @property
    def costs(self) -> Costs:
        """What passes cost."""
        if self._costs is None:
            blocks = tuple(self.block_views[False])
            device = self.placement.device
            self._costs = estimated_costs(self._module, self._tree.modules, blocks, device)
        return self._costs

    @property
    def bytes_per_token(self) -> int:
        """How much memory a forward needs for a token, about."""
        return bytes_per_token(self._module)

    def keep_trials(self, other: LanguageTraits) -> None:
        """Takes what was tried with a model of the same module.

        Args:
            other: the traits of that model.
        """
        self.separations, self.paddings = other.separations, other.paddings
        self.padded_generations = other.padded_generations

    def keep_views(self, before: LanguageTraits) -> None:
        """Tells blocks that are open how outputs are shown from now on.

        Args:
            before: the traits of the module as it was.
        """
        for cached, views in before.block_views.items():  # blocks that are open have these
            views.clear()
            views.update(self.block_views[cached])


def _parameters_of(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of a module's forward, and of what it passes the others on to."""
    own = inspect.signature(module.forward).parameters
    passes_on = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in own.values())
    inner: Any = getattr(module, "get_base_model", None)  # of a module of PEFT
    if not passes_on or inner is None:
        return own
    return {**inspect.signature(inner().forward).parameters, **own}
