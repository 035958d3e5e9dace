"""The standard names of a Transformers model: which site each of them is.

What there is comes from the anatomy of the model's blocks; here it gets its name, and the form in
which it is shown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from insitu.graph.errors import InsituError
from insitu.models.parts import Block, Feedforward, Heads, Spot
from insitu.models.read_weights import for_reading, layer_of
from insitu.models.weights import Weights
from insitu.tracing.forms import Batched, Form, PerHead, Rows, Split, Swapped, WithoutLast
from insitu.tracing.named import Named
from insitu.tracing.vocabulary import Entry, Given, Missing, Role, Roles, Vocabulary

if TYPE_CHECKING:
    from insitu.models.body import Body
    from insitu.models.endings import Endings
    from insitu.models.transformer_lens import TransformerLens

_STREAM = ("residual_in", "residual_mid", "residual_out")
_RETURNED = "block_out"
_ADDED = ("attention_out", "cross_attention_out", "mlp_out", "mixer_out", "extra_out")
_ROLES = ("attention", "cross_attention", "mlp", "experts", "norm_1", "norm_2")
_HEADS = ("q", "k", "v", "scores", "pattern", "z", "result", "W_Q", "W_K", "W_V", "W_O")
_MLP = ("pre", "post", "W_in", "W_out", "W_gate")
_EXPERTS = ("router", "weights")
_MODEL = (
    *("blocks", "encoder_blocks", "embedding", "final_norm", "unembedding", "logits"),
    *("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "vocab_size", "W_E", "W_U"),
)

_NORMALISED = (
    "what this block returns is no sum of what it is given and what it adds: such as where the sum "
    "is normalised, so that nothing in the block is the residual stream. The hidden states that it "
    "returns are `block_out`."
)
_UNSEEN = Missing(
    "names are found in a forward of the model, of text if it takes text, and this block has no "
    "part in that: use the paths of its own modules."
)
_NO_BLOCKS = "this model has no list of blocks."
_NO_ENCODER = "this model has no encoder of its own."
_NO_ATTENTION = "there is no attention in this block."
_NO_CROSS_ATTENTION = "nothing in this block attends to states of an encoder."


class Names(Vocabulary):
    """The standard names of a model.

    Args:
        body: the facts of the model's parts.

    Attributes:
        weights: the weights of its parts.
    """

    names = frozenset((*_STREAM, _RETURNED, *_ADDED, *_ROLES, *_HEADS, *_MLP, *_EXPERTS, *_MODEL))

    def __init__(self, body: Body) -> None:
        self._body = body
        self.weights = Weights(body)
        self._listed: dict[tuple[str, str], Mapping[str, Entry | Later]] = {}

    @property
    def body(self) -> Body:
        """The facts of the model's parts."""
        return self._body

    @cached_property
    def endings(self) -> Endings:
        """What the model makes of what leaves its blocks; it loads the model, if it is here."""
        from insitu.models.endings import find_endings  # most never ask

        return find_endings(self._body)

    @cached_property
    def hooks(self) -> TransformerLens:
        """TransformerLens's names of the same values."""
        from insitu.models.transformer_lens import TransformerLens  # most never ask

        return TransformerLens(self._body, self)

    def entry(self, path: str, part: str, name: str) -> Entry | None:
        """Returns what a name stands for at a module, None if it is none of its names."""
        if name not in self.names:
            return None
        found = self.listed(path, part).get(name)
        if isinstance(found, Later):
            return found.entry()
        return found

    def listed(self, path: str, part: str) -> Mapping[str, Entry | Later]:
        """Returns the names of a module, some of them to be found when they are asked for."""
        key = (path, part)
        if key not in self._listed:
            self._listed[key] = self._list(path, part)
        return self._listed[key]

    def line_instead(self, path: str, name: str) -> str:
        """Returns the line to write for another library's word, as the end of a message."""
        from insitu.models.spellings import line_instead  # only errors ask for it
        from insitu.models.weights_instead import weight_instead

        with contextlib.suppress(InsituError), self.quiet():
            found = weight_instead(self._body, self.weights, path, name)
            return found or line_instead(self.hooks, path, name)
        return ""  # its parts cannot be found out

    def whereabouts(self) -> str:
        """Returns where the model's blocks are, as the end of a message."""
        from insitu.models.spellings import whereabouts

        with contextlib.suppress(InsituError), self.quiet():
            return whereabouts(self)
        return ""

    def unfused(self) -> Mapping[str, Any]:
        """Returns how the model has to run for its attention to be no one fused function."""
        return self._body.softmax.options

    def verify(self, options: Mapping[str, Any]) -> bool:
        """Returns whether runs with some options compute what others do."""
        return self._body.softmax.agrees(options)

    def quiet(self) -> AbstractContextManager[None]:
        """Returns a context in which names are only looked up, and nothing is said of runs."""
        return self._body.quiet()

    def _list(self, path: str, part: str) -> Mapping[str, Entry | Later]:
        if not path:
            return self._of_model()
        block = self._body.block_around(path)
        if block is None:
            unknown = path in self._body.paths
            named = (*_STREAM, _RETURNED, *_ADDED, *_ROLES)
            return dict.fromkeys(named, _UNSEEN) if unknown else {}
        if part == "mlp":
            return {**self._of_mlp(block), **self._of_experts(block)}
        if part == "experts":
            return self._of_experts(block)
        if path == block.path:
            return self._of_block(block)
        for heads in (block.attention, block.cross_attention):
            if heads is not None and f"{heads.path}.".startswith(f"{path}."):
                return self._of_heads(block, heads)
        mlp = block.mlp
        if mlp is not None and mlp.path == path:
            return {**self._of_mlp(block), **self._of_experts(block)}
        return {}

    # Of a block

    def _of_block(self, block: Block) -> Mapping[str, Entry]:
        found: dict[str, Entry] = {}
        for name in _STREAM:
            spot = block.stream.get(name)
            if spot is not None:
                found[name] = self._site(block, spot)
            elif name in block.refused:
                found[name] = Missing(block.refused[name])
            elif block.stream:
                found[name] = Missing(
                    "nothing is added to the residual stream between two parts of this block."
                )
            else:
                found[name] = Missing(_NORMALISED)
        if _RETURNED in block.refused:
            found[_RETURNED] = Missing(block.refused[_RETURNED])
        else:
            found[_RETURNED] = Named(block.path, "output", 0, (0,))
        for name in _ADDED:
            spot = block.added.get(name)
            if spot is not None:
                found[name] = self._site(block, spot)
            else:
                found[name] = Missing(self._why_not_added(block, name))
        for name, heads, none in (
            ("attention", block.attention, _NO_ATTENTION),
            ("cross_attention", block.cross_attention, _NO_CROSS_ATTENTION),
        ):
            none = block.refused.get(name, none)
            found[name] = Missing(none) if heads is None else Role(heads.path, "heads")
        mlp = block.mlp
        if mlp is None:
            none = "no MLP adds to the residual stream in this block."
            found["mlp"] = Missing(block.refused.get("mlp", none))
        else:
            found["mlp"] = Role(mlp.path or block.path, "mlp", mlp.path is not None)
        if mlp is None or mlp.router is None:
            none = "there are no experts in this block."
            found["experts"] = Missing(block.refused.get("experts", none))
        else:
            found["experts"] = Role(mlp.path or block.path, "experts", mlp.path is not None)
        norms = block.norms
        few = Missing(f"this block has {len(norms)} norm{'s' * (len(norms) != 1)}.")
        found["norm_1"] = Role(norms[0]) if norms else few
        found["norm_2"] = Role(norms[-1]) if len(norms) > 1 else few
        return found

    def _why_not_added(self, block: Block, name: str) -> str:
        if name in block.refused:
            return block.refused[name]
        if not block.stream and not block.added:
            return _NORMALISED
        if name == "attention_out" and block.attention is None:
            return _NO_ATTENTION
        if name == "cross_attention_out" and block.cross_attention is None:
            return _NO_CROSS_ATTENTION
        there = ", ".join(f"`{other}`" for other in block.added) or "nothing that has a name"
        return f"what this block adds to what it is given is {there}."

    def _site(self, block: Block, spot: Spot) -> Named:
        form: Form | None = None
        if len(spot.shape) == 2:
            form = Rows(block.path, spot.shape[-1])
        return Named(spot.path, spot.kind, spot.call, spot.item, form)

    # Of attention

    def _of_heads(self, block: Block, heads: Heads) -> Mapping[str, Entry | Later]:
        role = "attention" if heads is block.attention else "cross_attention"
        found = self._found_of_heads(block, heads)
        return {**found, **_refused(block, role, found)}

    def _found_of_heads(self, block: Block, heads: Heads) -> Mapping[str, Entry | Later]:
        found: dict[str, Entry | Later] = {}
        for name in ("q", "k", "v"):
            spot: Spot | None = getattr(heads, name)
            if spot is None:
                found[name] = Missing("it has no axis of heads.")
            elif spot.kind == "output":
                found[name] = self._with_heads(spot)
                if heads is block.cross_attention and name != "q":
                    found[name] = replace(self._with_heads(spot), once=True)
            else:  # where it is used depends on the implementation
                found[name] = Later(partial(self._in_eager, block, heads, name))
        for name in ("scores", "pattern"):
            found[name] = Later(partial(self._in_eager, block, heads, name))
        z = heads.z
        if z is None or not heads.count or heads.out is None:
            none = Missing("its heads go into no output projection.")
            found.update(z=none, result=none)
        else:
            found["z"] = Named(z.path, z.kind, z.call, z.item, Split(heads.count))
            form = PerHead(heads.out, z.call, heads.count)
            found["result"] = Named(heads.out, "output", z.call, (), form)
        weights = self.weights
        for name in ("W_Q", "W_K", "W_V", "W_O"):
            found[name] = Later(partial(self._weight, weights.of_heads, block, heads, name))
        return found

    def _with_heads(self, spot: Spot) -> Named:
        swapped = spot.shape[2] not in self._body.lengths
        return Named(spot.path, spot.kind, spot.call, spot.item, Swapped() if swapped else None)

    def _in_eager(self, block: Block, heads: Heads, name: str) -> Entry:
        """What the implementation of attention has a part in; with eager attention, if need be."""
        options: tuple[tuple[str, Any], ...] = ()
        spot: Spot | None = getattr(heads, name)
        if heads.pattern is None or self._body.is_unusual:
            spot = self._eager(block, heads, name)
            if spot is None:
                return Missing(
                    "it cannot be seen as the model runs, and with eager attention that is "
                    "switched to it computes something else, or does not run. Give "
                    "`attn_implementation='eager'` where the model is made."
                )
            options = tuple(self._body.softmax.options.items())
            self._body.say_eager()
        if spot is None:
            return Missing("it cannot be told apart.")
        if name not in ("scores", "pattern"):
            return replace(self._with_heads(spot), options=options)
        form: Form | None = None
        if len(spot.shape) == 3:
            form = Batched(heads.count)
        elif len(spot.shape) == 4 and spot.shape[-1] not in self._body.lengths:
            form = WithoutLast(1)  # a sink, to which every query may attend
        return Named(spot.path, spot.kind, spot.call, spot.item, form, options)

    def _eager(self, block: Block, heads: Heads, name: str) -> Spot | None:
        options = self._body.softmax.options
        other = self._body.blocks_of_a_run(options).get(block.path) if options else None
        for found in (other.attention, other.cross_attention) if other else ():
            if found is not None and found.path == heads.path:
                return getattr(found, name)
        return None

    # Of an MLP

    def _of_mlp(self, block: Block) -> Mapping[str, Entry | Later]:
        found = self._found_of_mlp(block)
        return {**found, **_refused(block, "mlp", found)}

    def _found_of_mlp(self, block: Block) -> Mapping[str, Entry | Later]:
        mlp = block.mlp
        assert mlp is not None
        found: dict[str, Entry | Later] = {}
        for name in ("pre", "post"):
            spot: Spot | None = getattr(mlp, name)
            if spot is not None:
                found[name] = self._site(block, spot)
            elif mlp.router is not None:
                found[name] = Missing("its MLP consists of experts: see `experts`.")
            else:
                found[name] = Missing("no nonlinearity stands between its layers.")
        weights = self.weights
        for name in ("W_in", "W_out", "W_gate"):
            found[name] = Later(partial(self._weight, weights.of_mlp, block, mlp, name))
        return found

    def _of_experts(self, block: Block) -> Mapping[str, Entry]:
        mlp = block.mlp
        found: dict[str, Entry] = {}
        for name in _EXPERTS:
            spot: Spot | None = None if mlp is None else getattr(mlp, name)
            if spot is None:
                found[name] = Missing("there are no experts in it.")
            else:
                found[name] = self._site(block, spot)
        return {**found, **_refused(block, "experts", found)}

    # Of the model

    def _of_model(self) -> Mapping[str, Entry | Later]:
        body = self._body
        refused = {} if body.proofs is None else body.proofs.of_whole()
        found: dict[str, Entry | Later] = {}
        for name, none in (("blocks", _NO_BLOCKS), ("encoder_blocks", _NO_ENCODER)):
            paths = body.stack(name) if name == "blocks" or len(body.stacks) > 1 else None
            if paths is None or isinstance(paths, str):
                found[name] = Missing(paths or none)
            else:
                found[name] = Roles(tuple(paths))
        for name in ("embedding", "unembedding"):
            path = getattr(body, name)
            found[name] = Role(path) if path else Missing(f"this model has no {name}.")
        found["final_norm"] = Later(self._final_norm)
        found["logits"] = Later(self._logits)
        for name in ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "vocab_size"):
            found[name] = Later(partial(self._number, name))
        for name, find, path in (
            ("W_E", self.weights.embedding, body.embedding),
            ("W_U", self.weights.unembedding, body.unembedding),
        ):
            found[name] = Later(lambda n=name, f=find, p=path: for_reading(body.model, f(), n, p))
        if isinstance(refused, str):
            return dict.fromkeys(found, Missing(refused))
        others = refused.keys() & found.keys() - {"blocks", "encoder_blocks"}
        return {**found, **{name: Missing(refused[name]) for name in others}}

    def _weight(
        self, find: Callable[..., Any], block: Block, part: Heads | Feedforward, name: str
    ) -> Entry:
        return for_reading(self._body.model, find(block, part, name), name, layer_of(part, name))

    def _final_norm(self) -> Entry:
        path = self._body.final_norm()
        return Role(path) if path else Missing("no norm stands before its unembedding.")

    def _logits(self) -> Entry:
        spot = self._body.logits()
        if spot is None:
            kind = type(self._body.model.module).__name__
            return Missing(
                f"a {kind} gives no logits: its values are read where they are, as "
                "`residual_out` or `block_out` of a block, or in `model.output`."
            )
        return Named(spot.path, spot.kind, spot.call, spot.item)

    def _number(self, name: str) -> Entry:
        number = self._body.number(name)
        if isinstance(number, str):
            return Missing(number)
        if number is None:
            return Missing(_NO_BLOCKS if name == "n_layers" else "its config does not say.")
        return Given(number)


def _refused(block: Block, role: str, found: Mapping[str, Any]) -> Mapping[str, Missing]:
    """Those of some names that were refused, and why."""
    reasons = {name: block.refused.get(f"{role}.{name}") for name in found}
    return {name: Missing(why) for name, why in reasons.items() if why is not None}


class Later:
    """An entry that is found when it is asked for."""

    def __init__(self, entry: Callable[[], Entry]) -> None:
        self.entry = entry
