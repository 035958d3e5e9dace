"""Which numbers of a linear layer's output are the queries, keys or values of each head."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from dataclasses import dataclass

import torch

from insitu.models.parts import Block, Heads, Spot
from insitu.models.weights import NoMatrixError, Weights


@dataclass(frozen=True, slots=True)
class HeadProjection:
    """The part of a linear layer that makes the queries, the keys or the values of all heads.

    Attributes:
        path: the layer.
        columns: which numbers of its output they are, `(head, d_head)`.
        weight: what they are multiplied with on the way back, `(head, d_head, d_model)`. A view of
            the layer's weight where the columns lie at equal distances.
    """

    path: str
    columns: torch.Tensor
    weight: torch.Tensor


def head_projection(
    weights: Weights, block: Block, heads: Heads, letter: str
) -> HeadProjection | str:
    """Returns the part of a layer that makes the queries, keys or values; or why it is unknown.

    Args:
        weights: the weights of the model's parts.
        block: the block.
        heads: its attention.
        letter: "q", "k" or "v".
    """
    refused = block.refused.get(f"attention.W_{letter.upper()}")
    path = heads.projections.get(letter)
    if refused is not None or path is None:
        return refused or f"no linear layer makes its {letter}."
    try:
        matrix = weights.matrix(path)
    except NoMatrixError as error:
        return str(error)
    count, size = weights._count(heads, letter)
    spot: Spot | None = heads.raw.get(letter)
    columns = None
    if spot is not None:
        columns = weights._found(block, path, spot, matrix.shape[1])
    if columns is None:
        if matrix.shape[1] != count * size:
            return f"its {letter} cannot be told from what else its layer makes."
        columns = torch.arange(count * size).reshape(count, size)
    return HeadProjection(path, columns, _rows_of(matrix, columns))


def _rows_of(matrix: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Some columns of a matrix as rows, `(head, d_head, d_in)`, without a copy if that can be."""
    heads, size = columns.shape
    first = int(columns[0, 0])
    apart = int(columns[1, 0]) - first if heads > 1 else size
    step = int(columns[0, 1]) - first if size > 1 else 1
    regular = first + apart * torch.arange(heads)[:, None] + step * torch.arange(size)
    if apart < 1 or step < 1 or not torch.equal(columns, regular):
        return matrix.T[columns.to(matrix.device)]
    along, across = matrix.stride()
    return matrix.as_strided(
        (heads, size, len(matrix)),
        (apart * across, step * across, along),
        matrix.storage_offset() + first * across,
    )
