"""TransformerLens's hook names: what each of them is here.

They mean what they mean in a TransformerLens model whose weights are as they were trained, with
its order of axes: heads come third. A name that TransformerLens has and that stands for nothing
here says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from insitu.graph.errors import nearest
from insitu.graph.node import Kind
from insitu.models.body import Body
from insitu.models.keys import HOOK_PLACES, entry_of, layers
from insitu.models.norms import Normalised, Scale, norm_of
from insitu.models.parts import Block, Heads, Spot
from insitu.tracing.forms import Apart, Form, PerHead, Rows, Split, Swapped
from insitu.tracing.named import Named
from insitu.tracing.vocabulary import Entry, Missing, Role, Vocabulary


@dataclass(frozen=True, slots=True)
class Standard:
    """A hook for what has a standard name.

    Attributes:
        key: the name, in the block or in the model.
        heads_third: whether its second and third axis are the other way round.
    """

    key: str
    heads_third: bool = False


@dataclass(frozen=True, slots=True)
class Unrotated:
    """A hook for queries, keys or values as they are projected: before rotation and norms.

    Attributes:
        letter: which.
    """

    letter: str


@dataclass(frozen=True, slots=True)
class Rotated:
    """A hook for queries or keys as they are multiplied, where that is something else.

    Attributes:
        letter: which.
    """

    letter: str


@dataclass(frozen=True, slots=True)
class OfLayer:
    """A hook for what a layer is given or gives.

    Attributes:
        layer: which layer: see `TransformerLens.path`.
        kind: which value.
    """

    layer: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class OfNorm:
    """A hook inside of a norm.

    Attributes:
        norm: which norm.
        form: the form that shows its value.
    """

    norm: str
    form: type[Scale] | type[Normalised]


@dataclass(frozen=True, slots=True)
class Absent:
    """A hook that there is in TransformerLens only.

    Attributes:
        reason: why, and what to write instead.
    """

    reason: str


Meaning = Standard | Unrotated | Rotated | OfLayer | OfNorm | Absent

_SPLIT = Absent("inputs are not copied for q, k and v: write `block.norm_1.input`, or q, k and v.")
_TABLES = Absent("the tables of rotary embeddings are no activation of a block.")


def _norm(hook: str, norm: str) -> dict[str, Meaning]:
    return {
        f"{hook}.hook_in": OfLayer(norm, "input"),
        f"{hook}.hook_scale": OfNorm(norm, Scale),
        f"{hook}.hook_normalized": OfNorm(norm, Normalised),
        f"{hook}.hook_out": OfLayer(norm, "output"),
    }


OF_MODEL: Mapping[str, Meaning] = {
    "hook_embed": Standard("embedding.output"),
    "embed.hook_out": Standard("embedding.output"),
    "hook_pos_embed": OfLayer("positions", "output"),
    "pos_embed.hook_out": OfLayer("positions", "output"),
    **_norm("ln_final", "final_norm"),
    "unembed.hook_in": OfLayer("unembedding", "input"),
    "unembed.hook_out": OfLayer("unembedding", "output"),
    "hook_unembed": OfLayer("unembedding", "output"),
    "hook_tokens": Absent("token ids are no activation: `invoker.ids` has them."),
    "rotary_emb.hook_cos": _TABLES,
    "rotary_emb.hook_sin": _TABLES,
}
"""The hooks of a model."""

OF_BLOCK: Mapping[str, Meaning] = {
    "hook_resid_pre": Standard("residual_in"),
    "hook_in": Standard("residual_in"),
    **_norm("ln1", "norm_1"),
    "attn.hook_in": OfLayer("attention", "input"),
    "attn.hook_q": Unrotated("q"),
    "attn.hook_k": Unrotated("k"),
    "attn.hook_v": Unrotated("v"),
    "attn.q.hook_in": OfLayer("q", "input"),
    "attn.k.hook_in": OfLayer("k", "input"),
    "attn.v.hook_in": OfLayer("v", "input"),
    "attn.q.hook_out": Unrotated("q"),
    "attn.k.hook_out": Unrotated("k"),
    "attn.v.hook_out": Unrotated("v"),
    "attn.hook_rot_q": Rotated("q"),
    "attn.hook_rot_k": Rotated("k"),
    "attn.hook_attn_scores": Standard("attention.scores"),
    "attn.hook_pattern": Standard("attention.pattern"),
    "attn.hook_z": Standard("attention.z", heads_third=True),
    "attn.o.hook_in": Standard("attention.z", heads_third=True),
    "attn.hook_result": Standard("attention.result", heads_third=True),
    "attn.o.hook_out": OfLayer("o", "output"),
    "attn.hook_out": OfLayer("o", "output"),
    "hook_attn_out": Standard("attention_out"),
    "hook_resid_mid": Standard("residual_mid"),
    **_norm("ln2", "norm_2"),
    "hook_mlp_in": OfLayer("norm_2", "input"),
    "mlp.hook_in": OfLayer("mlp", "input"),
    "mlp.hook_pre": Standard("mlp.pre"),
    "mlp.hook_pre_linear": OfLayer("pre_linear", "output"),
    "mlp.hook_post": Standard("mlp.post"),
    "mlp.out.hook_in": Standard("mlp.post"),
    "mlp.out.hook_out": OfLayer("mlp_out", "output"),
    "mlp.hook_out": OfLayer("mlp_out", "output"),
    "hook_mlp_out": Standard("mlp_out"),
    "hook_resid_post": Standard("residual_out"),
    "hook_out": Standard("residual_out"),
    "hook_attn_in": _SPLIT,
    "hook_q_input": _SPLIT,
    "hook_k_input": _SPLIT,
    "hook_v_input": _SPLIT,
    "attn.hook_cos": _TABLES,
    "attn.hook_sin": _TABLES,
    "ln1_post.hook_out": Absent("what it gives is `hook_attn_out`."),
    "ln2_post.hook_out": Absent("what it gives is `hook_mlp_out`."),
}
"""The hooks of a block, behind `blocks.3.`."""


class TransformerLens:
    """The hook names of a model.

    Args:
        body: the facts of the model's parts.
        vocabulary: the model's standard names.

    Attributes:
        vocabulary: as given.
    """

    def __init__(self, body: Body, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._body = body

    def names(self) -> Iterator[str]:
        """Gives all names that there can be in the model."""
        yield from OF_MODEL
        for layer in range(layers(self.vocabulary)):
            for name in OF_BLOCK:
                yield f"blocks.{layer}.{name}"

    def spelled(self, name: str) -> str | None:
        """Returns the hook of a block that a short name means, such as "resid_post" or "hook_z"."""
        places = (f"{place}{name.removeprefix('hook_')}" for place in HOOK_PLACES)
        return next((hook for hook in places if hook in OF_BLOCK), None)

    def near(self, name: str) -> str:
        """Returns the names that are nearest to one, or why none is, as a part of a message."""
        block, _, _ = name.removeprefix("blocks.").partition(".")
        count = layers(self.vocabulary)
        if name.startswith("blocks.") and block.isdecimal() and int(block) >= count:
            return f": there is no block {block}, since the model has {count}, 0 to {count - 1}"
        return nearest(name, self.names())

    def entry(self, name: str) -> Entry | None:
        """Returns what a name stands for, None if it is no hook name of this model.

        Args:
            name: such as "blocks.3.attn.hook_z".
        """
        meaning, block = self._meaning(name)
        if meaning is None:
            return None
        if isinstance(meaning, Absent):
            return Missing(meaning.reason)
        if isinstance(meaning, Standard):
            return self._standard(name, meaning)
        if isinstance(meaning, OfNorm):
            return self._of_norm(meaning, block)
        if isinstance(meaning, OfLayer):
            return self._of_layer(meaning, block)
        heads = None if block is None else block.attention
        if heads is None:
            return Missing("there is no attention in this block.")
        if isinstance(meaning, Rotated):
            if meaning.letter in heads.projected:
                return Missing(
                    "nothing is done to it after its projection: see `hook_q`, `hook_k`."
                )
            return self._standard(name, Standard(f"attention.{meaning.letter}", True))
        return self._unrotated(name, heads, meaning.letter)

    def standard(self, name: str) -> Standard | None:
        """Returns the key that a name is another word for, None if there is none.

        Args:
            name: the hook name.
        """
        meaning, block = self._meaning(name)
        heads = None if block is None else block.attention
        if isinstance(meaning, Unrotated | Rotated) and heads is not None:
            projected = meaning.letter in heads.projected
            if projected is isinstance(meaning, Unrotated):
                meaning = Standard(f"attention.{meaning.letter}", heads_third=True)
        if not isinstance(meaning, Standard):
            return None
        return replace(meaning, key=_inside(name) + meaning.key)

    @cached_property
    def aliases(self) -> Mapping[str, tuple[str, bool]]:
        """The key of each name that is another word for one, and whether its axes are swapped."""
        found = {name: self.standard(name) for name in self.names()}
        return {name: (one.key, one.heads_third) for name, one in found.items() if one is not None}

    def _meaning(self, name: str) -> tuple[Meaning | None, Block | None]:
        if not name.startswith("blocks."):
            return OF_MODEL.get(name), None
        number, _, rest = name.removeprefix("blocks.").partition(".")
        if not number.isdecimal() or int(number) >= layers(self.vocabulary):
            return None, None
        path = self._body.stacks[-1][int(number)]
        return OF_BLOCK.get(rest), self._body.blocks().get(path)

    def _standard(self, name: str, meaning: Standard) -> Entry | None:
        entry = entry_of(self.vocabulary, _inside(name) + meaning.key)
        if not meaning.heads_third or not isinstance(entry, Named):
            return entry
        return replace(entry, form=_heads_third(entry.form))

    def _unrotated(self, name: str, heads: Heads, letter: str) -> Entry | None:
        if letter in heads.projected:
            return self._standard(name, Standard(f"attention.{letter}", True))
        spot = heads.raw.get(letter)
        if spot is not None:
            swapped = spot.shape[2] in self._body.lengths
            return Named(spot.path, spot.kind, spot.call, spot.item, Swapped() if swapped else None)
        path, there = heads.projections.get(letter), _spot(heads, letter)
        if path is None or list(heads.projections.values()).count(path) > 1 or there is None:
            return Missing(f"its {letter} cannot be told apart before it is rotated.")
        count = there.shape[2 if there.shape[1] in self._body.lengths else 1]
        return Named(path, "output", form=Apart(count))

    def _of_layer(self, meaning: OfLayer, block: Block | None) -> Entry:
        path = self._path(meaning.layer, block)
        if path is None:
            return Missing("this model has no such layer of its own.")
        heads = None if block is None else block.attention
        if heads is not None and list(heads.projections.values()).count(path) > 1:
            return Missing("q, k and v are made by one layer here: see `attn.hook_in`.")
        return Named(path, meaning.kind, form=_of_rows(meaning.layer, block))

    def _of_norm(self, meaning: OfNorm, block: Block | None) -> Entry:
        path = self._path(meaning.norm, block)
        if path is None:
            return Missing("there is no such norm.")
        width = self._body.number("d_model") if block is None else block.width
        norm = norm_of(self._body.model.modules[path], path, width if type(width) is int else 0)
        if norm is None:
            return Missing(f"what the norm at {path!r} computes inside is not known.")
        return Named(path, "output", form=meaning.form(norm))

    def _path(self, layer: str, block: Block | None) -> str | None:
        """The path of a layer of the model, or of a block."""
        if block is None:
            if layer == "positions":
                return position_embedding(self._body)
            entry = self.vocabulary.entry("", "", layer)
            return entry.path if isinstance(entry, Role) else None
        heads, mlp = block.attention, block.mlp
        if layer in ("norm_1", "norm_2"):
            if len(block.norms) < int(layer[-1]):
                return None
            return block.norms[0 if layer == "norm_1" else -1]
        if layer in ("mlp", "pre_linear", "mlp_out"):
            if mlp is None:
                return None
            return {"mlp": mlp.path, "pre_linear": mlp.gate, "mlp_out": mlp.out}[layer]
        if heads is None:
            return None
        if layer in ("attention", "o"):
            return heads.path if layer == "attention" else heads.out
        return heads.projections.get(layer)


def position_embedding(body: Body) -> str | None:
    """Returns the path of the embedding of positions: another one than that of tokens, as long.

    Args:
        body: the facts of the model's parts.
    """
    length = getattr(body.model.module.config, "max_position_embeddings", None)
    for path, module in body.model.modules.items():
        rows = getattr(module, "num_embeddings", 0)
        if length and length <= rows <= length + 8 and path != body.embedding:
            return path
    return None


def _inside(name: str) -> str:
    """The beginning of a key that is about what a hook name is about."""
    return ".".join([*name.split(".")[:2], ""]) if name.startswith("blocks.") else ""


def _heads_third(form: Form | None) -> Form | None:
    """The form in which heads come third, from that in which they come second."""
    if isinstance(form, Split):
        return Apart(form.heads)
    if isinstance(form, PerHead):
        return replace(form, axis=2)
    return None if isinstance(form, Swapped) else Swapped()


def _of_rows(layer: str, block: Block | None) -> Form | None:
    """The form of what a layer of an MLP gives, where it sees rows and positions as one."""
    if block is None or block.mlp is None or layer not in ("mlp_out", "pre_linear"):
        return None
    post = block.mlp.post
    if post is None or len(post.shape) != 2:
        return None
    return Rows(block.path, block.width if layer == "mlp_out" else post.shape[1])


def _spot(heads: Heads, letter: str) -> Spot | None:
    return {"q": heads.q, "k": heads.k, "v": heads.v}[letter]
