"""`Results`: what a job gives, by the names of saved values, and as a safetensors file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from insitu import disk
from insitu.display.saved_values import SavedValue
from insitu.engine.job_outcome import Failure, Outputs
from insitu.graph.errors import (
    LoadError,
    NotCachedError,
    NoValueError,
    WireError,
    nearest,
)
from insitu.graph.location import here
from insitu.graph.shapes import dtype_of, shape_of
from insitu.graph.structure import tensors_of


class Results(Mapping[str, Any]):
    """What a job gives: `results["logits"]` is what was saved with `.save("logits")`.

    What was saved without a name has the number of its place among all saved values: "0" is the
    first. A value has the structure that it had in the run: a tensor, a tuple, a dictionary, or a
    list with an entry for each step. A value that was allowed to be missing, and is, is None.

    Args:
        values: the saved values, by name.
        about: as of the attributes, and so are the others.
        outputs: as of the attributes.
        differences: as of the attributes.
        failed: as of the attributes.
        gradients: as of the attributes.

    Attributes:
        about: the expression that each value was saved of, such as "transformer.h[3].output[0]".
        outputs: what the generation of each block of the job returned, None for a trace.
        differences: how the model differs from the one that the job was made for, as far as that
            is known without comparing weights.
        failed: what failed, in the order of the blocks and of their invocations.
        gradients: of a job that came from elsewhere, what its run has added to the gradient of
            each of `job.leaves`, None where it has none.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        about: Mapping[str, str],
        outputs: Sequence[Outputs | None] = (),
        differences: Sequence[str] = (),
        failed: Sequence[Failure] = (),
        gradients: Sequence[torch.Tensor | None] = (),
    ) -> None:
        self._values = dict(values)
        self.about = about
        self.outputs = outputs
        self.differences = differences
        self.failed = failed
        self.gradients = gradients

    @property
    def output(self) -> Any:
        """What the job's generation returned, as `generator.output`: token ids `(rows, position)`.

        Raises:
            NoValueError: if there is none, or there are several: see `outputs`.
        """
        generated = [output for output in self.outputs if output is not None]
        if len(generated) == 1 and generated[0].whole is None:
            raise NoValueError(
                "A prompt of this generation has failed, so there is no output of all of them: "
                "`results.outputs[0].each` has those of the others.",
                here(),
            )
        if len(generated) != 1:
            raise NoValueError(
                f"These are results of {len(generated) or 'no'} generations: `results.outputs` "
                "has what each block's returned.",
                here(),
            )
        return generated[0].whole

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            for one in self.failed:
                if name in one.names:
                    raise NotCachedError(
                        f"{name!r} has no value, since its run has failed: {one.error}", here()
                    )
            near = nearest(name, self._values) or f": there are {', '.join(self._values) or 'none'}"
            raise NotCachedError(f"Nothing was saved as {name!r}{near}.", here())
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def to_bytes(self) -> bytes:
        """Returns the results as the bytes of a safetensors file, for `from_bytes`.

        Any reader of safetensors gets the tensors: one that was saved by itself has its name, and
        the parts of a tuple `x` are "x/0", "x/1". What models of Transformers return keeps its
        class, or becomes a plain `ModelOutput` if the class is not of Transformers. Dictionaries
        and tuples of other classes become plain ones.

        Raises:
            WireError: if a value is no data, such as a cache of keys and values.
        """
        from insitu.engine.results_file import Stored, to_bytes

        about, outputs, gradients = self.about, self.outputs, self.gradients
        return to_bytes(
            Stored(self._values, about, outputs, self.differences, self.failed, gradients)
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Results:
        """Returns the results that `to_bytes` made bytes of. Bytes from anybody can be read.

        Args:
            data: the bytes.

        Raises:
            WireError: if they are no results, or of another version of Insitu.
        """
        from insitu.engine.results_file import from_bytes

        return cls(*from_bytes(data))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the results to a safetensors file, whole or not at all.

        Args:
            path: the file.

        Raises:
            WireError: if a value is no data.
            OptionError: if there is no such folder.
            SaveError: if the file cannot be written.
        """
        disk.write(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Results:
        """Returns the results in a file.

        Args:
            path: a file that `save` has written.

        Raises:
            LoadError: if it cannot be read, or holds no results.
        """
        data = disk.read(path)
        try:
            return cls.from_bytes(data)
        except WireError as error:
            raise LoadError(f"{os.fspath(path)!r} cannot be read: {error}", here()) from None

    def described(self) -> list[SavedValue]:
        """Returns what each saved value is, without its numbers."""
        return [
            SavedValue(
                name,
                self.about.get(name, ""),
                structure(shape_of(value)),
                structure(dtype_of(value)),
                sum(one.numel() * one.element_size() for one in tensors_of(value)),
            )
            for name, value in self._values.items()
        ]

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} of {len(self)} saved value{'s' * (len(self) != 1)}"]
        for one, value in zip(self.described(), self._values.values(), strict=True):
            shown = f"{one.dtype} {one.shape}" if tensors_of(value) else f"{value!r:.60}"
            lines.append(f"  {one.name}: {shown}  # {one.saved_of}")
        return "\n".join(lines)


def structure(found: Any) -> str:
    """Returns sizes or dtypes in the structure of a value, as they are shown; "?" for None.

    Args:
        found: the sizes or dtypes.
    """
    if isinstance(found, torch.Size):
        return str(tuple(found))
    if isinstance(found, torch.dtype):
        return str(found).removeprefix("torch.")
    if isinstance(found, Mapping):
        entries = cast("Mapping[Any, Any]", found).items()
        return f"{{{', '.join(f'{key}: {structure(item)}' for key, item in entries)}}}"
    if isinstance(found, tuple | list):
        items = [structure(item) for item in cast("list[Any]", found)]
        alike = len(items) > 1 and len(set(items)) == 1
        return f"{len(items)} of {items[0]}" if alike else f"[{', '.join(items)}]"
    return "?"
