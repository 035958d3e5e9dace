"""Paths: who sends, who receives, and how all else is frozen between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from insitu.graph.errors import OptionError, nearest
from insitu.graph.location import here
from insitu.methods.measured_run import Run
from insitu.methods.metrics import Measure
from insitu.methods.sites import Site, chosen, site_of, whole
from insitu.models.keys import entry_of
from insitu.models.language_model import LanguageModel
from insitu.tracing.named import Named

Receiver = tuple[str, int] | tuple[str, int, int]
"""An input of a later component: ("q", layer, head), the same with "k", "v" and "head", which is
all three of them; or ("mlp", layer)."""

_ADDED = ("mixer_out", "attention_out", "cross_attention_out", "mlp_out", "extra_out")
_RECEIVERS = {"q": "q", "k": "k", "v": "v", "head": "z", "mlp": "mlp_out"}


@dataclass(frozen=True, slots=True)
class Sender:
    """A sent value: a head's part of a site, or all of it, at all positions or some.

    Attributes:
        site: what heads or MLPs give.
        layer: its layer.
        head: its head, of no meaning for an MLP.
        positions: the positions, None for all.
    """

    site: Site
    layer: int
    head: int
    positions: list[int] | None

    def put(self, into: Any, out_of: Any) -> None:
        """Copies its part of one value into another."""
        places = [slice(None)] if self.positions is None else self.positions
        for place in places:
            part = self.site.index(head=self.head, position=place)
            into[part] = out_of[part]


@dataclass(frozen=True, slots=True)
class Paths:
    """Which ways are looked at.

    Attributes:
        of_heads: whether heads send, and not MLPs.
        receivers: where to: site, layer and head; nothing for the logits.
        through_mlps: whether MLPs between are computed anew.
    """

    of_heads: bool
    receivers: tuple[tuple[str, int, int | None], ...]
    through_mlps: bool

    @property
    def sent(self) -> Site:
        """What senders give."""
        return site_of("z" if self.of_heads else "mlp_out")

    @property
    def told(self) -> str:
        """The receivers in words."""
        if not self.receivers:
            return "the logits"
        words = (
            f"{name} {layer}" + ("" if head is None else f".{head}")
            for name, layer, head in self.receivers
        )
        return ", ".join(words)

    def reach(self, layer: int) -> bool:
        """Whether there is a way from a layer to a receiver."""
        return not self.receivers or layer <= max(layer for _, layer, _ in self.receivers)

    def read(self, model: LanguageModel) -> dict[tuple[Site, int], Any]:
        """Returns the values frozen in each block, in an open invocation: heads, MLPs and the like.

        Raises:
            OptionError: if that is not all that adds to the residual stream.
        """
        return {
            (site, layer): site.read(model, layer)
            for layer in range(len(model.blocks))
            for site in _frozen(model, layer)
        }

    def send(
        self,
        model: LanguageModel,
        sender: Sender,
        own: Mapping[tuple[Site, int], Any],
        other: Mapping[tuple[Site, int], Any],
    ) -> list[Any]:
        """Freezes all but a sender, in an open invocation, and returns what receivers hear.

        Args:
            model: the model.
            sender: the sender.
            own: what `read` has given in the run of the prompt as it is.
            other: the same in the run from which the sender has its value.
        """
        heard: list[Any] = []
        for name, layer, head in self.receivers:
            site = site_of(_RECEIVERS[name])
            # Before it is frozen: what the component makes of what it is given.
            heard.append(site.read(model, layer)[site.index(**_head(head))].clone())
        last = max((layer for _, layer, _ in self.receivers), default=len(model.blocks) - 1)
        for site, layer in own:
            if not sender.layer <= layer <= last:
                continue
            sends = (site, layer) == (sender.site, sender.layer)
            if self.through_mlps and site.name == "mlp_out" and not sends:
                continue
            value = own[site, layer]
            if sends:
                value = value.clone()
                sender.put(value, other[site, layer])
            site.write(model, layer, value)
        return heard

    def hear(
        self, model: LanguageModel, heard: Sequence[Any], measure: Measure, reference: Any
    ) -> Any:
        """Gives receivers what they heard, in an open invocation, and measures the run."""
        for (name, layer, head), value in zip(self.receivers, heard, strict=True):
            site = site_of(_RECEIVERS[name])
            site.read(model, layer)[site.index(**_head(head))] = value
        return measure(Run(model), reference)


def _frozen(model: LanguageModel, layer: int) -> list[Site]:
    """What a block adds to the residual stream: of its attention, what the heads give."""
    if not _has(model, layer, "residual_out"):
        raise OptionError(
            f"Block {layer} has no residual stream along which paths could go: "
            f"`model.blocks[{layer}].residual_out` says why.",
            here(),
        )
    names = [name for name in _ADDED if _has(model, layer, name)]
    heads = _has(model, layer, "attention.z")
    if heads and "attention_out" not in names:
        raise OptionError(
            f"What the heads of block {layer} add to the residual stream is not told apart from "
            "what else the block adds, so paths from them are not known.",
            here(),
        )
    return [site_of("z" if heads and name == "attention_out" else name) for name in names]


def _has(model: LanguageModel, layer: int, key: str) -> bool:
    return isinstance(entry_of(model.vocabulary, f"blocks.{layer}.{key}"), Named)


def _head(head: int | None) -> dict[str, int]:
    return {} if head is None else {"head": head}


def _key_heads(model: LanguageModel, layer: int, name: str) -> int:
    """How many heads the keys or values of a block have. Configs say it under many names."""
    if not _has(model, layer, f"attention.{name}"):
        return model.n_heads  # the run says why the block has none
    with model.scan([0]):
        return int(getattr(model.blocks[layer].attention, name).shape[1])


def receivers_of(model: LanguageModel, given: Any) -> tuple[tuple[str, int, int | None], ...]:
    """Returns receivers, checked, and counted from 0; none for the logits.

    Args:
        model: the model.
        given: as of `path_patching`.

    Raises:
        OptionError: if there is no such receiver.
    """
    if given == "logits":
        return ()
    entries = [given] if given and isinstance(given, tuple) and isinstance(given[0], str) else given
    what = '"logits", or ("q", layer, head), likewise "k", "v" and "head", or ("mlp", layer)'
    if isinstance(entries, str) or not isinstance(entries, Sequence) or not entries:
        raise OptionError(f"`receivers` are {what}, not {given!r}.", here())
    found: list[tuple[str, int, int | None]] = []
    for entry in cast("Sequence[Any]", entries):
        name = entry[0] if isinstance(entry, tuple | list) and entry else entry
        size = 2 if name == "mlp" else 3
        if name not in _RECEIVERS or not isinstance(entry, tuple | list) or len(entry) != size:
            near = nearest(name, _RECEIVERS) if isinstance(name, str) else ""
            raise OptionError(f"A receiver is {what}, not {entry!r}{near}.", here())
        try:
            numbers = [whole(number) for number in entry[1:]]
        except TypeError:
            raise OptionError(f"A receiver is {what}, not {entry!r}.", here()) from None
        (layer,) = chosen("layer", numbers[0], len(model.blocks))
        head = None
        if name != "mlp":
            heads = _key_heads(model, layer, name) if name in ("k", "v") else model.n_heads
            (head,) = chosen("head", numbers[1], heads)
        found.append((name, layer, head))
    return tuple(found)
