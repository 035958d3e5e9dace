"""Which weights a model had when its jobs were accepted: a job is never run on others.

A job says itself what structure it is for. Weights that were exchanged in the same structure are
another model all the same, so a digest of them is kept in the data folder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from insitu.remote.problems import Problem
from insitu.server.records import JobRecord
from insitu.server.storage.data_folder import full_disk_is_a_problem, write_whole

CHANGED = Problem(
    "model_changed",
    "Model changed",
    409,
    "The server has another model of this name than when it accepted the job: send it again.",
)


class KnownWeights:
    """The digest of a model's weights, in a file.

    Args:
        path: the file.
        waiting: the jobs that an earlier server has accepted.
    """

    def __init__(self, path: Path, waiting: Sequence[JobRecord]) -> None:
        self._path = path
        self._last = max((job.sequence for job in waiting), default=0)

    def outdated(self, weights: str, waiting: Sequence[JobRecord]) -> list[JobRecord]:
        """Returns the jobs that were accepted when the model had other weights.

        What was accepted since this server was started is for the weights that it loads first.

        Args:
            weights: the digest of those that there are now; "" if it is not known.
            waiting: the jobs that wait.
        """
        last, self._last = self._last, math.inf
        known = self._path.read_text() if self._path.exists() else ""
        if not known or not weights or known == weights:
            return []
        return [job for job in waiting if job.sequence <= last]

    def note(self, weights: str) -> None:
        """Keeps the digest of the weights that there are now.

        Args:
            weights: the digest.

        Raises:
            StorageError: if the disk is full.
        """
        with full_disk_is_a_problem("the digest of the weights"):
            write_whole(self._path, weights.encode())
