"""Rotary embeddings whose frequencies depend on the longest row of a forward.

Two kinds of Transformers do: "longrope" has other frequencies beyond the length that a model was
first trained at, and "dynamic" has others for each length beyond it. A prompt that shares a
forward with a longer one would get the longer one's.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from insitu.engine.keeping import keep_attributes, set_attribute
from insitu.graph.changes import changing


class LengthDependence(NamedTuple):
    """From where on what a model computes depends on the longest row of a forward.

    Attributes:
        switches: the lengths beyond which frequencies are others.
        grows: the least length beyond which they are others for each length, None if there is none.
        pieces: the length beyond which padding changes what a prompt gives, because the model
            processes it in pieces (`pieces.py`); 0 if there is none, None if that was not tried.
    """

    switches: frozenset[int] = frozenset()
    grows: int | None = None
    pieces: int | None = None

    def sharing(self, length: int, steps: int = 1) -> Hashable:
        """Returns a key that is equal for prompts that are beside each other what they are alone.

        Args:
            length: how many tokens a prompt has.
            steps: how many forwards there are, each of one more token.
        """
        if self.pieces and length > self.pieces:
            return length
        if not self.switches and self.grows is None:
            return None
        last = length + steps - 1
        if self.grows is not None and last > self.grows:
            return length
        if any(length <= switch < last for switch in self.switches):
            return length
        return frozenset(switch for switch in self.switches if length > switch)


def length_dependence(module: nn.Module) -> LengthDependence:
    """Returns how the rotary embeddings of a model depend on the longest row of a forward.

    Args:
        module: the model, with weights or without.
    """
    switches: set[int] = set()
    grows: list[int] = []
    part: Any
    for part in _rotary(module):
        for kind, prefix in _kinds(part):
            if kind == "longrope":
                switches.add(_switch(part, prefix))
            elif "dynamic" in kind:
                grows.append(int(part.original_max_seq_len))
    return LengthDependence(frozenset(switches), min(grows, default=None))


def warn_of_lengths(dependence: LengthDependence, lengths: Sequence[int], steps: int) -> None:
    """Says that rows of one invocation do not have the values that they have alone.

    Args:
        dependence: how these depend on the longest row.
        lengths: how many tokens each row has.
        steps: how many forwards there are, each of one more token.
    """
    if len({dependence.sharing(length, steps) for length in lengths}) > 1:
        what = "The pieces of some layers" if dependence.pieces else "The rotary embeddings"
        warnings.warn(
            f"{what} of this model depend on the longest row of a forward, and the "
            f"rows of this prompt have {min(lengths)} to {max(lengths)} tokens: the shorter have "
            "other values than they have alone. An `invoke` for each prompt gives each what it has "
            "alone.",
            stacklevel=2,
        )


@contextmanager
def forgetting_lengths(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Lets forwards not depend on those before them, whose longest row "dynamic" ones remember.

    Args:
        parts: the modules that remember it, of `growing_parts`.
    """
    with changing() as changes:
        keep_attributes(changes, parts)
        for part in parts:
            for kind, prefix in _kinds(part):
                if "dynamic" in kind:
                    _forget(part, prefix)
        yield


def growing_parts(module: nn.Module) -> list[nn.Module]:
    """Returns the modules with frequencies that they change as rows get longer.

    Args:
        module: the model, with weights or without.
    """
    return [part for part in _rotary(module) if any("dynamic" in kind for kind, _ in _kinds(part))]


def _forget(part: Any, prefix: str) -> None:
    """Puts a module back to the frequencies for short rows."""
    set_attribute(part, f"{prefix}max_seq_len_cached", part.original_max_seq_len)
    original = getattr(part, f"{prefix}original_inv_freq")
    device = getattr(part, f"{prefix}inv_freq").device
    set_attribute(part, f"{prefix}inv_freq", original.to(device))


def _rotary(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if "rope_type" in vars(part)]


def _kinds(part: Any) -> list[tuple[str, str]]:
    """The kinds of frequencies that a module has, each with the prefix of its attributes."""
    kinds = part.rope_type
    if isinstance(kinds, Mapping):  # those of each type of layer
        return [(str(kind), f"{layer}_") for layer, kind in kinds.items()]
    return [(str(kinds), "")]


def _switch(part: Any, prefix: str) -> int:
    """The length beyond which a "longrope" module has other frequencies."""
    config = part.config
    given: Any = getattr(config, "rope_parameters", None) or {}
    given = given.get(prefix[:-1], given) if prefix else given
    name = "original_max_position_embeddings"
    return given.get(name) or getattr(config, name, None) or config.max_position_embeddings
