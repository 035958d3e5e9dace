"""Weights of a model that a server runs, in lines that would take their values from here.

Such a line is refused before its job is sent. Modules that a line calls run where the weights are.
"""

from __future__ import annotations

import torch
from torch import nn

from insitu.engine.job import Job
from insitu.graph.errors import LoadError
from insitu.graph.expression import expression
from insitu.graph.node import Graph, Subgraph, readable
from insitu.graph.structure import map_structure


def check_weights(root: nn.Module, job: Job) -> None:
    """Looks for weights without values among the tensors of a job.

    Args:
        root: the module whose weights are not here.
        job: the job that is to be sent.

    Raises:
        LoadError: if a line uses one, with what to write instead.
    """
    for block in job.blocks:
        _check(root, block.graph)


def _check(root: nn.Module, graph: Graph) -> None:
    for index, row in enumerate(graph.rows):
        found: list[torch.Tensor] = []

        def leaf(item: object, found: list[torch.Tensor] = found) -> None:
            if isinstance(item, torch.Tensor) and item.is_meta:
                found.append(item)
            elif isinstance(item, Subgraph):
                _check(root, item.graph)

        map_structure(leaf, (row[1], dict(row[2])))
        if found:
            raise LoadError(
                f"`{expression(graph, index)}` {_reason(root, found[0])}", graph[index].location
            )


def _reason(root: nn.Module, tensor: torch.Tensor) -> str:
    """Why a tensor cannot be sent, and what to write instead, as the end of a message."""
    name = _name(root, tensor)
    if name is None:  # a copy, as lines take of small tensors, or a tensor of the user's
        return (
            f"takes a tensor of shape {tuple(tensor.shape)} on the meta device, which has no "
            "values. The weights are on the server: call their module in the block instead, such "
            "as `model.lm_head(value)`, and it runs there."
        )
    path = name.rpartition(".")[0]
    call = f"model.{readable(path)}" if path else "model"
    return (
        f"takes values of `{readable(name)}` from here, and the weights are on the server. Call "
        f"the module in the block instead, and it runs there: `{call}(value)`."
    )


def _name(root: nn.Module, tensor: torch.Tensor) -> str | None:
    """The path of the weight that a tensor is, or a view of, None if it is none."""
    where = tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
    names = [
        name
        for name, weight in root.named_parameters(remove_duplicate=False)
        if weight.untyped_storage()._cdata == where  # pyright: ignore[reportPrivateUsage]
    ]
    # An embedding takes ids. If the unembedding has the same weight, that takes hidden states.
    modules = {name: root.get_submodule(name.rpartition(".")[0]) for name in names}
    names.sort(key=lambda name: isinstance(modules[name], nn.Embedding))
    return names[0] if names else None
