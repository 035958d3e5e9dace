"""What a transformer block consists of, as plain data: sites by their role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from insitu.graph.node import Kind


@dataclass(frozen=True, slots=True)
class Spot:
    """A value of a forward, as a site: where it can be read and written.

    Attributes:
        path: the module's path, or that of a function in its forward.
        kind: which of its values.
        call: which of its calls.
        item: where in that value, if it is a structure.
        shape: of the value, in the forward that was watched.
    """

    path: str
    kind: Kind
    call: int
    item: tuple[int | str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Heads:
    """What a block's attention works with.

    Attributes:
        path: the module in whose forward the attention is computed.
        q: the queries, in the form that they first have with an axis of heads.
        k: the keys in the same form, before they are repeated or cached.
        v: the values, in the same form.
        raw: the same of q, k and v before the rotary embedding and norms, where they can be told.
        scores: what goes into the softmax; None where no softmax can be seen.
        pattern: what comes out of it.
        z: what goes into the output projection.
        projections: the linear layers that make q, k and v.
        out: the output projection.
        count: how many query heads.
        size: how many numbers a head of `z` has.
        projected: those of q, k and v that are just what their layers made, and nothing done to it.
    """

    path: str
    q: Spot | None
    k: Spot | None
    v: Spot | None
    raw: Mapping[str, Spot]
    scores: Spot | None
    pattern: Spot | None
    z: Spot | None
    projections: Mapping[str, str]
    out: str | None
    count: int
    size: int
    projected: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Feedforward:
    """What a block's MLP works with.

    Attributes:
        path: the module, None if its layers are the block's own.
        pre: what goes into the nonlinearity.
        post: what goes into the last linear layer.
        into: the linear layer that makes `pre`.
        gate: where there is a gate, the layer that it is multiplied with; None if there is none.
        out: the last linear layer.
        router: the scores of experts; None if there are none.
        weights: the weights of the experts that were chosen.
    """

    path: str | None
    pre: Spot | None = None
    post: Spot | None = None
    into: str | None = None
    gate: str | None = None
    out: str | None = None
    router: Spot | None = None
    weights: Spot | None = None


@dataclass(frozen=True, slots=True)
class Summed:
    """A sum in a block that normalises what it adds up.

    Attributes:
        added: the names of the values that are added to what the block is given, or to what the
            norm before has returned.
        norm: the norm that the sum goes into; None if the block returns it.
        call: which of its calls.
    """

    added: tuple[str, ...]
    norm: str | None = None
    call: int = 0


@dataclass(frozen=True, slots=True)
class Block:
    """What a transformer block consists of.

    Attributes:
        path: its path.
        width: the length of the last axis of its hidden states.
        stream: the residual stream by name: `residual_in`, `residual_mid` and `residual_out`.
        added: the values added to it by name: `attention_out`, `cross_attention_out`, `mlp_out`, of
            a state-space block `mixer_out`, and those added behind these as `extra_out`.
        norms: the norms, in the order of their outputs' use.
        attention: its attention.
        cross_attention: its attention to an encoder's states.
        mlp: its MLP.
        refused: why names are not given, though something was found for them: "attention.z".
        summed: of a block that normalises its sums these, in order; none of others.
        scaled: whether the residual stream is multiplied with factors on its way.
    """

    path: str
    width: int
    stream: Mapping[str, Spot] = field(default_factory=dict)
    added: Mapping[str, Spot] = field(default_factory=dict)
    norms: Sequence[str] = ()
    attention: Heads | None = None
    cross_attention: Heads | None = None
    mlp: Feedforward | None = None
    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    summed: Sequence[Summed] = ()
    scaled: bool = False

    def without(self, refused: Mapping[str, str]) -> Block:
        """Returns the block without what some names were found for.

        Args:
            refused: why each of them is refused, by name: "residual_in", "attention", "mlp.pre".
        """
        return replace(
            self,
            stream={name: spot for name, spot in self.stream.items() if name not in refused},
            added={name: spot for name, spot in self.added.items() if name not in refused},
            attention=_heads_without(self.attention, "attention", refused),
            cross_attention=_heads_without(self.cross_attention, "cross_attention", refused),
            mlp=_mlp_without(self.mlp, refused),
            refused={**self.refused, **refused},
        )


def _heads_without(heads: Heads | None, role: str, refused: Mapping[str, str]) -> Heads | None:
    if heads is None or role in refused:
        return None
    names = [name for name in _OF_HEADS if f"{role}.{name}" in refused]
    return replace(heads, **dict.fromkeys(names, None))


def _mlp_without(mlp: Feedforward | None, refused: Mapping[str, str]) -> Feedforward | None:
    if mlp is None or "mlp" in refused:
        return None
    changes = {name: None for name in ("pre", "post") if f"mlp.{name}" in refused}
    experts = ("router", "weights")
    changes |= {n: None for n in experts if "experts" in refused or f"experts.{n}" in refused}
    return replace(mlp, **changes)


_OF_HEADS = ("q", "k", "v", "scores", "pattern", "z")
