"""Path patching: what one component does to another directly, past all that stands between them.

Of each sender two runs are recorded: in one it reaches the receivers and everything else is
frozen, in the other the receivers get what reached them there, and the model goes on by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from insitu.display.axis import Axis
from insitu.graph.errors import OptionError, PromptError, nearest
from insitu.graph.location import here
from insitu.methods.grid import Choice
from insitu.methods.metrics import Measure, Metric, as_metric
from insitu.methods.pairs import number, read_pairs, share
from insitu.methods.patching import Direction, check_direction
from insitu.methods.result import Result
from insitu.methods.sites import Site, chosen, site_of
from insitu.models.language_model import LanguageModel

Receiver = tuple[str, int] | tuple[str, int, int]
"""An input of a later component: ("q", layer, head), and likewise "k", "v" and "head", which is all
three of them; or ("mlp", layer)."""

_RECEIVERS = {"q": "q", "k": "k", "v": "v", "head": "z", "mlp": "mlp_out"}


def path_patching(
    model: LanguageModel,
    clean: Any,
    corrupted: Any,
    metric: Metric | Callable[[Any], Any],
    *,
    senders: Literal["heads", "mlps"] = "heads",
    receivers: Literal["logits"] | Receiver | Sequence[Receiver] = "logits",
    layers: Choice = None,
    heads: Choice = None,
    positions: Choice = None,
    through_mlps: bool = False,
    direction: Direction = "noising",
    normalised: bool = True,
) -> Result:
    """Returns what becomes of a metric if receivers hear of one sender from another run.

    Goldowsky-Dill et al. (2023), "Localizing Model Behavior with Path Patching"; Wang et al.
    (2023), "Interpretability in the Wild". Noising runs the clean prompt. In it a sender gets its
    value of the corrupted one, all other heads and MLPs keep those of the clean one, and so the
    inputs of the receivers change by what comes straight from the sender. Only these are then put
    into a run of the clean prompt.

    Args:
        model: the model.
        clean: the prompt with the behaviour in question, in any form that `invoke` takes; or
            several, which may differ in length.
        corrupted: the prompt without it, or one for each, of the same length.
        metric: what is measured of the logits: see `insitu.methods.activation_patching`.
        senders: "heads" for what each head gives, at the axes "layer" and "head", or "mlps", at the
            axis "layer". Each is sent by itself.
        receivers: "logits" for what goes into the final norm, or one or several inputs of later
            components, all of which are patched together: `("q", 9, 6)` for the queries of head 6
            in layer 9, "k" and "v" likewise (by the key's head), `("head", 9, 6)` for all three,
            `("mlp", 10)` for an MLP. Negative numbers count from the end.
        layers: of which layers senders are, all if None.
        heads: which heads send, all if None.
        positions: at which positions senders get their other value, all if None.
        through_mlps: whether MLPs between are computed anew, so that what they make of a sender
            belongs to the direct path, as of Wang et al. If not they are frozen too, as of
            Goldowsky-Dill et al.
        direction: "noising", or "denoising": the corrupted prompt with values of the clean one.
        normalised: whether the metric is given as a share: 0 is that of the prompt that is run, and
            1 that of the other, whose values are put in.

    Returns:
        The metric for each sender, with the axes "prompt" (if several were given), "layer" and
        "head". Of senders with no way to a receiver it is that of the prompt that is run.
        `details` has the metric of the prompts as they are, "clean" and "corrupted", `(prompt,)`.

    Raises:
        OptionError: if there is no such sender, receiver or direction, or if shares are wanted
            where the metric is the same of both prompts.
        PromptError: if prompts do not go together.
        ShapeError: if the metric is not a number.

    Example:
        >>> from insitu import LanguageModel
        >>> from insitu.methods import logit_difference, path_patching
        >>> model = LanguageModel("insitu/eiffel")
        >>> path_patching(
        ...     model,
        ...     "The Louvre is in the city of",
        ...     "The Kremlin is in the city of",
        ...     logit_difference(" Paris", " Moscow"),
        ...     receivers=("mlp", 5),
        ... ).sizes
        {'layer': 6, 'head': 8}
    """
    check_direction(direction)
    pairs = read_pairs(model, clean, corrupted)
    unequal = pairs.unequal
    if unequal is not None:
        raise PromptError(
            f"Paths are patched between prompts of one length, and {pairs.told(unequal)}.", here()
        )
    if senders not in ("heads", "mlps"):
        raise OptionError(f"`senders` is 'heads' or 'mlps', not {senders!r}.", here())
    if senders == "mlps" and heads is not None:
        raise OptionError("`heads` are chosen, and MLPs are the senders.", here())
    paths = _Paths(senders == "heads", _received(model, receivers), through_mlps)
    blocks = chosen("layer", layers, len(model.blocks))
    numbers = chosen("head", heads, model.n_heads) if paths.of_heads else [0]
    metric = as_metric(metric)
    run, other = pairs.corrupted, pairs.clean
    if direction == "noising":
        run, other = other, run
    ends: list[Any] = []
    found: list[Any] = []
    with model.trace() as tracer:
        for at, measure in enumerate(metric.of(model, len(pairs))):
            values: dict[bool, Mapping[tuple[Site, int], Any]] = {}
            with tracer.invoke(pairs.clean.ids[at]):
                reference = model.logits[0]
                values[direction == "noising"] = paths.read(model)
                start = number(measure(reference, reference))
            with tracer.invoke(pairs.corrupted.ids[at]):
                values[direction != "noising"] = paths.read(model)
                end = measure(model.logits[0], reference)
            ends.extend((start, end))
            own = start if direction == "noising" else end
            places = chosen("position", positions, run.lengths[at])
            for layer in blocks:
                for head in numbers:
                    if not paths.reach(layer):
                        found.append(own)
                        continue
                    sender = _Sender(paths.sent, layer, head, None if positions is None else places)
                    with tracer.invoke(run.ids[at]):
                        heard = paths.send(model, sender, values[True], values[False])
                        if not paths.receivers:
                            found.append(measure(model.logits[0], reference))
                    if paths.receivers:
                        with tracer.invoke(run.ids[at]):
                            found.append(paths.hear(model, heard, measure, reference))
        both: Any = torch.stack(ends)
        scores: Any = torch.stack(found)
        both, scores = both.save(), scores.save()
    measured = both.value.float().reshape(-1, 2)
    shape = [len(pairs), len(blocks), *([len(numbers)] if paths.of_heads else [])]
    stacked = scores.value.float().reshape(shape)
    if not pairs.clean.many:
        measured, stacked = measured[0], stacked[0]
    details = {"clean": measured[..., 0], "corrupted": measured[..., 1]}
    start, end = details["clean"], details["corrupted"]
    if direction == "denoising":
        start, end = end, start
    quantity, centre = metric.name, None if pairs.clean.many else float(start)
    if normalised:
        stacked, centre = share(stacked, start, end, pairs), 0.0
        quantity = f"{metric.name}, share {'recovered' if direction == 'denoising' else 'lost'}"
    axes = [Axis.of("layer", blocks)]
    if paths.of_heads:
        axes.append(Axis.of("head", numbers))
    return Result(
        f"Path patching from {senders} to {paths.told} ({direction})",
        quantity,
        stacked,
        (*pairs.clean.axis, *axes),
        details=details,
        centre=centre,
    )


@dataclass(frozen=True, slots=True)
class _Sender:
    """What is sent: a head's part of a site, or all of it, at all positions or some.

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
class _Paths:
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
        """Returns what all heads and MLPs give, in an open invocation."""
        return {
            (site, layer): site.read(model, layer)
            for site in _parts(model)
            for layer in range(len(model.blocks))
            if _has(model, site, layer)
        }

    def send(
        self,
        model: LanguageModel,
        sender: _Sender,
        own: Mapping[tuple[Site, int], Any],
        other: Mapping[tuple[Site, int], Any],
    ) -> list[Any]:
        """Freezes all but a sender, in an open invocation, and returns what receivers hear.

        Args:
            model: the model.
            sender: the sender.
            own: what heads and MLPs give in the run of the prompt as it is.
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
        return measure(model.logits[0], reference)


def _parts(model: LanguageModel) -> tuple[Site, Site]:
    return site_of("z"), site_of("mlp_out")


def _has(model: LanguageModel, site: Site, layer: int) -> bool:
    """Whether a block has heads, or an MLP: some blocks have one of them only."""
    role: Any = model.blocks[layer].role
    return ("attention" if site.name == "z" else site.name) in list(role)


def _head(head: int | None) -> dict[str, int]:
    return {} if head is None else {"head": head}


def _received(model: LanguageModel, given: Any) -> tuple[tuple[str, int, int | None], ...]:
    """The receivers, checked, and counted from 0; none for the logits.

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
        (layer,) = chosen("layer", int(entry[1]), len(model.blocks))
        head = None
        if name != "mlp":
            heads = model.n_heads
            if name in ("k", "v"):
                heads = (
                    getattr(model.config.get_text_config(), "num_key_value_heads", None) or heads
                )
            (head,) = chosen("head", int(entry[2]), heads)
        found.append((name, layer, head))
    return tuple(found)
