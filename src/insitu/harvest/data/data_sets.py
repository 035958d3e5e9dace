"""Documents of data sets of Hugging Face: open ones, and those that are named by an id."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, repeat
from typing import Any

from insitu.graph.errors import LoadError, MissingPackageError, OptionError
from insitu.graph.location import here
from insitu.harvest.data.columns import chosen_column, mask_of_padding
from insitu.harvest.data.documents import Document, Documents, unpadded_document
from insitu.harvest.specification import DataSpecification

_ROWS = 256  # that are in memory at once


def opened_data_set(
    name: str, split: str | None, column: str | None, revision: str | None, stream: bool
) -> Documents:
    """Returns the documents of a data set from the Hub, or from a folder.

    Args:
        name: its id, or a folder. A configuration stands behind a colon: "wikitext:wikitext-2-v1".
        split: which split, of a data set that has several.
        column: the column with texts or token ids.
        revision: which revision.
        stream: whether it is read over the network, in its order, and not stored.

    Raises:
        MissingPackageError: if the package `datasets` is not installed.
        LoadError: if it cannot be opened.
    """
    try:
        import datasets
    except ImportError:
        raise MissingPackageError(
            f"{name!r} is taken as the id of a data set, and `datasets` is not installed: "
            '`pip install "insitu[harvest]"`. Text of your own is given in a list.',
            here(),
        ) from None
    path, _, configuration = name.partition(":")
    try:
        opened: Any = datasets.load_dataset(
            path, configuration or None, split=split, revision=revision, streaming=stream
        )
    except Exception as error:  # whatever that package raises for files and networks
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise LoadError(f"The data set {name!r} cannot be opened: {said}", here()) from error
    return documents_of_data_set(opened, split, column, name, revision)


def documents_of_data_set(
    data: Any,
    split: str | None,
    column: str | None,
    name: str | None = None,
    revision: str | None = None,
) -> Documents:
    """Returns the documents of an open data set.

    Args:
        data: a `Dataset` or `IterableDataset`, or a dictionary of such by split.
        split: which split, of such a dictionary.
        column: the column with texts or token ids.
        name: what it was called; None for what it calls itself.
        revision: which revision it was opened at.

    Raises:
        OptionError: if it has several splits and none is named, or no such split or column.
    """
    if hasattr(data, "keys") and hasattr(data, "items"):
        splits = list(data.keys())
        if split is None and len(splits) > 1:
            raise OptionError(
                f"The data set has the splits {', '.join(splits)}: name one, such as "
                f"`split={splits[0]!r}`.",
                here(),
            )
        if split is not None and split not in splits:
            raise OptionError(f"The data set has no split {split!r}, but {splits}.", here())
        split = split or splits[0]
        data = data[split]
    called = name or getattr(data.info, "dataset_name", None) or type(data).__name__
    names = data.column_names  # a streamed one may not know before it is read
    if names is None:
        first = next(iter(data), None)
        names = [] if first is None else list(first)
    column = chosen_column(column, names, called)
    mask = mask_of_padding(column, names)
    told = DataSpecification(
        name=called,
        split=split or (str(data.split) if data.split is not None else None),
        column=column,
        revision=revision,
    )
    count = len(data) if hasattr(data, "__len__") else None
    if count is None:

        def streamed(start: int) -> Iterator[Document]:
            for row in islice(iter(data), start, None):
                yield unpadded_document(row.get(column), row.get(mask))

        return Documents(told, streamed, jumps=False)
    plain = data.select_columns([column] if mask is None else [column, mask]).with_format(None)

    def read(start: int) -> Iterator[Document]:
        for first in range(start, count, _ROWS):
            rows = plain[first : first + _ROWS]
            masks = repeat(None) if mask is None else rows[mask]
            yield from map(unpadded_document, rows[column], masks)

    return Documents(told, read, jumps=True, count=count)
