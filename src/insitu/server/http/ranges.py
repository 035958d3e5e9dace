"""Parts of an answer and answers that are known already: RFC 9110, sections 13 and 14."""

from __future__ import annotations

import re
from dataclasses import dataclass

from insitu.server.http.refusals import refused

_SINGLE = re.compile(r"bytes[ \t]*=[ \t]*(?:([0-9]+)-([0-9]*)|-([0-9]+))[ \t]*", re.IGNORECASE)
_TAG = re.compile(r'(?:W/)?"[!#-~\x80-\xff]*"')


@dataclass(frozen=True, slots=True)
class Part:
    """Some bytes of a whole.

    Attributes:
        begin: the first of them.
        end: the one behind the last of them.
        whole: how many there are in all.
    """

    begin: int
    end: int
    whole: int

    def __len__(self) -> int:
        return self.end - self.begin

    @property
    def content_range(self) -> str:
        """The header that says which bytes these are."""
        return f"bytes {self.begin}-{self.end - 1}/{self.whole}"


class UnsatisfiableError(Exception):
    """A range that has no byte of what there is.

    Args:
        whole: how many bytes there are.
    """

    def __init__(self, whole: int) -> None:
        super().__init__(f"bytes */{whole}")
        self.problem = refused(
            416, "range", f"There are {whole:,} bytes, and none of them was asked for."
        ).problem


def part_of(header: str | None, whole: int) -> Part | None:
    """Returns the part that a `Range` asks for, None for the whole.

    A header that is no range, of another unit, or of several ranges is not there, as the RFC
    allows.

    Args:
        header: the header, None if there is none.
        whole: how many bytes there are.

    Raises:
        UnsatisfiableError: if there are no such bytes.
    """
    found = None if header is None else _SINGLE.fullmatch(header)
    if found is None:
        return None
    first, last, suffix = found.groups()
    if suffix is not None:
        wanted = min(_number(suffix), whole)
        if wanted == 0:
            raise UnsatisfiableError(whole)
        return Part(whole - wanted, whole, whole)
    begin = _number(first)
    if last and _number(last) < begin:
        return None  # that is no range
    if begin >= whole:
        raise UnsatisfiableError(whole)
    return Part(begin, min(_number(last) + 1, whole) if last else whole, whole)


def is_known(if_none_match: str | None, tag: str) -> bool:
    """Returns whether a client has what it asks for already.

    Args:
        if_none_match: the header `If-None-Match`, None if there is none.
        tag: the `ETag` of what there is, with its quotes.
    """
    if if_none_match is None:
        return False
    if if_none_match.strip(" \t") == "*":
        return True
    return any(one.removeprefix("W/") == tag for one in _TAG.findall(if_none_match))


def is_the_same(if_range: str | None, tag: str) -> bool:
    """Returns whether a part may be sent, as it is of what the client has the rest of.

    Args:
        if_range: the header `If-Range`, None if there is none. A date is never the same: results
            have none.
        tag: as of `is_known`.
    """
    return if_range is None or if_range.strip(" \t") == tag


def _number(digits: str) -> int:
    """A number of any length. Python refuses to read those of many digits, and none is so large."""
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) < 19 else 10**18
