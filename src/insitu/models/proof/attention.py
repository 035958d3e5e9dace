"""What has to hold of an attention for its names to be given."""

from __future__ import annotations

from typing import Any

import torch

from insitu.models.configuration import all_said
from insitu.models.parts import Heads
from insitu.models.proof import identities
from insitu.models.proof.evidence import (
    Evidence,
    Reasons,
    is_there,
    noise,
    same_everywhere,
    sizes,
)
from insitu.models.proof.identities import Difference
from insitu.models.proof.runs import Tensor
from insitu.tracing.forms import WithoutLast
from insitu.tracing.named import Named

_COUNTS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"),
    *("decoder_attention_heads", "num_query_heads", "attention_heads"),
)
_CAPS = ("attn_logit_softcapping", "attention_logit_cap", "attn_logit_cap")
_OF_VALUES = ("z", "result", "W_O")
_LETTERS = {"W_Q": "q", "W_K": "k", "W_V": "v"}


def reasons_of_heads(evidence: Evidence, path: str, role: str) -> Reasons:
    """Returns which names of an attention are refused, and why.

    Args:
        evidence: what was read of the model.
        path: the block's path.
        role: "attention" or "cross_attention".
    """
    return _Attention(evidence, path, role).reasons()


class _Attention:
    def __init__(self, evidence: Evidence, path: str, role: str) -> None:
        self.evidence, self.path, self.role = evidence, path, role
        heads = getattr(evidence.block(path), role)
        assert isinstance(heads, Heads)
        self.heads = heads
        self.refused: Reasons = {}

    def reasons(self) -> Reasons:
        count, known = self.heads.count, numbers(self.evidence.config, _COUNTS)
        if known and count not in known:
            listed = " or ".join(map(str, sorted(known)))
            why = f"{count} heads are seen in it, where its config has {listed}."
            self.all(why)
            if self.role == "attention":
                self.refused["n_heads"] = why
            return self.refused
        self._pattern()
        self._values()
        self._output()
        self._queries()
        if self.value("z") is None and self.value("q") is None:
            why = "neither are its scores made of `q` and `k`, nor is `z` what it weights."
            self.refuse(why, "scores", "pattern")
        for name in _LETTERS:
            self._projection(name)
        if all(name in self.refused for name in self._names("pattern", "z")):
            self.all(self.refused[f"{self.role}.z"])
        return self.refused

    def _names(self, *names: str) -> list[str]:
        return [f"{self.role}.{name}" for name in names]

    def all(self, why: str) -> None:
        """Refuses the attention as a whole."""
        self.refused[self.role] = why

    def refuse(self, why: str, *names: str) -> None:
        """Refuses some names, if they are there and not refused before."""
        for key in self._names(*names):
            if is_there(self.evidence.entries[self.path].get(key)):
                self.refused.setdefault(key, why)

    def value(self, name: str) -> Tensor | None:
        """The value of a name, None if it is not there or was refused."""
        key = f"{self.role}.{name}"
        return None if key in self.refused else self.evidence.value(self.path, key)

    def changed(self, changes: dict[str, Any], name: str) -> Tensor | None:
        """The value of a name in a run in which others are changed."""
        keys = {f"{self.role}.{other}": change for other, change in changes.items()}
        key = f"{self.role}.{name}"
        return self.evidence.value(self.path, key, self.evidence.changed(self.path, keys, key))

    def _pattern(self) -> None:
        evidence, both = self.evidence, ("scores", "pattern")
        for name in both:
            named = evidence.named(self.path, f"{self.role}.{name}")
            value = self.value(name)
            if named is not None and value is None:
                self.refuse("it does not come to pass.", *both)
            if named is None or value is None:
                continue
            expected = (evidence.rows, self.heads.count, evidence.positions(self.path))
            if value.ndim != 4 or tuple(value.shape[:3]) != expected:
                self.refuse(
                    f"its softmax is of {sizes(value)}, and not of (batch, head, query, key).",
                    *both,
                )
        scores, pattern = (self._raw(name) for name in both)
        if scores is None or pattern is None:
            return
        named = evidence.named(self.path, f"{self.role}.pattern")
        sinks = named is not None and isinstance(named.form, WithoutLast)
        if sinks and pattern.shape[-1] - 1 not in evidence.body.lengths:
            self.refuse(f"its softmax is of {sizes(pattern)}, which are no positions.", *both)
        if not identities.normalised(pattern, False).is_rounding:
            self.refuse("what comes out of its softmax is not 1 in sum.", *both)
        found = identities.softmaxed(scores, pattern)
        if not found.is_rounding:
            self.refuse("its pattern is not the softmax of its scores.", *both)

    def _raw(self, name: str) -> Tensor | None:
        """A value with all that it has beside positions."""
        named = self.evidence.named(self.path, f"{self.role}.{name}")
        if named is None or f"{self.role}.{name}" in self.refused:
            return None
        return self.evidence.base.raw(named)

    def _values(self) -> None:
        """`pattern @ v` is `z`, or that behind a gate."""
        evidence = self.evidence
        z, v = self.value("z"), self.value("v")
        expected = (evidence.rows, self.heads.count, evidence.positions(self.path))
        if z is not None and tuple(z.shape[:3]) != expected:
            self.refuse(f"what goes into its output projection is {sizes(z)}.", *_OF_VALUES)
            z = None
        pattern = self.value("pattern")
        if z is None or v is None:
            if v is not None:
                self.refuse("what it is weighted to is not known.", "v", "W_V")
            if z is not None:
                self.refuse("what its heads are made of is not known.", *_OF_VALUES)
            if pattern is not None:
                self.refuse("what it weights is not known.", "scores", "pattern")
            return
        if pattern is None:
            found = self._averaged(z, v)
        else:
            found = identities.attended(pattern, v, z)
            if not found.is_rounding:
                ones = self.changed({"v": torch.ones_like}, "z")
                if ones is not None and ones.shape == z.shape:
                    gate = ones / pattern.sum(-1, keepdim=True)
                    gated = identities.attended(pattern, v, z, gate)
                    found = gated if gated.is_rounding else found
        if not found.is_rounding:
            note = f" ({found.note})" if found.note else ""
            self.refuse(f"`pattern @ v` is not `z` in it{note}.", *_OF_VALUES, "v", "W_V")

    def _averaged(self, z: Tensor, v: Tensor) -> Difference:
        """How far `z` is from averages of values, each head of its own group's.

        Nothing else can be told where no softmax can be seen.
        """
        if z.shape[1] % v.shape[1] or z.shape[-1] != v.shape[-1]:
            return Difference(float("inf"), note=f"{sizes(v)} cannot be averaged to {sizes(z)}")
        given = noise(v[:1, :, :1])
        made = self.changed({"v": lambda value: given.expand_as(value)}, "z")
        if made is None or made.shape != z.shape:
            return Difference(float("inf"))
        expected = given.repeat_interleave(z.shape[1] // v.shape[1], 1).expand_as(z)
        return identities.compared(made, expected, expected.abs().amax(), (v, z))

    def _output(self) -> None:
        """`z` reassembled through `W_O` and bias is what attention adds."""
        evidence, z, out = self.evidence, self.value("z"), self.heads.out
        weight = evidence.weight(self.path, f"{self.role}.W_O")
        if z is None or out is None or weight is None:
            self.refuse("its heads are not known.", "result", "W_O")
            return
        made = evidence.base.places.get((out, "output", self.heads.z.call if self.heads.z else 0))
        result = torch.einsum("bhtd,hdm->bhtm", z.double(), weight.double())
        empty = torch.zeros_like(z[:1, :, :1].transpose(1, 2).flatten(2))
        with torch.no_grad():
            bias = evidence.runs.model.modules[out](empty).flatten()
        if not isinstance(made, torch.Tensor):
            self.refuse("its output projection returns no tensor.", *_OF_VALUES)
            return
        found = identities.reassembled(
            result, bias, made.unflatten(0, (z.shape[0], -1)).flatten(1, -2)
        )
        if not found.is_rounding:
            self.refuse(
                "its heads through `W_O` are not what its output projection gives.", *_OF_VALUES
            )
            return
        key = f"{self.role}_out"
        if evidence.value(self.path, key) is None:
            return
        seen = evidence.changed(self.path, {f"{self.role}.z": torch.zeros_like}, key)
        left = evidence.value(self.path, key, seen)
        if left is None or not _alike(left, same_everywhere(left), evidence.value(self.path, key)):
            self.refused[key] = "it is not made of its heads alone."

    def _queries(self) -> None:
        """`q k^T`, scaled, is what queries and keys make of the scores."""
        q, k, scores = self.value("q"), self.value("k"), self.value("scores")
        names = ("q", "k", "W_Q", "W_K")
        if q is None or k is None:
            self.refuse("what it is multiplied with is not known.", *names)
            return
        if scores is None:
            self.refuse("the scores that it makes cannot be seen.", *names)
            return
        if q.ndim != 4 or k.ndim != 4 or q.shape[:3] != scores.shape[:3]:
            self.refuse(f"{sizes(q)} and {sizes(k)} do not make {sizes(scores)}.", *names)
            return
        if q.shape[1] % k.shape[1] or q.shape[-1] != k.shape[-1]:
            self.refuse(f"{sizes(q)} cannot be multiplied with {sizes(k)}.", *names)
            return
        base = self.changed({"q": torch.zeros_like}, "scores")
        if base is None or base.shape != scores.shape:
            self.refuse("the scores that it makes cannot be seen.", *names)
            return
        products = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
        visible = (scores > -1e4) & (base > -1e4)
        added = scores.double() - base.double()
        caps = [None, *numbers(self.evidence.config, _CAPS)]
        stored = (q, k, scores)
        found = [identities.scored(added, products, visible, cap, stored) for cap in caps]
        if not any(one.is_rounding for one in found):
            self.refuse(
                "the products of `q` and `k`, scaled, are not what makes its scores.", *names
            )

    def _projection(self, name: str) -> None:
        """`x @ W_Q` is the value before norms and rotary embeddings, but for a bias."""
        letter, evidence = _LETTERS[name], self.evidence
        weight = evidence.weight(self.path, f"{self.role}.{name}")
        if weight is None or f"{self.role}.{name}" in self.refused:
            return
        if self.value(letter) is None:
            self.refuse(f"its `{letter}` is not known.", name)
            return
        layer = self.heads.projections[letter]
        given = evidence.base.places.get((layer, "input", 0))
        spot = self.heads.raw.get(letter)
        raw = None
        if spot is not None:
            raw = evidence.base.places.get((spot.path, spot.kind, spot.call))
            for at in spot.item:
                raw = None if raw is None else raw[at]
            if raw is not None and raw.shape[2] not in evidence.body.lengths:
                raw = raw.transpose(1, 2)
        elif letter in self.heads.projected:
            raw = self.value(letter)
        if raw is None:
            self._head_by_head(name, letter, layer)
            return
        if not isinstance(given, torch.Tensor):
            self.refuse(f"how its `{letter}` is made of it cannot be seen.", name)
            return
        given = given.reshape(raw.shape[0], -1, given.shape[-1])
        found = identities.projected(given, weight, raw)
        if not found.is_rounding:
            self.refuse(f"what is multiplied with it is not its `{letter}`.", name)
        elif spot is not None and self._is_mixed(letter, layer):
            self.refuse(
                f"its `{letter}` is made of other positions, or of other layers, too.", name
            )

    def _is_mixed(self, letter: str, layer: str) -> bool:
        """Whether what a layer makes at other positions, or another layer, goes into a letter."""
        evidence = self.evidence
        named = evidence.named(self.path, f"{self.role}.{letter}")
        before = self.value(letter)
        if named is None or before is None:
            return False

        def elsewhere(value: Tensor) -> Tensor:
            changed = value.clone()
            changed[:, :1] = noise(value[:, :1])
            return changed

        made = evidence.base.places.get((layer, "output", 0))
        changes: list[tuple[dict[Named, Any], Tensor | slice]] = []
        if isinstance(made, torch.Tensor) and made.ndim == 3 and made.shape[1] == before.shape[2]:
            changes.append(({Named(layer, "output"): elsewhere}, slice(1, None)))
        others = {path for path in self.heads.projections.values() if path != layer}
        changes.extend(({Named(path, "output"): noise}, slice(None)) for path in sorted(others))
        for change, positions in changes:
            after = evidence.runs.run([named], change).at(named)
            if after is None or not _alike(after[:, :, positions], before[:, :, positions], before):
                return True
        return False

    def _head_by_head(self, name: str, letter: str, layer: str) -> None:
        """Where its layer gives nothing for some heads, these have nothing, and only these."""
        evidence, key = self.evidence, f"{self.role}.{letter}"
        weight, before = evidence.weight(self.path, f"{self.role}.{name}"), self.value(letter)
        named, place = evidence.named(self.path, key), Named(layer, "output")
        assert weight is not None and before is not None and named is not None
        count, size = before.shape[1], before.shape[-1]
        full = evidence.names.weights.matrix(layer).unflatten(1, (-1, size)).transpose(0, 1)
        if full.shape != weight.shape or not torch.equal(full, weight):
            self.refuse(f"how its `{letter}` is made of it cannot be seen.", name)
            return
        for chosen in ([0], list(range(1, count, 2))) if count > 1 else ([0],):
            kept = torch.ones(count, size)
            kept[chosen] = 0

            def silent(value: Tensor, kept: Tensor = kept) -> Tensor:
                return value * kept.flatten().to(value)

            after = evidence.runs.run([named], {place: silent}).at(named)
            if after is None or after.shape != before.shape:
                break
            others = [head for head in range(count) if head not in chosen]
            left = after[:, chosen].abs().amax() <= 1e-6 * before.abs().amax()
            if not left or any(not bool(after[:, head].any()) for head in others):
                break
        else:
            return
        self.refuse(f"what is multiplied with it is not its `{letter}` head by head.", name)


def numbers(config: Any, names: tuple[str, ...]) -> set[Any]:
    """Returns all numbers that a config, and those in it, have under some names.

    Args:
        config: a model's config.
        names: the names.
    """
    found: set[Any] = set()
    for value in all_said(config, *names):
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, int | float) and not isinstance(one, bool):
                found.add(one)
    for part in vars(config).values():
        if hasattr(part, "get_text_config"):
            found |= numbers(part, names)
    return found


def _alike(found: Tensor, expected: Tensor, scale: Tensor | None) -> bool:
    size = expected.abs().amax() if scale is None else scale.abs().amax()
    return identities.compared(found, expected, size, (found,)).is_rounding
