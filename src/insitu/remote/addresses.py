"""Where a server is, and the key that opens it."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import warnings
from dataclasses import dataclass
from urllib.parse import urlsplit

from insitu.graph.errors import OptionError
from insitu.graph.location import here
from insitu.remote.key_files import read_key

URL_VARIABLE = "INSITU_REMOTE"
"""The environment variable with the address of a server."""

KEY_VARIABLE = "INSITU_KEY"
"""The environment variable with the key."""

_LONGEST_KEY = 1000


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is.

    Attributes:
        url: its address, without a slash at the end.
        is_here: whether it is on this machine.
        port: its port.
    """

    url: str
    is_here: bool
    port: int

    @classmethod
    def of(cls, url: str) -> Address:
        """Returns the address that a user gives.

        Args:
            url: such as "http://127.0.0.1:8000". Behind a proxy it may have a path.

        Raises:
            OptionError: if it is none.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
            more = parts.username or parts.password or parts.query or parts.fragment
        except (ValueError, AttributeError, TypeError):  # a port of letters; no text at all
            parts, port, more = urlsplit(""), 0, None
        host = parts.hostname
        if not isinstance(url, str) or parts.scheme not in ("http", "https") or not host or more:
            shown = "with a name, a key or a query in it" if more else f"as {url!r:.100}"
            raise OptionError(
                "A server is given as `http://127.0.0.1:8000` or `https://host`, and not "
                f"{shown}. A key is given as `key=`, or in `{KEY_VARIABLE}`.",
                here(),
            )
        local = is_loopback(host)
        if parts.scheme == "http" and not local:
            warnings.warn(
                f"`{url}` is another machine without TLS: whoever is in between can read the key, "
                "the prompts and the results. Use `https://`, or a tunnel to this machine.",
                stacklevel=2,
            )
        return cls(url.rstrip("/"), local, port)

    @classmethod
    def given_or_set(cls, url: str | None) -> Address:
        """Returns the address that a user gives, else that of the environment.

        Args:
            url: as of `of`, or None.

        Raises:
            OptionError: if there is none.
        """
        url = url or os.environ.get(URL_VARIABLE)
        if not url:
            raise OptionError(
                f"There is no server: give `url=`, or set `{URL_VARIABLE}`.",
                here(),
            )
        return cls.of(url)

    def key(self, given: str | None) -> tuple[str | None, str]:
        """Returns the key for a server, and what it is: for an error, since it is never shown.

        It is looked up for every request: a server that was started again may have a new one.

        Args:
            given: the key that the user gave; None for that of the environment, or that of a
                server of the same user on this machine.

        Raises:
            OptionError: if it can be no key.
            LoadError: if others have access to the file with it.
        """
        if given is not None:
            return _checked(given, "`key=`"), "the one given as `key=`"
        found = os.environ.get(KEY_VARIABLE)
        if found:
            return _checked(found, f"`{KEY_VARIABLE}`"), f"that of `{KEY_VARIABLE}`"
        left = read_key(self.port) if self.is_here else None
        if left is None:
            return None, f"none: give `key=`, or set `{KEY_VARIABLE}`"
        return _checked(left, "The key file"), "the one that a server of yours has left"


def is_loopback(host: str) -> bool:
    """Returns whether a host is this machine, as it calls itself.

    Args:
        host: its name or its address.
    """
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _checked(key: str, what: str) -> str:
    """A key, if it can be one: else a header would hold it that ends in the middle."""
    key = key.strip()
    fits = key.isascii() and key.isprintable() and " " not in key and len(key) <= _LONGEST_KEY
    if not key or not fits:
        raise OptionError(f"{what} is no key: a key has letters, digits and signs.", here())
    return key
