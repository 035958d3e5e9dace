"""For which host a request may be, and from which page: against DNS rebinding and other sites.

A page of any site can make a browser send requests to a server on the same machine. A name that its
owner points to 127.0.0.1 makes these requests look like those of one site. The name is in the
header `Host`, and the site in `Origin`.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from starlette.requests import Request

from insitu.server.http.refusals import refused
from insitu.server.http.request_headers import only
from insitu.server.settings import Settings

_AUTHORITY = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[a-z0-9_]([a-z0-9._-]{0,252}))(?::([0-9]{1,5}))?")
_PORTS = {"http": "80", "https": "443"}


class Hosts:
    """The hosts that requests may be for: the address itself, and the names that were named.

    A server on another address than the loopback may be reached by any of its addresses: no name
    can be pointed to it that way.

    Args:
        settings: what the server was told.
    """

    def __init__(self, settings: Settings) -> None:
        self._names = {_plain(one) for one in (settings.host, *settings.hosts) if one}
        self._local = is_loopback(settings.host)
        self._names.add("localhost" if self._local else socket.gethostname().lower())
        self._behind_proxy = settings.behind_proxy

    def check(self, request: Request) -> None:
        """Raises if a request is for another host, or from a page of another site.

        Raises:
            ProblemError: 400 without a host, 421 for another one, and 403 for another site.
        """
        given = only(request, "host")
        authority = _AUTHORITY.fullmatch(given.lower()) if given is not None else None
        if authority is None:
            raise refused(400, "host", "The header `Host` names no host.")
        name = _plain(authority[1])
        if name not in self._names and not self._is_own_address(name):
            raise refused(
                421,
                "host",
                f"This server is not {name!r}. If it is to be reached by that name, start it with "
                f"`--name {name}`.",
            )
        self._check_origin(request, name, authority[3])

    def _is_own_address(self, name: str) -> bool:
        try:
            address = _address(name)
        except ValueError:  # a name
            return False
        return address.is_loopback or not self._local

    def _check_origin(self, request: Request, name: str, port: str | None) -> None:
        origin = only(request, "origin")
        if origin is None:
            return
        scheme = request.scope.get("scheme", "http")
        try:
            site = urlsplit(origin.lower())
            same = site.hostname is not None and _plain(site.hostname) == name
            ours = port or _PORTS.get(site.scheme)
            same = same and str(site.port or _PORTS.get(site.scheme)) == ours
        except ValueError:
            same = False
        else:
            same = same and (site.scheme == scheme or self._behind_proxy)
        if not same:
            raise refused(403, "origin", "Pages of other sites may not use this server.")


def is_loopback(host: str) -> bool:
    """Returns whether an address or a name is that of the machine itself.

    Args:
        host: an address, or "localhost". Any other name is taken for another address.
    """
    if _plain(host) == "localhost":
        return True
    try:
        return _address(_plain(host)).is_loopback
    except ValueError:
        return False


def _plain(host: str) -> str:
    """A host without what may be written around it."""
    return host.lower().removeprefix("[").removesuffix("]").partition("%")[0].rstrip(".")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    found = ipaddress.ip_address(host)
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found
