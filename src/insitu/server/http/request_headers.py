"""What the headers of a request say: the key, the version, the type of the body, preferences."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from starlette.requests import Request

from insitu.remote.protocol import JOB_TYPE, PROTOCOL
from insitu.server.http.refusals import refused

TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
"""A token of RFC 9110, as a regular expression."""

_QUOTED = r'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
_PREFERENCE = re.compile(rf"({TOKEN})(?:[ \t]*=[ \t]*({TOKEN}|{_QUOTED})?)?")
_BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/-]{1,512}=*)", re.IGNORECASE)
_LONGEST_IDEMPOTENCY = 255
_BLOB_TYPES = ("", "application/octet-stream", "application/vnd.safetensors")


def only(request: Request, name: str) -> str | None:
    """Returns a header that may be there once, None if it is not.

    Args:
        request: the request.
        name: its name.

    Raises:
        ProblemError: 400 if it is there more than once.
    """
    found = request.headers.getlist(name)
    if len(found) > 1:
        raise refused(400, "headers", f"The header `{name}` is there {len(found)} times.")
    return found[0].strip(" \t") if found else None


def key_of(request: Request) -> str:
    """Returns the key of a request, which is in its header `Authorization` and nowhere else.

    Raises:
        ProblemError: 401 if there is none.
    """
    found = request.headers.getlist("authorization")
    key = _BEARER.fullmatch(found[0].strip(" \t")) if len(found) == 1 else None
    if key is None:
        raise refused(
            401,
            "unauthorised",
            "This takes a key: send the header `Authorization: Bearer KEY`, or set INSITU_KEY. "
            "`insitu keys add` makes one.",
        )
    return key[1]


def check_protocol(request: Request) -> None:
    """Raises if a client speaks another version of the protocol.

    Raises:
        ProblemError: 400 with both numbers.
    """
    spoken = only(request, "insitu-protocol")
    if spoken is None or spoken == str(PROTOCOL):
        return
    number = int(spoken) if re.fullmatch(r"[0-9]{1,9}", spoken) else None
    newer = "server" if number is not None and number > PROTOCOL else "client"
    detail = (
        f"The client speaks version {spoken[:20]!r} of the protocol, and the server version "
        f"{PROTOCOL}. Install another Insitu at the {newer}'s side."
    )
    raise refused(400, "protocol", detail, found=float(number or 0), allowed=PROTOCOL)


def check_type(request: Request, allowed: Sequence[str]) -> None:
    """Raises if a body is of a type that is not taken here, or compressed.

    Args:
        request: the request.
        allowed: the media types; "" if the header may be missing.

    Raises:
        ProblemError: 415.
    """
    given = (only(request, "content-type") or "").partition(";")[0].strip(" \t").lower()
    if given not in allowed:
        wanted = " or ".join(f"`{one}`" for one in allowed if one)
        detail = f"The body is of the type {given[:100]!r}: send it as {wanted}."
        raise refused(415, "content_type", detail)
    if (only(request, "content-encoding") or "identity").lower() != "identity":
        raise refused(415, "content_encoding", "Bodies are not taken compressed.")


def check_job_type(request: Request) -> None:
    """Raises if a body is not sent as that of a job."""
    check_type(request, (JOB_TYPE,))


def check_blob_type(request: Request) -> None:
    """Raises if a body is sent as something that no tensor is."""
    check_type(request, _BLOB_TYPES)


def idempotency_of(request: Request) -> str:
    """Returns the key under which a job is accepted once, "" if there is none.

    It is written in quotes, as the draft of its RFC has it, or without them.

    Raises:
        ProblemError: 422 for one that is too long or has other than visible ASCII characters.
    """
    given = only(request, "idempotency-key")
    if given is None:
        return ""
    key = given[1:-1] if re.fullmatch(r'"[^"\\]*"', given) else given
    if not re.fullmatch(rf"[!-~]{{1,{_LONGEST_IDEMPOTENCY}}}", key):
        raise refused(
            422,
            "option",
            f"`Idempotency-Key` takes 1 to {_LONGEST_IDEMPOTENCY} visible ASCII characters.",
        )
    return key


def wait_of(request: Request, longest: float) -> float | None:
    """Returns how many seconds a client prefers to wait, None if it does not (RFC 7240).

    What cannot be read is no preference, as the RFC has it. Parts of a second are taken too.

    Args:
        request: the request.
        longest: how long it may wait.
    """
    wait = preferences(request.headers.getlist("prefer")).get("wait", "")
    return min(float(wait), longest) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", wait) else None


def preferences(headers: Sequence[str]) -> dict[str, str]:
    """Returns preferences with their values, by their names in small letters (RFC 7240).

    Of a name that is there more than once the first counts. Parameters of preferences are left out,
    as none is known here that has any. So is text that is not written as the RFC has it.

    Args:
        headers: the `Prefer` headers, in their order.
    """
    found = dict[str, str]()
    for header in headers:
        for element in _split(header, ","):
            preference = _PREFERENCE.fullmatch(next(_split(element, ";")).strip(" \t"))
            if preference is not None:
                value = preference[2] or ""
                if value.startswith('"'):
                    value = re.sub(r"\\(.)", r"\1", value[1:-1])
                found.setdefault(preference[1].lower(), value)
    return found


def _split(text: str, separator: str) -> Iterator[str]:
    """Gives the parts of a text between separators that are not in quotes."""
    quoted, escaped, begins = False, False, 0
    for index, letter in enumerate(text):
        if escaped:
            escaped = False
        elif quoted and letter == "\\":
            escaped = True
        elif letter == '"':
            quoted = not quoted
        elif letter == separator and not quoted:
            yield text[begins:index]
            begins = index + 1
    yield text[begins:]
