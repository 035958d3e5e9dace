"""`Activations`: a folder that `harvest` has written, as rows that are read when asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from insitu.display.rows import rows_html
from insitu.graph.errors import LoadError, NotCachedError, OptionError
from insitu.graph.location import here
from insitu.harvest.layout import (
    DOCUMENT,
    POSITION,
    ROW_TENSORS,
    SEQUENCE,
    TOKEN_IDS,
    Skipped,
)
from insitu.harvest.reading.batch_parts import Where
from insitu.harvest.reading.batches import Batches
from insitu.harvest.reading.checking import BrokenShard, broken_shards
from insitu.harvest.reading.drawing import HEAD, site_rows, site_table, summary
from insitu.harvest.reading.exports import Exported, hook_name_of, to_arrow, to_numpy
from insitu.harvest.reading.opening import Contents, read_contents
from insitu.harvest.reading.shards import Shards
from insitu.harvest.reading.shuffling import Shuffle
from insitu.harvest.reading.site_names import site_called
from insitu.harvest.reading.site_statistics import Statistics, statistics_of
from insitu.harvest.reading.stored_rows import StoredRows, rows_of_place, rows_of_site
from insitu.harvest.reading.torch_data import ActivationDataset
from insitu.harvest.specification import SiteSpecification, Specification

if TYPE_CHECKING:
    from typing import Self

    from rich.console import Console, ConsoleOptions, RenderResult


class Activations:
    """Activations of a data set, in a folder that `harvest` has written.

    `activations["residual_out:6"][rows]` reads rows of a site. `activations.token_ids`, `sequence`,
    `position` and `document` say where rows come from, and take the same index: a number, a slice,
    a list or tensor of numbers, or a mask. The result is a copy. Nothing is read that was not
    asked for, and an object of this class takes next to no memory. It shows the folder as
    it was when it was opened: open it again for what a running harvest has added.

    It can be used from several threads, pickled, and sent to other processes of this machine.

    Args:
        folder: the folder.
        contents: what it says of itself.

    Example:
        `activations = Activations.open(folder); activations["residual_out:6"][:1000]`
    """

    def __init__(self, folder: Path, contents: Contents) -> None:
        self._folder = folder
        self._contents = contents
        self._shards = Shards(folder, contents)
        self._sites = {site.label: site for site in contents.specification.sites}

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Self:
        """Opens a folder. Files that its manifest does not list are not read.

        Args:
            folder: what `harvest` was told to write to. The harvest need not be at its end.

        Raises:
            LoadError: if it is no folder of activations, or one that is broken or of another
                version.
        """
        try:
            path = Path(os.path.abspath(folder))  # still the same after a change of folder
        except ValueError as error:
            raise LoadError(f"{folder!r} cannot be opened: {error}", here()) from None
        return cls(path, read_contents(path))

    @property
    def folder(self) -> Path:
        """The folder."""
        return self._folder

    @property
    def specification(self) -> Specification:
        """Everything that the numbers depend on: the model, the data, the sites."""
        return self._contents.specification

    @property
    def sites(self) -> tuple[str, ...]:
        """The labels of the sites, such as "residual_out:6"."""
        return tuple(self._sites)

    @property
    def rows(self) -> int:
        """How many rows there are of each site."""
        return self._shards.rows

    @property
    def tokens(self) -> int:
        """How many tokens the model was given: as many as rows, unless sequences were reduced."""
        return sum(line.tokens for line in self._contents.lines)

    @property
    def sequences(self) -> int:
        """How many sequences the model was given."""
        return sum(line.sequences for line in self._contents.lines)

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """The rows of the data that could not be used, with the reasons."""
        return tuple(one for line in self._contents.lines for one in line.skipped)

    @property
    def complete(self) -> bool:
        """Whether the harvest has come to its end."""
        return self._contents.complete

    @property
    def bytes(self) -> int:
        """How many bytes the shards take on disk."""
        return sum(line.bytes for line in self._contents.lines)

    def __len__(self) -> int:
        return self.rows

    def __contains__(self, site: object) -> bool:
        try:
            return site_called(self._sites, site) is not None
        except NotCachedError:
            return False

    def __iter__(self) -> Any:
        return iter(self._sites)

    def shape(self, site: str) -> tuple[int, ...]:
        """Returns the shape of one row of a site; `(k,)` of one that keeps the largest features.

        Raises:
            NotCachedError: if there is no such site.
        """
        return self.site(site).shape

    def dtype(self, site: str) -> torch.dtype:
        """Returns the dtype in which a site is stored; of features, that of their values.

        Raises:
            NotCachedError: if there is no such site.
        """
        return self[site].dtype

    def site(self, site: str) -> SiteSpecification:
        """Returns what the specification says of a site, by its label or as it was asked for.

        Raises:
            NotCachedError: if there is no such site.
        """
        return site_called(self._sites, site)

    def __getitem__(self, site: str) -> StoredRows[Any]:
        return rows_of_site(self._shards, self.site(site))

    @property
    def token_ids(self) -> StoredRows[torch.Tensor]:
        """The token at each row, int32; -1 for a row that was made of several positions."""
        return rows_of_place(self._shards, TOKEN_IDS)

    @property
    def sequence(self) -> StoredRows[torch.Tensor]:
        """The sequence of each row, int64, counted from 0 over the whole folder."""
        return rows_of_place(self._shards, SEQUENCE)

    @property
    def position(self) -> StoredRows[torch.Tensor]:
        """The position of each row in its sequence, int32; -1 if it was made of several."""
        return rows_of_place(self._shards, POSITION)

    @property
    def document(self) -> StoredRows[torch.Tensor]:
        """The row of the data that each row comes from, int64."""
        return rows_of_place(self._shards, DOCUMENT)

    def batches(
        self,
        size: int,
        sites: str | Sequence[str] | None = None,
        *,
        shuffle: bool | Shuffle = True,
        seed: int = 0,
        buffer: int = 65_536,
        where: Where | None = None,
        drop_last: bool = False,
        resume: Mapping[str, Any] | None = None,
    ) -> Batches:
        """Returns batches of rows: each row once an epoch, in an order of its own each epoch.

        `for batch in batches` is an epoch, or the rest of one; the next loop is the next epoch.
        A batch is a dictionary: each site under its label, and `token_ids`, `sequence`,
        `position` and `document`. Memory is bounded by `buffer` rows and a batch.

        `shuffle=True` reads runs of 64 rows that follow each other, in an order drawn over the
        whole folder, gathers `buffer` rows of such runs, and draws the order in which they are
        given. So reading is nearly sequential. Rows of one run are given within `buffer` rows of
        each other: a batch has about `64 * size / buffer` rows of a run that it has one of, where
        a full shuffle has next to none. `shuffle="full"` draws an order of all rows; it takes 8
        bytes of memory for each row of the folder, and reads single rows.

        Args:
            size: how many rows a batch has.
            sites: one or several; None for all.
            shuffle: True, "full", or False for the order of the data.
            seed: the order is a function of it, of the number of the epoch, `shuffle` and
                `buffer`: neither of `size` nor of `sites`.
            buffer: how many rows are held in memory, and mixed with each other.
            where: a function of `(token_ids, position, sequence)`, `(rows,)` each, that returns
                a mask of the rows to give, `(rows,)`. So the first token of each sequence is left
                out by `where=lambda token_ids, position, sequence: position > 0`.
            drop_last: whether the last batch of an epoch is left out if it is smaller.
            resume: the `state` of batches that were given before. They go on behind it.

        Raises:
            NotCachedError: if there is no such site.
            OptionError: if an option has no meaning, or the state is of another order.
        """
        options: Any = {"shuffle": shuffle, "seed": seed, "buffer": buffer, "state": resume}
        return Batches(self._columns(sites), size, **options, where=where, drop_last=drop_last)

    def dataset(
        self,
        size: int,
        sites: str | Sequence[str] | None = None,
        *,
        shuffle: bool | Shuffle = True,
        seed: int = 0,
        buffer: int = 65_536,
        where: Where | None = None,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> ActivationDataset:
        """Returns the same batches as a data set of PyTorch, for `DataLoader(dataset, None)`.

        Each row is given once an epoch, over all workers and all ranks together, however few
        shards there are: each reader gets as many rows as another, or one more. `set_epoch`
        chooses the order. Each worker holds up to `buffer` rows.

        Args:
            size: how many rows a batch has. The `DataLoader` itself is given `batch_size=None`.
            sites: as for `batches`. All ranks give the same, and so for the next four.
            shuffle: as for `batches`.
            seed: as for `batches`.
            buffer: as for `batches`.
            where: as for `batches`.
            drop_last: whether all batches have `size` rows. Without `where` all workers and ranks
                give as many of them then, as training on several ranks needs.
            rank: of this process; None for that of `torch.distributed`, if it is initialised when
                the data set is made.
            world_size: among how many ranks the rows are divided; None for the number of ranks of
                `torch.distributed`, if it is initialised then.

        Raises:
            NotCachedError: if there is no such site.
            OptionError: if an option has no meaning.
        """
        options: Any = {"shuffle": shuffle, "seed": seed, "buffer": buffer, "where": where}
        options.update(drop_last=drop_last, rank=rank, world_size=world_size)
        return ActivationDataset(self._columns(sites), size, **options)

    def statistics(self, site: str) -> Statistics:
        """Returns the mean, the mean norm and the trace of the covariance of a site's rows.

        They were summed up when the rows were written: no row is read.

        Args:
            site: a dense site.

        Raises:
            NotCachedError: if there is no such site.
            OptionError: if it keeps the largest features only, or there are no rows.
            LoadError: if a shard is broken.
        """
        found = self._check_dense(site)
        if not self.rows:
            raise OptionError("There are no rows yet to have statistics of.", here())
        shards = map(self._shards.opened, range(len(self._shards)))
        return statistics_of(shards, found.label, found.shape, self.rows)

    def to_numpy(self, site: str, rows: Any = None) -> np.ndarray[Any, Any]:
        """Returns rows of a dense site as an array of NumPy, in memory.

        Args:
            site: the site.
            rows: an index of rows; None for all.

        Returns:
            `(rows, *shape)`. Of bfloat16, which NumPy has not, float32 with the same values.

        Raises:
            NotCachedError: if there is no such site.
            OptionError: if it keeps the largest features only.
        """
        self._check_dense(site)
        return to_numpy(self[site], rows)

    def to_arrow(
        self,
        folder: str | os.PathLike[str],
        site: str,
        *,
        context: int | None = None,
        column: str | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> Exported:
        """Writes a site as the data set of Hugging Face that SAELens reads.

        That is `cached_activations_path=` of its `LanguageModelSAERunnerConfig`. Each row of the
        data set is a sequence. Those that are shorter than the context are left out, which is
        counted: harvest with `pack=True`, and there are next to none.

        Args:
            folder: where to: an empty folder, or none that exists. It is a data set for
                `datasets.load_from_disk`.
            site: a dense site. Rows with several axes, such as of heads, are flattened.
            context: how many rows a sequence has; None for the context of the harvest.
            column: what the column is called; None for the name that TransformerLens has for the
                site, such as "blocks.6.hook_resid_post", or else its label.
            dtype: float16 or float32; None for float16 if it is stored so, else float32.

        Returns:
            What was written.

        Raises:
            NotCachedError: if there is no such site.
            OptionError: if it keeps the largest features only, the folder is not empty, no
                sequence is so long, or Arrow has no such dtype.
            MissingPackageError: if datasets is not installed.
            SaveError: if the folder cannot be written.
        """
        found = self._check_dense(site)
        told = self.specification
        tensors = self[site], self.token_ids, self.sequence, self._shards
        options: Any = {"column": column or hook_name_of(site), "dtype": dtype}
        context = told.context if context is None else context
        return to_arrow(folder, found, *tensors, context=context, **options)

    def check(self) -> list[BrokenShard]:
        """Reads all shards and compares them with the digests in the manifest.

        Returns:
            Those that are missing or not as they were written. `harvest(..., verify=True)` makes
            them anew.
        """
        return broken_shards(self._folder, self._contents)

    def __repr__(self) -> str:
        lines = [summary(self._contents)]
        lines += [
            f"  {site}: {dtype} {shape}" for site, shape, dtype, _ in site_rows(self._contents)
        ]
        return "\n".join(lines)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield site_table(self._contents)

    def _repr_html_(self) -> str:
        return rows_html(HEAD, site_rows(self._contents), HEAD[:3], summary(self._contents))

    def __reduce__(self) -> Any:
        return type(self), (self._folder, self._contents)

    def _check_dense(self, site: str) -> SiteSpecification:
        found = self.site(site)
        if found.features is not None:
            raise OptionError(
                f"{site!r} keeps the largest features of each row only, and this takes whole "
                "rows: `activations[site][rows].to_dense(features)` makes some.",
                here(),
            )
        return found

    def _columns(self, sites: str | Sequence[str] | None) -> dict[str, StoredRows[Any]]:
        """The rows of chosen sites, and what says where rows come from."""
        chosen = self.sites if sites is None else sites
        chosen = (chosen,) if isinstance(chosen, str) else tuple(chosen)
        if not chosen or len(set(chosen)) < len(chosen):
            raise OptionError(f"`sites` are some labels, each once, not {sites!r}.", here())
        return {
            **{s: self[s] for s in chosen},
            **{name: rows_of_place(self._shards, name) for name in ROW_TENSORS},
        }
