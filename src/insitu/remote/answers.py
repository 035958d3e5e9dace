"""Requests to a server and its answers, as plain data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from insitu.remote.problems import Problem

MOST_JSON = 16 * 2**20
"""How many bytes an answer may have that is no file."""

_DIGEST = re.compile(r'"?([0-9a-f]{64})"?')


@dataclass(frozen=True, slots=True)
class Asking:
    """A request.

    Attributes:
        method: its method.
        path: the path, from "/v1".
        params: the parameters of the query.
        headers: its own headers.
        content: its body.
        most: how many bytes the answer may have.
        silence: how many seconds may pass without a byte of the answer; None for the usual.
    """

    method: str
    path: str
    params: Mapping[str, str] = field(default_factory=dict[str, str])
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    content: bytes | None = None
    most: int = MOST_JSON
    silence: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer.

    Attributes:
        status: the HTTP status.
        headers: its headers, by names in any letters.
        body: its body, as far as it was read.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_good(self) -> bool:
        """Whether it is what was asked for."""
        return 200 <= self.status < 300

    @property
    def type(self) -> str:
        """Its media type, without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def length(self) -> int:
        """How many bytes its body has, 0 if it does not say."""
        length = self.headers.get("content-length", "")
        return int(length) if re.fullmatch("[0-9]{1,18}", length) else 0

    @property
    def digest(self) -> str:
        """The SHA-256 digest in its `ETag`, "" if there is none."""
        found = _DIGEST.fullmatch(self.headers.get("etag", "").strip())
        return found[1] if found else ""

    @property
    def problem(self) -> Problem | None:
        """The problem that it is about, None if it does not say."""
        try:
            return msgspec.json.decode(self.body, type=Problem)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return None

    @property
    def retry_after(self) -> float:
        """For how many seconds it asks to wait, 0 if it does not."""
        try:
            seconds = float(self.headers.get("retry-after", "0"))
        except ValueError:  # a date, which nothing of ours sends
            return 0.0
        return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
