"""`Circuit`: the edges of a model that a behaviour is made of.

A circuit is plain data: names of edges with their scores. It knows nothing of the model, and how
it is run is the business of `circuit_runs.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
import torch

from insitu.display.drawable import Drawable
from insitu.graph.errors import OptionError, ShapeError
from insitu.graph.location import here
from insitu.methods import files
from insitu.methods.circuit_picture import picture
from insitu.methods.result import Result

if TYPE_CHECKING:
    from typing import Self

    from plotly.graph_objects import Figure

_KIND = "circuit"

_Part = Annotated[
    str, msgspec.Meta(pattern=r"^(input|logits|[asm][0-9]{1,6}(\.[hqkv][0-9]{1,6})?)$")
]


class _Told(msgspec.Struct):
    """What a file keeps of a circuit beside its scores: fields as of `Circuit`."""

    title: str
    quantity: str
    edges: list[tuple[_Part, _Part]]
    sharing: Annotated[int, msgspec.Meta(ge=1)]


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
class Circuit(Drawable):
    """The edges of a model that a behaviour is made of.

    Attributes:
        title: how it was found.
        quantity: what a score is, such as "change of logit difference".
        edges: its edges, those that matter most first.
        sharing: how many heads share keys and values.
    """

    title: str
    quantity: str
    edges: tuple[Edge, ...]
    sharing: int = 1

    def __repr__(self) -> str:
        return f"<{self.title}: {self.quantity}, {len(self)} edges>"

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
            result.title, result.quantity, _sorted(edges), heads_sharing(mean.axes[-1].labels)
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

    def plot(self, *, title: str | None = None, most: int = 200) -> Figure:
        """Returns a picture of it, as a figure of plotly: layers from bottom to top.

        Heads are drawn as one, so an edge into one is the sum of those into its queries, keys and
        values. Where heads share keys or values, an edge into these is drawn to each that is in
        the circuit.

        Args:
            title: what stands over it; None for its own title.
            most: how many edges are drawn: those with the largest scores by size.

        Raises:
            OptionError: if it has no edges.
            MissingPackageError: if plotly is not installed.
        """
        if not self.edges:
            raise OptionError("The circuit has no edges to draw.", here())
        title = self.title if title is None else title
        return picture(self.edges, self.sharing, title, self.quantity, most)

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it in JSON's own types."""
        return {
            "title": self.title,
            "quantity": self.quantity,
            "nodes": list(self.nodes),
            "edges": [edge._asdict() for edge in self.edges],
            "sharing": self.sharing,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to a safetensors file, whole or not at all.

        Args:
            path: where to.
        """
        scores = torch.tensor([edge.score for edge in self.edges], dtype=torch.float64)
        edges = [(edge.sender, edge.receiver) for edge in self.edges]
        told = _Told(self.title, self.quantity, edges, self.sharing)
        files.write(path, _KIND, {"scores": scores}, told)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Returns what `save` has written.

        Args:
            path: the file.

        Raises:
            LoadError: if it is no such file.
        """
        return files.read(path, _KIND, _Told, cls._read)

    @classmethod
    def _read(cls, told: _Told, tensors: files.Tensors) -> Self:
        scores = tensors.take("scores", "edge").double().tolist()
        if len(scores) != len(told.edges):
            raise ShapeError(f"there are {len(scores)} scores of {len(told.edges)} edges.")
        named = zip(told.edges, scores, strict=True)
        edges = tuple(Edge(sender, receiver, score) for (sender, receiver), score in named)
        return cls(told.title, told.quantity, edges, told.sharing)


def heads_sharing(receivers: Iterable[str]) -> int:
    """Returns how many heads share keys and values in a model.

    Args:
        receivers: the names of all that reads the residual stream in it.
    """
    kinds = [name.partition(".")[2][:1] for name in receivers]
    return kinds.count("q") // kinds.count("k") if "k" in kinds else 1


def _sorted(edges: Iterable[Edge]) -> tuple[Edge, ...]:
    """Edges, those with the largest scores by size first."""
    return tuple(sorted(edges, key=lambda edge: -abs(edge.score)))


def _place(node: str) -> tuple[int, int, int]:
    """Where a node stands in a model: its layer, what it is, and which head."""
    if node in ("input", "logits"):
        return (-1 if node == "input" else 10**9, 0, 0)
    part, _, head = node.partition(".h")
    return int(part[1:]), "asm".index(part[0]), int(head or 0)
