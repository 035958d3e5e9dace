"""What may be given as data, and how each form of it gives documents.

How files are read is in `files.py`, and data sets of Hugging Face in `data_sets.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from insitu.graph.errors import OptionError
from insitu.graph.location import here
from insitu.harvest.data.data_sets import documents_of_data_set, opened_data_set
from insitu.harvest.data.documents import Document, Documents, document_of
from insitu.harvest.data.files import documents_of_files
from insitu.harvest.folder.shard_file import bytes_of
from insitu.harvest.specification import DataSpecification

_FORMS = (
    "a data set of Hugging Face or the id of one, a path or several of .txt, .jsonl or .parquet, "
    "texts, lists of token ids, or a tensor of token ids"
)


def documents_of(
    data: Any,
    split: str | None = None,
    column: str | None = None,
    revision: str | None = None,
    stream: bool = False,
) -> Documents:
    """Returns the documents of some data.

    Args:
        data: a `Dataset` or `IterableDataset`; the id of one; a path or several; an iterable of
            texts or of lists of token ids; or a tensor of token ids `(rows, position)`.
        split: which split, of a data set that has several.
        column: the column with texts or token ids; None for "text", "input_ids" or the only one.
        revision: which revision of a data set from the Hub.
        stream: whether a data set that is given by its id is read over the network, in its order,
            and not stored.

    Raises:
        OptionError: if it is none of these, or an option means nothing to it.
        LoadError: if it cannot be read.
        MissingPackageError: if it takes a package that is not installed.
    """
    if isinstance(data, torch.Tensor):
        _refuse("a tensor", split=split, column=column, revision=revision, stream=stream)
        return _of_tensor(data)
    if _is_data_set(data):
        _refuse("a data set that is open", revision=revision, stream=stream)
        return documents_of_data_set(data, split, column)
    paths = _paths(data)
    if paths is not None:
        _refuse("files", split=split, revision=revision, stream=stream)
        return documents_of_files(paths, column)
    if isinstance(data, str):
        return opened_data_set(data, split, column, revision, stream)
    _refuse("prompts", split=split, column=column, revision=revision, stream=stream)
    if isinstance(data, Sequence) and not isinstance(data, bytes):
        return _of_list(data)
    if hasattr(data, "columns"):  # of pandas and others, whose loop gives names of columns
        raise OptionError(
            f"A {type(data).__name__} is a table: give one of its columns, such as `data['text']`, "
            "or make a data set of Hugging Face of it.",
            here(),
        )
    if isinstance(data, Iterable) and not isinstance(data, bytes | Mapping):
        return _of_iterable(data)
    raise OptionError(f"Data is {_FORMS}, not a {type(data).__name__}.", here())


def _of_tensor(ids: torch.Tensor) -> Documents:
    if ids.is_floating_point() or ids.dtype is torch.bool or ids.ndim not in (1, 2):
        raise OptionError(
            "Token ids are integers of the shape (rows, position), but this tensor has the shape "
            f"{tuple(ids.shape)} and is {ids.dtype}.",
            here(),
        )
    rows = (ids[None] if ids.ndim == 1 else ids).long().cpu().contiguous()
    digest = hashlib.sha256(repr(tuple(rows.shape)).encode())
    digest.update(bytes_of(rows))
    told = DataSpecification(name="tensor", digest=digest.hexdigest())

    def read(start: int) -> Iterator[Document]:
        for row in range(start, len(rows)):
            yield rows[row].tolist()

    return Documents(told, read, jumps=True, count=len(rows))


def _of_list(items: Sequence[Any]) -> Documents:
    digest = hashlib.sha256()
    for item in map(document_of, items):
        # With its length before it, so that no other cut gives the same bytes.
        content = item.encode("utf-8", "surrogatepass") if isinstance(item, str) else repr(item)
        content = content if isinstance(content, bytes) else content.encode()
        digest.update(f"{type(item).__name__} {len(content)}\n".encode())
        digest.update(content)
    told = DataSpecification(name="list", digest=digest.hexdigest())

    def read(start: int) -> Iterator[Document]:
        for place in range(start, len(items)):
            yield document_of(items[place])

    return Documents(told, read, jumps=True, count=len(items))


def _of_iterable(items: Iterable[Any]) -> Documents:
    once = iter(items) is items

    begun: list[int] = []

    def read(start: int) -> Iterator[Document]:
        if once and begun:
            raise OptionError(
                "The data can be read only once, and it was: give a list, a file or a data set.",
                here(),
            )
        begun.append(start)
        for number, item in enumerate(items):
            if number >= start:
                yield document_of(item)

    told = DataSpecification(name=type(items).__name__)
    return Documents(told, read, jumps=False, once=once)


def _paths(data: Any) -> list[Path] | None:
    """The files that are meant, None if it is something else."""
    if isinstance(data, os.PathLike):
        return [Path(data)]
    if isinstance(data, str):
        return [Path(data)] if _names_file(data) else None
    if not isinstance(data, list | tuple) or not data:
        return None
    if all(isinstance(one, os.PathLike) for one in data):
        return [Path(one) for one in data]
    # Texts may end in anything. They are paths only if all of them are there.
    texts = all(isinstance(one, str) and _names_file(one) for one in data)
    return [Path(one) for one in data] if texts and all(map(_is_there, data)) else None


def _names_file(text: str) -> bool:
    return text.endswith((".txt", ".jsonl", ".json", ".parquet")) and "\n" not in text


def _is_there(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def _is_data_set(data: Any) -> bool:
    """Whether it is a data set of Hugging Face, without importing their package."""
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(data).__mro__}
    known = ("arrow_dataset.Dataset", "iterable_dataset.IterableDataset")
    known += ("dataset_dict.DatasetDict", "dataset_dict.IterableDatasetDict")
    return bool(kinds & {f"datasets.{one}" for one in known})


def _refuse(what: str, **given: Any) -> None:
    """Raises if an option was given that means nothing to some data."""
    for name, value in given.items():
        if value:
            raise OptionError(f"`{name}={value!r}` means nothing to {what}.", here())
