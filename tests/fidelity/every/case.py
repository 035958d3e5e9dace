"""One model under its two looks: what plain hooks see of it, and what the library reads in it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import nn

from insitu import LanguageModel, PathError
from tests.fidelity.every.plain import (
    Inputs,
    Plain,
    forward,
    run_plainly,
    with_eager_attention,
)
from tests.fidelity.every.verdict import State, Verdict

Tensor = torch.Tensor
_RETURNED = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")


class Case:
    """A model, and what came of its names so far.

    Args:
        module: the model.
        inputs: keyword arguments of its forward, `input_ids` among them: at least two rows.
    """

    def __init__(self, module: nn.Module, inputs: Inputs) -> None:
        self.module = module
        self.inputs = inputs
        self.plain: Plain = run_plainly(module, inputs)
        self.found: dict[str, list[Verdict]] = {}
        self.given = 0  # how many names were there of those that were asked for

    @cached_property
    def model(self) -> LanguageModel:
        """The wrapped model."""
        return LanguageModel(self.module)

    @cached_property
    def attentions(self) -> list[tuple[str, Tensor]]:
        """The patterns that the model itself returns with eager attention, by what it calls them.

        A model that returns none has nothing to compare with: some take the option and fail.
        """
        try:
            with torch.no_grad():
                eager = with_eager_attention(self.module)
                output = forward(eager, self.inputs, output_attentions=True)
        except Exception:
            return []
        values = [(name, getattr(output, name, None)) for name in _RETURNED]
        return [
            (name, one.float())
            for name, value in values
            for one in (value if isinstance(value, tuple | list) else ())
            if isinstance(one, Tensor)
        ]

    def say(self, column: str, state: State, reason: str = "") -> None:
        """Notes what came of a name."""
        self.found.setdefault(column, []).append(Verdict(state, reason))

    def there(self, column: str, part: Any, *names: str) -> list[str]:
        """Returns which names of a part there are, and notes why the others are not."""
        there = []
        for name, reason in self._reasons(part, names).items():
            if reason is None:
                there.append(name)
            else:
                self.say(column, "refused", f"{name}: {reason}")
        self.given += len(there)
        return there

    def has(self, part: Any, name: str) -> bool:
        """Returns whether a part has a name."""
        return self._reasons(part, [name])[name] is None

    def _reasons(self, part: Any, names: Iterable[str]) -> dict[str, str | None]:
        """Why names of a part are refused, before anything has run; None of those that are not."""
        reasons: dict[str, str | None] = {}
        with self.model.scan(self.inputs["input_ids"], **self._others()):
            for name in names:
                try:
                    part.role[name]
                    reasons[name] = None
                except PathError as error:
                    reasons[name] = reason_of(error)
        return reasons

    def read(self, *values: tuple[Any, str]) -> list[Tensor]:
        """Returns values by name, of one run."""
        with self.opened():
            saved = [
                (part.output if name == "output" else part.role[name]).save()
                for part, name in values
            ]
        return [one.value.float() for one in saved]

    def opened(self) -> Any:
        """Returns a block of one run with the inputs."""
        return self.model.trace(self.inputs["input_ids"], **self._others())

    def _others(self) -> dict[str, Tensor]:
        return {key: value for key, value in self.inputs.items() if key != "input_ids"}


def reason_of(error: PathError) -> str:
    """Returns why a name is refused, without the path of the part that has it not."""
    first = str(error).splitlines()[0]
    return first.partition(": ")[2] or first
