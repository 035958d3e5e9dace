"""Running the nodes of a graph that writes in place, each with its inputs as they were at its line.

What stands before a write and is computed after it gets a copy that was made before the write.
Which nodes those are is in the plan; when to run what is the execution's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from insitu.graph.context import within
from insitu.graph.evaluation import meaning
from insitu.graph.node import Graph, Ref
from insitu.graph.structure import clone, map_structure, memory_of
from insitu.runtime.order import causality_error
from insitu.runtime.plan import Mutations, Plan

_NONE = object()


class Pasts:
    """What values were before they were written to, for those that still need them so.

    Args:
        graph: what is to be done.
        plan: its plan.
        values: the values of the run so far, by node.
        modules: the model's modules, by path.

    Attributes:
        done: the nodes that have a value.
    """

    def __init__(
        self, graph: Graph, plan: Plan, values: list[Any], modules: Mapping[str, nn.Module]
    ) -> None:
        self.done: set[int] = set()
        self._graph = graph
        self._plan = plan
        self._values = values
        self._modules = modules
        self._pasts: dict[tuple[int, int], Any] = {}

    def run(self, index: int, now: int, differentiates: bool) -> Any:
        """Runs a node and returns its value.

        Args:
            index: the node.
            now: the node that reads what has just arrived.
            differentiates: whether autograd records the run.

        Raises:
            CausalityError: if it writes to memory that the model has gone on from.
        """
        graph, done = self._graph, self.done
        mutations = cast("Mutations", self._plan.mutations)
        for node, source in mutations.before.get(index, ()):
            self._keep(node, source)
        for reads in mutations.deadlines.get(index, ()):
            here = graph.rows[now][1]
            if done.issuperset(reads) and all(graph.rows[r][1][1:] != here[1:] for r in reads):
                raise causality_error(graph, self._plan, min(reads), index, [now])
        done.add(index)
        operation = graph.rows[index][0]
        args, kwargs = self.arguments(index)
        function, live = operation.function, differentiates and index in mutations.live
        if live:
            function = partial(_as_single_views, operation.short, function)
        if index in graph.contexts:
            function = within(graph.contexts[index], function)
        result = function(*args, **kwargs)
        if live and not operation.in_place and _is_fresh(result, args):
            result = map_structure(clone, result)  # backward may need it as it was
        return map_structure(clone, result) if index in mutations.copied else result

    def arguments(self, index: int) -> tuple[Any, Any]:
        """Returns the arguments of a node, as they were at its line."""
        values = self._values
        _, args, kwargs, inputs, nested, _ = self._graph.rows[index]
        if not nested and not self._pasts:
            args = [values[arg.index] if type(arg) is Ref else arg for arg in args]
            return args, dict(kwargs)
        pasts = {source: self._pasts.pop((index, source), _NONE) for source in inputs}

        def leaf(item: Any) -> Any:
            if type(item) is not Ref:
                return meaning(item, values, self._modules.__getitem__)
            past = pasts[item.index]
            return values[item.index] if past is _NONE else past

        return cast("tuple[Any, Any]", map_structure(leaf, (args, dict(kwargs))))

    def keep_lent(self) -> None:
        """Copies what waits and has been written to, once all is written that is to be seen."""
        mutations = self._plan.mutations
        for node, source, writes in () if mutations is None else mutations.lent:
            if self.done.issuperset(writes):
                self._keep(node, source)

    def _keep(self, node: int, source: int) -> None:
        """Copies an input of a node as it is now, if that node is still to come."""
        waits = node not in self.done and source in self.done
        if waits and (node, source) not in self._pasts:
            self._pasts[node, source] = map_structure(clone, self._values[source])


# With how many arguments the dimension is not given by position.
_SEVERAL_VIEWS = {"chunk": 2, "split": 2, "split_with_sizes": 2, "tensor_split": 2, "unbind": 1}


def _as_single_views(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Computes an operation; of those that return several views, each becomes one of its own.

    Autograd forbids writes in place to the views that `split` and `unbind` return together.
    """
    result = function(*args, **kwargs)
    if name not in _SEVERAL_VIEWS:
        return result
    tensor = args[0]
    dim = kwargs.get("dim", args[-1] if len(args) > _SEVERAL_VIEWS[name] else 0)
    if name == "unbind":
        return tuple(tensor.select(dim, place) for place in range(len(result)))
    parts: list[torch.Tensor] = []
    start = 0
    for part in result:
        parts.append(tensor.narrow(dim, start, part.shape[dim]))
        start += part.shape[dim]
    return tuple(parts)


def _is_fresh(result: Any, args: Any) -> bool:
    """Whether a value shares no memory with what it was made of."""
    return memory_of(args).isdisjoint(memory_of(result))
