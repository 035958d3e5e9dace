"""`Circuit`: the edges of a model that a behaviour is made of.

A circuit is plain data: names of edges with their scores. It knows nothing of the model, and how
it is run is the business of `circuit_runs.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from insitu.display import circuit_picture as picture
from insitu.display.page import write_html, write_png
from insitu.graph.errors import OptionError
from insitu.graph.location import here
from insitu.methods import files
from insitu.methods.result import Result

if TYPE_CHECKING:
    from typing import Self

_KIND = "circuit"


class Edge(NamedTuple):
    """What one part of a model adds to the residual stream, as another reads it.

    Attributes:
        sender: what adds to the stream: "input", "a3.h5" (a head), "m3" (an MLP).
        receiver: what reads it: "a3.q5", "a3.k5", "a3.v5" (queries, keys and values of a head),
            "m3" or "logits".
        score: how much it matters, in the units of the metric that it was found with.
    """

    sender: str
    receiver: str
    score: float


@dataclass(frozen=True, slots=True)
class Circuit:
    """The edges of a model that a behaviour is made of.

    Attributes:
        title: how it was found.
        quantity: what a score is, such as "change of logit difference".
        edges: its edges, those that matter most first.
        shares_keys: whether several heads of the model have one key and value.
    """

    title: str
    quantity: str
    edges: tuple[Edge, ...]
    shares_keys: bool = False

    @classmethod
    def of(cls, result: Result) -> Self:
        """Returns all edges that were attributed, with their mean scores over prompts.

        Args:
            result: what `edge_attribution` has given.

        Raises:
            OptionError: if it is something else.
        """
        names = [axis.name for axis in result.axes]
        if names[-2:] != ["sender", "receiver"] or names[:-2] not in ([], ["prompt"]):
            raise OptionError(
                "Edges are made of a result with the axes 'sender' and 'receiver', as "
                f"`edge_attribution` gives it, not of one with {', '.join(map(repr, names))}.",
                here(),
            )
        mean = result.mean("prompt") if names[:-2] else result
        edges = [
            Edge(cell.labels["sender"], cell.labels["receiver"], cell.value)
            for cell in mean.cells()
        ]
        return cls(
            result.title, result.quantity, _sorted(edges), keys_are_shared(result.axes[-1].labels)
        )

    def __len__(self) -> int:
        return len(self.edges)

    @property
    def nodes(self) -> tuple[str, ...]:
        """What its edges come from, in the order of the model, and "logits" if any leads there."""
        found = {edge.sender for edge in self.edges}
        if any(edge.receiver == "logits" for edge in self.edges):
            found.add("logits")
        return tuple(sorted(found, key=_place))

    def top(self, count: int) -> Circuit:
        """Returns the circuit of the edges that matter most, with the largest scores by size.

        Args:
            count: how many.
        """
        return replace(self, edges=_sorted(self.edges)[: max(count, 0)])

    def plot(self, *, most: int = 200) -> Any:
        """Returns a picture of it, a figure of plotly: parts by layer, thick edges that count.

        What reads queries, keys and values of a head is drawn as the head. Where heads share keys,
        these have places of their own.

        Args:
            most: how many edges are drawn, the strongest.

        Raises:
            OptionError: if it has no edges.
            MissingPackageError: if plotly is not installed.
        """
        if not self.edges:
            raise OptionError("The circuit has no edges: there is nothing to draw.", here())
        lines: dict[tuple[str, str], float] = {}
        for edge in self.edges:  # queries, keys and values of one head are one line
            ends = edge.sender, _reader(edge.receiver, self.shares_keys)
            lines[ends] = max(lines.get(ends, 0.0), edge.score, key=abs)
        names = sorted({name for ends in lines for name in ends}, key=_place)
        layers = [_place(name)[0] for name in names]
        top = max((layer for layer in layers if layer < _LAST), default=-1) + 1
        nodes = [
            picture.Node(name, min(layer, top), _kind(name))
            for name, layer in zip(names, layers, strict=True)
        ]
        edges = [picture.Edge(*ends, score) for ends, score in lines.items()]
        return picture.circuit_figure(
            nodes,
            edges,
            title=self.title,
            quantity=self.quantity,
            most=most,
            labels={-1: "", top: ""},
        )

    def to_html(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Writes a picture of it as a page that can be opened without a network.

        Args:
            path: where to.
            options: those of `plot`.

        Raises:
            OptionError: as `plot`.
            MissingPackageError: if plotly is not installed.
        """
        write_html(self.plot(**options), path)

    def to_png(self, path: str | os.PathLike[str], scale: float = 2, **options: Any) -> None:
        """Writes a picture of it as a PNG. That takes Chromium.

        Args:
            path: where to.
            scale: how many pixels of the file one of the picture's is wide.
            options: those of `plot`.

        Raises:
            OptionError: as `plot`.
            PictureError: if there is no Chromium.
            MissingPackageError: if plotly is not installed, or Kaleido, which speaks to Chromium.
        """
        write_png(self.plot(**options), path, scale)

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it in JSON's own types."""
        return {
            "title": self.title,
            "quantity": self.quantity,
            "nodes": list(self.nodes),
            "edges": [edge._asdict() for edge in self.edges],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to a safetensors file, whole or not at all.

        Args:
            path: where to.
        """
        scores = torch.tensor([edge.score for edge in self.edges], dtype=torch.float64)
        told = {
            "title": self.title,
            "quantity": self.quantity,
            "shares_keys": self.shares_keys,
            "edges": [[edge.sender, edge.receiver] for edge in self.edges],
        }
        files.write(path, _KIND, {"scores": scores}, told)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Returns what `save` has written.

        Args:
            path: the file.

        Raises:
            LoadError: if it is no such file.
        """
        tensors, told = files.read(path, _KIND)
        scores = tensors["scores"].tolist()
        named = zip(told["edges"], scores, strict=True)
        edges = [Edge(sender, receiver, score) for (sender, receiver), score in named]
        return cls(told["title"], told["quantity"], tuple(edges), told["shares_keys"])


def _sorted(edges: Iterable[Edge]) -> tuple[Edge, ...]:
    """Edges, those with the largest scores by size first."""
    return tuple(sorted(edges, key=lambda edge: -abs(edge.score)))


_LAST = 10**9  # above any layer
_KINDS = {"a": "attention", "m": "MLP", "s": "state space"}


def _place(node: str) -> tuple[int, int, int]:
    """Where a node stands in a model: its layer, what it is, and which head."""
    if node in ("input", "logits"):
        return (-1 if node == "input" else _LAST, 0, 0)
    part, _, head = node.partition(".")
    return int(part[1:]), "asm".index(part[0]), int(head[1:] or 0)


def _reader(receiver: str, shares_keys: bool) -> str:
    """What a receiver is drawn as: "a3.h5" for "a3.q5"."""
    part, dot, head = receiver.partition(".")
    if not dot or (shares_keys and head[0] != "q"):
        return receiver
    return f"{part}.h{head[1:]}"


def _kind(name: str) -> str:
    """What a node is, as the legend of a picture says it."""
    return name if name in ("input", "logits") else _KINDS[name[0]]


def keys_are_shared(receivers: Sequence[str]) -> bool:
    """Returns whether there are fewer keys than queries.

    Args:
        receivers: the names of a model's receivers.
    """
    kinds = [name.partition(".")[2][:1] for name in receivers]
    return kinds.count("k") < kinds.count("q")
