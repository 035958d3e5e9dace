"""The file of a model's skeleton, which the process that looks at jobs has written."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from insitu.remote.protocol import Skeleton


class SkeletonFile:
    """The skeleton of a model. It is read again only when it is another one.

    Args:
        path: where it is.

    Attributes:
        path: as given.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: tuple[Any, bytes, str, str, str] | None = None

    def travels(self) -> tuple[bytes, str]:
        """Returns the skeleton as it travels, and its SHA-256 digest.

        Raises:
            OSError: if it is not there.
        """
        _, data, digest, _, _ = self._looked_at()
        return data, digest

    def described(self) -> tuple[str, str]:
        """Returns the name of the model's class, and the dtype that it is loaded in.

        Raises:
            OSError: if it is not there.
        """
        _, _, _, kind, dtype = self._looked_at()
        return kind, dtype

    def _looked_at(self) -> tuple[Any, bytes, str, str, str]:
        state = self.path.stat()
        which = state.st_ino, state.st_mtime_ns, state.st_size
        if self._read is None or self._read[0] != which:
            data = self.path.read_bytes()
            skeleton = msgspec.msgpack.decode(data, type=Skeleton)
            config = msgspec.json.decode(skeleton.files["config.json"])
            (kind, *_) = config.get("architectures") or [""]
            digest = hashlib.sha256(data).hexdigest()
            self._read = which, data, digest, kind, skeleton.dtype
        return self._read
