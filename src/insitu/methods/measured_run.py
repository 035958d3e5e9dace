"""What a metric is given: the run of one prompt, with all values that can be read in it.

A metric may be any function of any value of the run. That it may also be written as a function of
the logits of the prompt is the same thing in short: operations on the run itself are done with
these.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch

from insitu.graph.errors import OptionError, PathError
from insitu.graph.location import here
from insitu.graph.node import Ref
from insitu.graph.proxy import Proxy
from insitu.models.language_model import LanguageModel
from insitu.tracing.invocation import innermost


class Run(Proxy):
    """The run of one prompt, as a metric is given it.

    `run.logits` are its logits, `(1, position, vocabulary)`; `run.output` is what the model
    returns, with its fields; `run.blocks[3].block_out` and all other sites are as of the model.
    Itself it stands for the logits of the prompt alone, `(position, vocabulary)`, so that
    `run[-1, 5]` is the logit of token 5 at the last position. They are read only if asked for.

    Args:
        model: the model, in an open invocation.
        logits: the logits of the prompt, `(position, vocabulary)`, where nothing else of the run
            can be read; None for the run of the invocation.

    Raises:
        OptionError: outside of an invocation.
    """

    __slots__ = ("_invocation", "_node", "_subject")

    def __init__(self, model: LanguageModel, logits: Any = None) -> None:
        self._subject = model
        self._node = None if logits is None else logits._ref
        self._invocation: Any = None
        self._cell = None
        if logits is None:
            found, _ = innermost(model, 2)
            assert found is not None  # methods measure in invocations of their own
            self._invocation = found
            self._recording = found._recording
        else:
            self._recording = logits._recording

    @property
    def _ref(self) -> Ref:
        """The node of the logits, which are read when they are first used."""
        if self._node is None:
            try:
                self._node = self._subject.logits[0]._ref
            except PathError as error:  # an `AttributeError`, which would be looked for elsewhere
                said = str(error).splitlines()[0]
                raise OptionError(
                    f"This metric is of logits, and there are none: {said} A metric of something "
                    "else reads it in the run, such as "
                    "`lambda run: run.output.last_hidden_state[0, 0] @ direction`.",
                    here(3),
                ) from None
        return self._node

    @_ref.setter
    def _ref(self, ref: Ref) -> None:
        self._node = ref

    def __getitem__(self, key: Any) -> Any:
        """Takes numbers of the logits of the prompt alone, which have no axis of rows.

        Raises:
            OptionError: for a key that was written for logits with one, such as `[0, -1]`: of the
                vocabulary nobody takes the last entries, and a wrong number would come of it.
        """
        axes = [one for one in key if one is not None] if isinstance(key, tuple) else [key]
        plain = [one for one in axes if one is not ...]
        if len(plain) > 2 or (len(axes) == len(plain) == 2 and _is_from_the_end(axes[1])):
            raise _with_rows()
        found = super().__getitem__(key)
        return _Position(found._recording, found._ref) if isinstance(key, Integral) else found

    @property
    def is_short(self) -> bool:
        """Whether it was used in the place of the prompt's logits, which have no axis of rows."""
        return self._node is not None

    @property
    def logits(self) -> Any:
        """The logits, `(1, position, vocabulary)`; of a classifier `(1, label)`."""
        return self[None] if self._invocation is None else self._subject.logits

    @property
    def output(self) -> Any:
        """What the model returns: `run.output.last_hidden_state`, `run.output.logits`."""
        return self._of_run("output").output

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or hasattr(torch.Tensor, name):
            return super().__getattr__(name)
        self._of_run(name)
        return getattr(self._subject, name)

    def _of_run(self, name: str) -> Any:
        if self._invocation is None:
            raise OptionError(
                f"`run.{name}` cannot be read here: what circuits are measured by is a function of "
                "their logits, `run.logits`, because their edges lead to these.",
                here(3),
            )
        return self._invocation


class _Position(Proxy):
    """The logits at one position, `(vocabulary,)`: `[0][-1]` is refused as `[0, -1]` is."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        if _is_from_the_end(key):
            raise _with_rows()
        return super().__getitem__(key)


def _is_from_the_end(key: Any) -> bool:
    """Whether a key takes the last entries of an axis."""
    first = key.start if isinstance(key, slice) else key
    return isinstance(first, Integral) and int(first) < 0


def _with_rows() -> OptionError:
    return OptionError(
        "As a tensor, what a metric is given are the logits of one prompt, `(position, "
        "vocabulary)`: write `logits[-1, token]`, or `run.logits[0, -1, token]` with the "
        "axis of the prompt.",
        here(3),
    )


def stacked_values(saved: Sequence[Any]) -> torch.Tensor:
    """Returns what was measured in some runs, as numbers in float32, `(run,)`.

    Args:
        saved: what was saved in each.
    """
    return torch.stack([one.value for one in saved]).float()
