"""What has to hold of an MLP, or of a choice of experts, for its names to be given."""

from __future__ import annotations

from typing import Any

import torch

from insitu.models.parts import Feedforward
from insitu.models.proof import identities
from insitu.models.proof.attention import numbers
from insitu.models.proof.evidence import (
    Evidence,
    Reasons,
    is_there,
    noise,
    same_everywhere,
    sizes,
)
from insitu.models.proof.runs import Tensor
from insitu.tracing.named import Named
from insitu.tracing.vocabulary import Entry

_ALL = ("pre", "post", "W_in", "W_out", "W_gate")
_OF_WIDTHS = ("inter", "inner", "ff", "feed", "mlp", "hidden_dim")
"""What names of configs have in them that say how wide an MLP is."""


def reasons_of_mlp(evidence: Evidence, path: str) -> Reasons:
    """Returns which names of a block's MLP and of its experts are refused, and why.

    Args:
        evidence: what was read of the model.
        path: the block's path.
    """
    return _Mlp(evidence, path).reasons()


class _Mlp:
    def __init__(self, evidence: Evidence, path: str) -> None:
        self.evidence, self.path = evidence, path
        mlp = evidence.block(path).mlp
        assert isinstance(mlp, Feedforward)
        self.mlp = mlp
        self.refused: Reasons = {}

    def reasons(self) -> Reasons:
        self._shapes()
        self._output()
        self._nonlinearity()
        self._weights()
        self._experts()
        named = [name for name in _ALL if is_there(self._entry(name))]
        if named and all(f"mlp.{name}" in self.refused for name in named):
            self.refused["mlp"] = self.refused[f"mlp.{named[0]}"]
        return self.refused

    def _entry(self, name: str) -> Entry | None:
        return self.evidence.entries[self.path].get(f"mlp.{name}")

    def refuse(self, why: str, *names: str) -> None:
        """Refuses some names, if they are there and not refused before."""
        for name in names:
            if is_there(self._entry(name)):
                self.refused.setdefault(f"mlp.{name}", why)

    def value(self, name: str) -> Tensor | None:
        """The value of a name, None if it is not there or was refused."""
        key = f"mlp.{name}"
        return None if key in self.refused else self.evidence.value(self.path, key)

    def _shapes(self) -> None:
        evidence = self.evidence
        expected = (evidence.rows, evidence.positions(self.path))
        for name in ("pre", "post"):
            value = self.value(name)
            if value is None:
                if evidence.named(self.path, f"mlp.{name}") is not None:
                    self.refuse("it does not come to pass.", *_ALL)
                continue
            if value.ndim != 3 or tuple(value.shape[:2]) != expected:
                self.refuse(f"it is {sizes(value)}, and not (batch, position, d_mlp).", *_ALL)
            elif not self._is_width(value.shape[-1]):
                why = f"it is {value.shape[-1]} wide, which its config does not speak of."
                self.refuse(why, *_ALL)

    def _is_width(self, width: int) -> bool:
        """Whether a config speaks of MLPs of a width; where it does not, they may be of any.

        What stands behind the MLP of a block, such as an adapter, is a small MLP itself.
        """
        config = self.evidence.config
        said = _said_widths(config)
        wide = numbers(config, ("hidden_size", "d_model", "n_embd"))
        return not said or width in said or any(width % one == 0 for one in wide if one)

    def _output(self) -> None:
        """`post` through `W_out` is what the MLP gives."""
        evidence, post, out = self.evidence, self.value("post"), self.mlp.out
        if post is None or out is None or self.mlp.post is None:
            return
        weight = evidence.weight(self.path, "mlp.W_out")
        made = evidence.base.places.get((out, "output", self.mlp.post.call))
        if weight is None or not isinstance(made, torch.Tensor):
            self.refuse("its last layer is no plain one.", "post", "W_out")
            return
        with torch.no_grad():
            bias = evidence.runs.model.modules[out](torch.zeros_like(post[:1, :1])).flatten()
        heads = (post.double() @ weight.double())[:, None]
        found = identities.reassembled(heads, bias, made.reshape(*post.shape[:2], -1))
        if not found.is_rounding:
            self.refuse("`post` through `W_out` is not what its last layer gives.", *_ALL)
            return
        before = evidence.value(self.path, "mlp_out")
        if before is None:
            return
        seen = evidence.changed(self.path, {"mlp.post": torch.zeros_like}, "mlp_out")
        left = evidence.value(self.path, "mlp_out", seen)
        if left is None or not _alike(left, same_everywhere(left), before):
            self.refuse("what this MLP adds is not made of `post` alone.", *_ALL)

    def _nonlinearity(self) -> None:
        """Each number of `post` is made of that of `pre`, and of no other of them."""
        evidence, pre, post = self.evidence, self.value("pre"), self.value("post")
        if pre is None or post is None:
            return
        if pre.shape != post.shape:
            self.refuse(f"`pre` is {sizes(pre)} and `post` is {sizes(post)}.", *_ALL)
            return
        chosen = noise(pre[0, 0]) > 0
        moved = noise(pre, 1) * pre.std()
        seen = evidence.changed(
            self.path, {"mlp.pre": lambda value: value + moved * chosen}, "mlp.post"
        )
        after = evidence.value(self.path, "mlp.post", seen)
        if after is None or after.shape != post.shape:
            self.refuse("`post` is not made of `pre`.", *_ALL)
            return
        kept = torch.where(chosen, torch.zeros_like(post), after - post)
        apart = (after - post).abs().amax((0, 1)) > 0
        if not _alike(kept, torch.zeros_like(kept), post) or not bool(apart[chosen].any()):
            self.refuse("`post` is not made of `pre` number by number.", *_ALL)

    def _weights(self) -> None:
        """`x @ W_in` is `pre`, but for a bias; of an MLP with a gate `x @ W_gate` is."""
        evidence, into, pre, post = (
            self.evidence,
            self.mlp.into,
            self.value("pre"),
            self.value("post"),
        )
        if into is None or pre is None or post is None:
            self.refuse("what makes `pre` is not known.", "W_in", "W_gate")
            return
        gated = is_there(self._entry("W_gate"))
        names = ("W_gate", "W_in") if gated else ("W_in",)
        weights = [evidence.weight(self.path, f"mlp.{name}") for name in names]
        given = evidence.base.places.get((into, "input", 0))
        if not isinstance(given, torch.Tensor) or any(weight is None for weight in weights):
            self.refuse("what goes into it cannot be seen.", "W_in", "W_gate")
            return
        given = given.reshape(*pre.shape[:2], -1)
        first = weights[0]
        assert first is not None
        if not identities.projected(given, first[None], pre[:, None]).is_rounding:
            self.refuse(f"what `{names[0]}` makes is not `pre`.", "W_in", "W_gate")
        if not gated or "mlp.W_in" in self.refused:
            return
        second = weights[1]
        assert second is not None
        # With the same gate everywhere, what is left is a multiple of what `W_in` makes.
        seen = evidence.changed(self.path, {"mlp.pre": torch.ones_like}, "mlp.post")
        left = evidence.value(self.path, "mlp.post", seen)
        if left is None or not _is_multiple(given.double() @ second.double(), left):
            self.refuse(
                "what `W_in` makes is not what is multiplied with the gate.", "W_in", "W_gate"
            )

    def _experts(self) -> None:
        evidence, path = self.evidence, self.path
        router, weights = (evidence.value(path, f"experts.{n}") for n in ("router", "weights"))
        if not is_there(evidence.entries[path].get("experts")):
            return
        expected = (evidence.rows, evidence.positions(path))
        for name, value in (("router", router), ("weights", weights)):
            if value is not None and tuple(value.shape[:2]) != expected:
                why = f"it is {sizes(value)}, and not (batch, position, expert)."
                self.refused[f"experts.{name}"] = why
        out = self._given()
        if weights is None or out is None or "experts.weights" in self.refused:
            if weights is not None:
                self.refused["experts.weights"] = "what it weights is not known."
            return
        none, double = (self._weighted(times) for times in (0, 2))
        if none is None or double is None or _alike(none, out, out):
            self.refused["experts.weights"] = "what the experts add does not depend on it."
            return
        linear = _alike(double - none, 2 * (out - none), out)
        if not linear and not self._is_without_experts(none):
            self.refused["experts.weights"] = "what the experts add is not weighted with it."

    def _given(self) -> Tensor | None:
        """What the module with the experts returns."""
        owner = self.mlp.path
        if owner is None:
            return None
        return _first(self.evidence.base.places.get((owner, "output", 0)))

    def _weighted(self, times: int) -> Tensor | None:
        """What it returns with other weights."""
        evidence, owner = self.evidence, self.mlp.path
        named = evidence.named(self.path, "experts.weights")
        assert named is not None and owner is not None
        seen = evidence.runs.run([(owner, "output", 0)], {named: lambda value: value * times})
        return _first(seen.places.get((owner, "output", 0)))

    def _is_without_experts(self, none: Tensor) -> bool:
        """Whether weights of zero leave what experts leave that give nothing."""
        runs, owner = self.evidence.runs, self.mlp.path or ""
        experts = [Named(path, "output") for path in runs.model.modules if _is_experts(path, owner)]
        silent = dict.fromkeys(experts, torch.zeros_like)
        made = _first(runs.run([(owner, "output", 0)], silent).places.get((owner, "output", 0)))
        return bool(experts) and made is not None and _alike(none, made, none)


def _is_experts(path: str, owner: str) -> bool:
    """Whether a module is one of the experts in another, or all of them in one."""
    inside = path.removeprefix(f"{owner}.")
    return path != inside and (inside == "experts" or inside.rpartition(".")[0] == "experts")


def _first(returned: object) -> Tensor | None:
    """The first thing that a module returns, if that is a tensor."""
    while isinstance(returned, tuple) and returned:
        returned = returned[0]
    return returned if isinstance(returned, torch.Tensor) else None


def _is_multiple(made: Tensor, found: Tensor) -> bool:
    """Whether a value is a multiple of another one, but for one offset everywhere."""
    first, second = (one.double() - one[:1, :1].double() for one in (made, found))
    scale = (first * second).sum() / (first * first).sum().clamp_min(1e-30)
    return _alike(second, scale * first, found)


def _alike(found: Tensor, expected: Tensor, scale: Tensor) -> bool:
    size = scale.abs().amax()
    return identities.compared(found, expected, size, (found, scale)).is_rounding


def _said_widths(config: Any) -> set[Any]:
    """All widths of MLPs that a config, and those in it, speak of."""
    named = tuple(name for name in vars(config) if any(part in name for part in _OF_WIDTHS))
    found = numbers(config, named)
    for part in vars(config).values():
        if hasattr(part, "get_text_config"):
            found |= _said_widths(part)
    return {one for one in found if one > 1}
