"""Documents of files: lines of text, JSON lines, and columns of Parquet."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import msgspec

from insitu import disk
from insitu.graph.errors import LoadError, MissingPackageError, OptionError, nearest
from insitu.graph.location import here
from insitu.harvest.data.columns import chosen_column, mask_of_padding
from insitu.harvest.data.documents import (
    Document,
    Documents,
    Unusable,
    document_of,
    unpadded_document,
)
from insitu.harvest.specification import DataSpecification

_CHUNK = 1 << 20
_ROWS = 256  # of a Parquet file that are in memory at once


def documents_of_files(paths: Sequence[Path], column: str | None) -> Documents:
    """Returns the documents of files, one file after the other.

    In a .txt each line that is not blank is a document. In a .jsonl each line is an object with
    the column in it, or a text, or a list of token ids.

    Args:
        paths: the files, all of one kind.
        column: the column with texts or token ids, of JSON lines and Parquet.

    Raises:
        OptionError: if they are of no known kind, or of several.
        LoadError: if one cannot be read.
    """
    kinds = {path.suffix for path in paths}
    readers: dict[str, Callable[[Path, str | None], Iterator[Document]]] = {
        ".txt": _lines, ".jsonl": _json_lines, ".json": _json_lines, ".parquet": _parquet
    }  # fmt: skip
    if len(kinds) > 1 or not kinds <= readers.keys():
        raise OptionError(
            f"Files end in .txt, .jsonl or .parquet, all in the same, and not in "
            f"{' and '.join(sorted(kinds))}.",
            here(),
        )
    kind = kinds.pop()
    if kind == ".txt" and column is not None:
        raise OptionError(f"A .txt has no columns, so `column={column!r}` means nothing.", here())
    for path in paths:
        disk.check_readable(path)
    if kind == ".parquet":
        column = _parquet_column(paths[0], column)
    told = DataSpecification(
        name=", ".join(path.name for path in paths), column=column, digest=_digest(paths)
    )

    def documents() -> Iterator[Document]:
        for path in paths:
            yield from readers[kind](path, column)

    # The digest says that rows that are passed over are the same, so nobody has to look at them.
    return Documents(told, lambda start: islice(documents(), start, None), jumps=True)


def _digest(paths: Sequence[Path]) -> str:
    """The digest of the contents of files."""
    told = hashlib.sha256()
    try:
        for path in paths:
            told.update(f"{path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    told.update(chunk)
    except OSError as error:
        raise LoadError(f"{str(path)!r} cannot be read: {error.strerror}.", here()) from None
    return told.hexdigest()


def _lines_of(path: Path) -> Generator[bytes]:
    """The lines of a file, without the mark that some editors put before text."""
    with path.open("rb") as file:
        for number, line in enumerate(file):
            yield line if number else line.removeprefix(codecs.BOM_UTF8)


def _lines(path: Path, column: str | None) -> Iterator[Document]:
    with closing(_lines_of(path)) as lines:
        for line in lines:
            if line.strip():
                try:
                    yield line.rstrip(b"\r\n").decode()
                except UnicodeDecodeError:
                    yield Unusable("it is no UTF-8")


def _json_lines(path: Path, column: str | None) -> Iterator[Document]:
    with closing(_lines_of(path)) as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                row: Any = msgspec.json.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                yield Unusable("it is no JSON")
                continue
            if isinstance(row, dict):
                # Rows of one file may have other columns, so it is chosen in each.
                name = column or next((one for one in ("text", "input_ids") if one in row), None)
                if name is None or name not in row:
                    yield Unusable(f"it has no column {name or 'text'!r}")
                    continue
                yield unpadded_document(row[name], row.get(mask_of_padding(name, row)))
            else:
                yield document_of(row)


def _parquet(path: Path, column: str | None) -> Iterator[Document]:
    with _opened_parquet(path) as file:
        if column not in file.schema_arrow.names:
            there = nearest(str(column), file.schema_arrow.names)
            raise LoadError(f"{str(path)!r} has no column {column!r}{there}.", here())
        mask = mask_of_padding(column, file.schema_arrow.names)
        columns = [column] if mask is None else [column, mask]
        for batch in file.iter_batches(_ROWS, columns=columns):
            masks = repeat(None) if mask is None else batch.column(mask).to_pylist()
            yield from map(unpadded_document, batch.column(column).to_pylist(), masks)


def _parquet_column(path: Path, column: str | None) -> str:
    with _opened_parquet(path) as file:
        return chosen_column(column, file.schema_arrow.names, path.name)


def _opened_parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise MissingPackageError(
            'Parquet files take pyarrow, which is not installed: `pip install "insitu[harvest]"`.',
            here(),
        ) from None
    try:
        return ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise LoadError(f"{str(path)!r} cannot be read: {error}", here()) from None
