"""Whether what passes a site in the later steps of a generation can be cut out of a batch.

As in `separation.py`, shapes propose and values decide. A batch of a few short prompts and each of
them alone go on for some steps, with tokens that are given, and the values at each site are
compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from insitu.batching.layout import Axis, Layouts, Part, leaves
from insitu.batching.proposed_layouts import Size, find_layouts
from insitu.engine.keeping import undisturbed
from insitu.engine.listening import listening
from insitu.engine.places import View
from insitu.engine.tree import Tree
from insitu.graph.node import Address, Place
from insitu.models.blocks import CACHES
from insitu.models.parted import agrees, copied_away, tells_apart
from insitu.models.prompts import Prompt

STEPS = 3
"""How many steps a trial has. What holds in the second and in the third holds in those after."""

_LATER = range(1, STEPS)
_GROWING = frozenset([Axis.GROWING, Axis.BOTH_GROWING])


class LaterSteps(NamedTuple):
    """What passes the sites of a generation's later steps.

    Attributes:
        layouts: how it is cut, where it can be.
        places: where anything passes.
    """

    layouts: Layouts
    places: frozenset[Place]

    def grows(self, address: Address) -> bool:
        """Returns whether what arrives at a site has more positions in each step."""
        found = leaves(self.layouts.get(address[1:4]))
        return any(_GROWING.intersection(leaf.axes) for leaf in found)


def find_later_steps(
    go_on: Callable[[Prompt, torch.Tensor], Any],
    prompts: Sequence[Prompt],
    batch: Prompt,
    parts: Sequence[Part],
    tree: Tree,
    views: Mapping[str, View],
    stepped: str,
    inside: Collection[str],
) -> LaterSteps:
    """Returns how values of later steps are cut into the parts of prompts.

    Args:
        go_on: generates the given tokens `(rows, STEPS)` behind a prompt.
        prompts: prompts of different length, of one row each.
        batch: all of them.
        parts: where each of them lies in it.
        tree: the model's tree. The caller holds it (see `exclusive`).
        views: how outputs are shown, by path.
        stepped: the path of the module whose calls are the steps.
        inside: the modules in whose forwards there are places too.
    """
    draw = torch.Generator().manual_seed(1)
    tokens = torch.stack(
        [
            prompt.ids[0, torch.randint(prompt.ids.shape[1], (STEPS,), generator=draw)]
            for prompt in prompts
        ]
    )
    with undisturbed(tree):

        def seen(prompt: Prompt, chosen: torch.Tensor) -> list[dict[Place, Any]]:
            steps = _Steps(stepped)
            with listening(tree.modules, views, steps.tell, inside, CACHES):
                go_on(prompt, chosen)
            return steps.seen

        together = seen(batch, tokens)
        alone = [seen(prompt, own[None]) for prompt, own in zip(prompts, tokens, strict=True)]
    shapes = [prompt.ids.shape for prompt in (batch, *prompts)]
    sizes = [Size(rows, length, step) for rows, length in shapes for step in _LATER]
    passing = [run[step] for run in (together, *alone) for step in _LATER]
    layouts = find_layouts(passing, sizes)
    right = {
        place: layout
        for place, layout in layouts.items()
        if all(
            tells_apart(together[step][place], layout)
            and all(
                agrees(
                    place, together[step][place], own[step][place], layout, part._replace(step=step)
                )
                for own, part in zip(alone, parts, strict=True)
            )
            for step in _LATER
        )
    }
    return LaterSteps(right, frozenset(place for step in _LATER for place in together[step]))


class _Steps:
    """Keeps what passes each place in each step of a generation.

    Args:
        stepped: the path of the module whose calls are the steps.
    """

    def __init__(self, stepped: str) -> None:
        self.seen: list[dict[Place, Any]] = [{} for _ in range(STEPS)]
        self._stepped = stepped
        self._step = -1
        self._before: dict[tuple[int, str], int] = {}  # calls in the steps before

    def tell(self, place: Place, value: Any) -> None:
        path, kind, call = place
        if path == self._stepped and kind == "inputs":
            self._step += 1
        if self._step in _LATER:
            first = self._before.setdefault((self._step, path), call)
            self.seen[self._step][path, kind, call - first] = copied_away(value)
