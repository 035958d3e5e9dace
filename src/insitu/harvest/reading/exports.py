"""Activations in the forms of others: NumPy arrays, and the data sets that SAELens reads.

SAELens's `ActivationsStore` reads a data set of Hugging Face with a row for each sequence: a column
of activations, `(context, width)`, under the name of the hook, and `token_ids`, `(context,)`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from insitu import disk
from insitu.graph.errors import MissingPackageError, OptionError, SaveError
from insitu.graph.location import here
from insitu.harvest.reading.shards import Shards
from insitu.harvest.reading.stored_rows import StoredRows
from insitu.harvest.specification import SiteSpecification
from insitu.methods.sites import check_count
from insitu.models.keys import spelled
from insitu.models.transformer_lens import OF_BLOCK, Standard

_FILE_BYTES = 500 * 2**20
"""How large a file of Arrow becomes, about: what `datasets` itself writes."""
_PIECE_BYTES = 16 * 2**20
"""How many bytes of activations are in memory at once."""

_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written for another library.

    Attributes:
        folder: where.
        column: the column of the activations.
        sequences: how many sequences there are, each of `context` rows.
        context: how many rows each has.
        left_out: how many rows were left out, since no whole sequence was left of them.
    """

    folder: Path
    column: str
    sequences: int
    context: int
    left_out: int


def to_numpy(rows: StoredRows[Any], index: Any = None) -> np.ndarray[Any, Any]:
    """Returns rows as an array. Of bfloat16, which NumPy has not, float32 with the same values.

    Args:
        rows: of a dense site.
        index: which rows; None for all.
    """
    taken = rows[slice(None) if index is None else index]
    known = taken.dtype not in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    return (taken if known else taken.float()).numpy()


def hook_name_of(label: str) -> str:
    """Returns what TransformerLens calls a site, such as "blocks.6.hook_resid_post".

    Args:
        label: of a site. One that it has no name for is called by its label.
    """
    name, _, layer = label.rpartition(":")
    key = spelled(name) if layer.isdecimal() else None
    for hook, meaning in OF_BLOCK.items():
        if isinstance(meaning, Standard) and meaning.key == key:
            return f"blocks.{layer}.{hook}"
    return label


def to_arrow(
    folder: str | os.PathLike[str],
    site: SiteSpecification,
    rows: StoredRows[torch.Tensor],
    token_ids: StoredRows[torch.Tensor],
    sequence: StoredRows[torch.Tensor],
    shards: Shards,
    *,
    context: int,
    column: str,
    dtype: str | torch.dtype | None,
) -> Exported:
    """Writes a site as the data set that SAELens reads: see `Activations.to_arrow`."""
    check_count("context", context)
    stored = _dtype(site, dtype)
    pa, features = _features(column, context, rows, stored)
    path = _empty(folder)
    pieces = _Pieces(rows, token_ids, sequence, shards, context, stored)
    files = _write(path, pa, features, pieces)
    if not pieces.sequences:
        raise OptionError(
            f"No sequence has {context} rows: give another `context=`, or harvest with `pack=True`,"
            " so that every sequence is full.",
            here(),
        )
    _describe(path, features, files)
    left_out = len(rows) - pieces.sequences * context
    return Exported(path, column, pieces.sequences, context, left_out)


class _Pieces:
    """Whole sequences of a folder, some at a time.

    Attributes:
        sequences: how many were given.
    """

    def __init__(
        self,
        rows: StoredRows[torch.Tensor],
        token_ids: StoredRows[torch.Tensor],
        sequence: StoredRows[torch.Tensor],
        shards: Shards,
        context: int,
        dtype: torch.dtype,
    ) -> None:
        self._rows, self._token_ids, self._sequence = rows, token_ids, sequence
        self._shards, self._context, self._dtype = shards, context, dtype
        self.sequences = 0

    def __iter__(self) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """Gives activations `(sequences, context, width)` and token ids `(sequences, context)`."""
        width = max(int(np.prod(self._rows.shape[1:])), 1)
        most = max(_PIECE_BYTES // (width * self._context * 4), 1)
        for first, stop in zip(self._shards.starts, self._shards.starts[1:], strict=False):
            starts = self._starts(int(first), int(stop))
            for at in range(0, len(starts), most):
                some = starts[at : at + most]
                numbers = (some[:, None] + np.arange(self._context)).reshape(-1)
                rows = self._rows[numbers]
                taken = rows.to(self._dtype)
                if bool((taken.isinf() & rows.isfinite()).any()):
                    name = str(self._dtype).removeprefix("torch.")
                    raise OptionError(
                        f"Some values are larger than {name} can hold: write `dtype='float32'`.",
                        here(),
                    )
                shape = (len(some), self._context)
                self.sequences += len(some)
                values, ids = taken.numpy(), self._token_ids[numbers].numpy()
                yield values.reshape(*shape, -1), ids.reshape(shape)

    def _starts(self, first: int, stop: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Where whole sequences of a shard begin; of one of twice as many rows, both halves."""
        numbers = self._sequence[first:stop].numpy()
        begins = np.flatnonzero(np.diff(numbers, prepend=numbers[:1] - 1))
        counts = np.diff(begins, append=len(numbers)) // self._context
        starts = np.repeat(begins, counts)
        number = np.arange(len(starts)) - np.repeat(counts.cumsum() - counts, counts)
        return first + starts + number * self._context


def _dtype(site: SiteSpecification, asked: str | torch.dtype | None) -> torch.dtype:
    if asked is None:
        return torch.float16 if site.dtype == "float16" else torch.float32
    name = str(asked).removeprefix("torch.")
    if name not in _DTYPES:
        raise OptionError(f"`dtype` is float16 or float32, which Arrow has, not {name}.", here())
    return _DTYPES[name]


def _features(
    column: str, context: int, rows: StoredRows[torch.Tensor], dtype: torch.dtype
) -> tuple[Any, Any]:
    """The package `pyarrow`, and the features of the data set."""
    try:
        import pyarrow
        from datasets import Array2D, Features, Sequence, Value
    except ImportError:
        raise MissingPackageError(
            "Arrow files take datasets, which is not installed: `pip install 'insitu[harvest]'`.",
            here(),
        ) from None
    width = int(np.prod(rows.shape[1:]))
    name = str(dtype).removeprefix("torch.")
    features = {
        column: Array2D(shape=(context, width), dtype=name),
        "token_ids": Sequence(Value("int32"), length=context),
    }
    if len(features) < 2:
        raise OptionError('The column of activations cannot be called "token_ids".', here())
    return pyarrow, Features(features)


def _empty(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise OptionError(f"The folder {os.fspath(folder)!r} is not empty.", here())
    except (OSError, ValueError) as error:
        if isinstance(error, OptionError):
            raise
        raise SaveError(f"{os.fspath(folder)!r} cannot be made: {error}.", here()) from None
    return path


def _write(path: Path, pa: Any, features: Any, pieces: _Pieces) -> list[Path]:
    """Writes pieces into files of Arrow, which have their final names later."""
    column = next(iter(features))
    schema = features.arrow_schema
    files: list[Path] = []
    writer: Any = None
    try:
        for values, token_ids in pieces:
            if writer is None:
                files.append(path / f"{len(files):05}.arrow")
                written, writer = 0, pa.ipc.new_stream(str(files[-1]), schema)
            kind = schema.field(column).type
            arrays = [
                _nested(pa, values, kind),
                _lists(pa, token_ids, schema.field("token_ids").type),
            ]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            written += values.nbytes
            if written >= _FILE_BYTES:
                writer.close()
                writer = None
    except BaseException as error:
        # Nothing is left, so that the same folder can be given again.
        for file in files:
            file.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise SaveError(f"{str(path)!r} cannot be written: {error}.", here()) from None
        raise
    finally:
        if writer is not None:
            writer.close()
    return files


def _nested(pa: Any, values: np.ndarray[Any, Any], kind: Any) -> Any:
    """Values `(sequences, context, width)` as lists of lists, which are not copied."""
    sequences, context, width = values.shape
    inner = np.arange(0, values.size + 1, width, dtype=np.int32) if width else None
    if inner is None:
        inner = np.zeros(sequences * context + 1, np.int32)
    flat = pa.ListArray.from_arrays(inner, pa.array(values.reshape(-1)))
    outer = np.arange(0, sequences * context + 1, context, dtype=np.int32)
    return pa.ExtensionArray.from_storage(kind, pa.ListArray.from_arrays(outer, flat))


def _lists(pa: Any, values: np.ndarray[Any, Any], kind: Any) -> Any:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1]).cast(
        kind
    )


def _describe(path: Path, features: Any, files: list[Path]) -> None:
    """Gives files their names and writes what `datasets` reads first: then the folder is whole."""
    from datasets import DatasetInfo

    names = [f"data-{number:05}-of-{len(files):05}.arrow" for number in range(len(files))]
    for file, name in zip(files, names, strict=True):
        file.rename(path / name)
    DatasetInfo(features=features).write_to_directory(str(path))
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": uuid4().hex[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    disk.write(path / "state.json", json.dumps(state, indent=2))
