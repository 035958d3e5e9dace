"""A data set of PyTorch over a folder: right for several workers and several ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import distributed
from torch.utils.data import IterableDataset, get_worker_info

from insitu.graph.errors import OptionError
from insitu.graph.location import here
from insitu.harvest.layout import TOKEN_IDS
from insitu.harvest.reading.batch_parts import Batch, Where
from insitu.harvest.reading.batches import rows_of
from insitu.harvest.reading.shuffling import EpochOrder, check_shuffle
from insitu.harvest.reading.stored_rows import StoredRows
from insitu.methods.sites import check_count


class ActivationDataset(IterableDataset[Batch]):
    """Batches of rows for a `DataLoader`: see `Activations.dataset`.

    Args:
        columns: the rows of each site, and `token_ids`, `sequence`, `position` and `document`.
        size: as for `Activations.dataset`.
        shuffle: as for `Activations.dataset`.
        seed: as for `Activations.dataset`.
        buffer: as for `Activations.dataset`.
        where: as for `Activations.dataset`.
        drop_last: as for `Activations.dataset`.
        rank: as for `Activations.dataset`.
        world_size: as for `Activations.dataset`.
    """

    def __init__(
        self,
        columns: Mapping[str, StoredRows[Any]],
        size: int,
        *,
        shuffle: Any,
        seed: Any,
        buffer: int,
        where: Where | None,
        drop_last: bool,
        rank: int | None,
        world_size: int | None,
    ) -> None:
        check_count("size", size)
        check_count("buffer", buffer)
        check_shuffle(shuffle, seed)
        if (rank is None) != (world_size is None):
            raise OptionError("`rank` and `world_size` are given together.", here())
        if rank is not None and world_size is not None:
            check_count("world_size", world_size)
            check_count("rank", rank, 0)
            if rank >= world_size:
                raise OptionError(f"There is no rank {rank} of {world_size}.", here())
        self._columns = columns
        self._size = size
        self._shuffle = shuffle
        self._seed = seed
        self._buffer = buffer
        self._where = where
        self._drop_last = drop_last
        # Now, not in a worker: one that was spawned knows of no process group.
        self._rank, self._ranks = _own_rank()
        if rank is not None and world_size is not None:
            self._rank, self._ranks = rank, world_size
        # Shared memory: workers that stay for several epochs have a copy of all else.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next loop has; without it each loop has the same.

        All ranks choose the same one. Workers of a `DataLoader` with `persistent_workers=True`
        are told too.

        Args:
            epoch: its number, from 0.

        Raises:
            OptionError: if it is no such number.
        """
        check_count("epoch", epoch, 0)
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        rows, readers = len(self._columns[TOKEN_IDS]), self._ranks * workers
        order = EpochOrder(
            rows,
            self._shuffle,
            self._seed,
            int(self._epoch),
            self._buffer,
            self._rank * workers + worker,
            readers,
        )
        # The parts of readers differ by one row. What the smallest part has, each gives.
        most = rows // readers // self._size if self._drop_last else None
        given = rows_of(self._columns, order, self._size, self._where)
        for number, (batch, _, _) in enumerate(given):
            if most is not None and (number >= most or len(batch[TOKEN_IDS]) < self._size):
                break
            yield batch


def _own_rank() -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
