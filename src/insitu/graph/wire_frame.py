"""The frame around a message: what it is, in which version, and whether it arrived whole."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from insitu.graph.errors import WireError

_REST = struct.Struct("<BI")  # the version, and a checksum of all that follows
_LENGTH = struct.Struct("<Q")  # of the message; behind it are the tensors


@dataclass(frozen=True, slots=True)
class Frame:
    """A kind of frame.

    Attributes:
        magic: what its bytes begin with.
        version: the version of the format. Another one cannot be read.
        what: what is in it, for errors: "graph".
    """

    magic: bytes
    version: int
    what: str

    def around(self, message: bytes, tensors: bytes) -> bytes:
        """Returns a message and the tensors that it refers to as one piece of bytes."""
        body = b"".join((_LENGTH.pack(len(message)), message, tensors))
        return self.magic + _REST.pack(self.version, zlib.crc32(body)) + body

    def opened(self, data: bytes) -> tuple[memoryview, bytes]:
        """Returns the message and the tensors in a frame.

        Raises:
            WireError: if it is no such frame, of another version, or damaged.
        """
        whole, what = memoryview(data), self.what
        head = len(self.magic)
        if bytes(whole[:head]) != self.magic:
            raise WireError(f"The bytes are no {what} of Insitu: they do not begin as one.")
        start = head + _REST.size + _LENGTH.size
        if len(whole) < start:
            raise WireError(f"The bytes of the {what} end too early.")
        version, checksum = _REST.unpack_from(whole, head)
        if version != self.version:
            raise WireError(
                f"The {what} is in version {version} of the format, and this Insitu reads version "
                f"{self.version}: install the same Insitu in both places."
            )
        if zlib.crc32(whole[head + _REST.size :]) != checksum:
            raise WireError(
                f"The bytes of the {what} are not complete, or were changed on their way."
            )
        end = start + _LENGTH.unpack_from(whole, head + _REST.size)[0]
        if end > len(whole):
            raise WireError(f"The bytes of the {what} end too early.")
        return whole[start:end], bytes(whole[end:])
