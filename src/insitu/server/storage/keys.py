"""Keys: what a tenant shows to be let in.

A key reads `insitu_<8 characters>_<secret>`. The first two parts are its name, by which it is found
and spoken of. The secret has 256 random bits, so a plain SHA-256 digest of the key gives nothing
away, and nothing else of it is kept. Keys of many tenants come from a file; see `keys_file.py`.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from insitu.graph.errors import OptionError, nearest
from insitu.remote.problems import Problem, ProblemError
from insitu.server.records import Key, Tenant
from insitu.server.storage.data_folder import full_disk_is_a_problem, write_whole
from insitu.server.storage.store import Store

SCOPES = ("jobs", "admin")
"""What keys are good for: what a user of models does, and what an operator looks at."""

KEY_FILE = "key"
"""The file in the data folder with the key of the user who runs the server."""

LOCAL = "local"
"""The tenant of that user."""

_LETTERS = "abcdefghijkmnpqrstuvwxyz23456789"
_FORM = re.compile(r"(insitu_[a-z0-9]{8})_[A-Za-z0-9_-]{43}")
_NOBODY = hashlib.sha256(b"").hexdigest()


def make_key(
    tenant: str, scopes: Collection[str] = ("jobs",), expires: float | None = None
) -> tuple[str, Key]:
    """Makes a key.

    Args:
        tenant: the id of its tenant.
        scopes: what it is good for, of `SCOPES`.
        expires: when it ends, in seconds since 1970; None for never.

    Returns:
        The key itself, which nobody can find again, and the record that is kept of it.

    Raises:
        OptionError: if there is no such scope.
    """
    name = "".join(secrets.choice(_LETTERS) for _ in range(8))
    text = f"insitu_{name}_{secrets.token_urlsafe(32)}"
    return text, key_of(text, tenant, scopes, expires)


def key_of(
    text: str, tenant: str, scopes: Collection[str] = ("jobs",), expires: float | None = None
) -> Key:
    """Returns the record that is kept of a key.

    Args:
        text: the key.
        tenant: as of `make_key`.
        scopes: as of `make_key`.
        expires: as of `make_key`.

    Raises:
        OptionError: if it is no key, or if there is no such scope.
    """
    form = _FORM.fullmatch(text)
    if form is None:
        raise OptionError("That is no key: one reads `insitu_<8 characters>_<43 characters>`.")
    return Key(form[1], digest_of_key(text), tenant, checked_scopes(scopes), expires)


def checked_scopes(scopes: Collection[str]) -> frozenset[str]:
    """Returns scopes, if there are such.

    Args:
        scopes: what may be scopes.

    Raises:
        OptionError: if one is none, or if there are none.
    """
    for scope in scopes:
        if scope not in SCOPES:
            raise OptionError(
                f"{scope!r} is no scope{nearest(scope, SCOPES)}: {', '.join(SCOPES)}."
            )
    if not scopes:
        raise OptionError("A key without a scope is good for nothing: give `jobs` or `admin`.")
    return frozenset(scopes)


def digest_of_key(text: str) -> str:
    """Returns the SHA-256 digest of a key, in hexadecimal digits.

    Args:
        text: the key.
    """
    return hashlib.sha256(text.encode()).hexdigest()


def authenticate(store: Store, text: str, scope: str = "jobs") -> Tenant:
    """Returns whose a key is.

    Args:
        store: knows the keys.
        text: the key, which may be anything.
        scope: what it has to be good for.

    Raises:
        ProblemError: 401 "unauthorised" if it is no key of this server, or no longer; 403 "scope"
            if it is not good for that.
    """
    form = _FORM.fullmatch(text)
    if form is None:
        raise _unauthorised("a request needs a key: `Authorization: Bearer insitu_...`")
    key = store.key(form[1])
    # Compared also where there is nothing to compare with: the time tells nothing.
    same = hmac.compare_digest(digest_of_key(text), _NOBODY if key is None else key.digest)
    if key is None or not same:
        raise _unauthorised("the key is none of this server's")
    if key.revoked:
        raise _unauthorised(f"the key {key.prefix}_... was revoked")
    if key.expires is not None and key.expires <= store.now():
        raise _unauthorised(f"the key {key.prefix}_... has expired")
    tenant = store.tenant(key.tenant)
    if tenant is None:
        raise _unauthorised("the key is none of this server's")
    if scope not in key.scopes:
        raise ProblemError(
            Problem(
                "scope",
                "Not allowed",
                403,
                f"The key {key.prefix}_... is not good for {scope!r}, but for "
                f"{', '.join(sorted(key.scopes))}.",
            )
        )
    return tenant


def _unauthorised(why: str) -> ProblemError:
    return ProblemError(Problem("unauthorised", "No key", 401, f"Not let in: {why}."))


def install(
    store: Store, tenants: Sequence[Tenant], keys: Sequence[Key], forgives: bool = False
) -> None:
    """Makes keys those of a server: others, of an earlier start, are revoked.

    Args:
        store: keeps them.
        tenants: whose they are. What they have used stays, and so do their strikes.
        keys: the keys.
        forgives: whether the strikes are taken away.
    """
    for tenant in tenants:
        known = store.tenant(tenant.id)
        strikes = known.strikes if known is not None and not forgives else tenant.strikes
        store.put_tenant(replace(tenant, strikes=strikes))
    for key in keys:
        store.put_key(key)
    there, known_keys = {key.prefix for key in keys}, store.keys()
    for key in known_keys:
        if key.prefix not in there and not key.revoked:
            store.put_key(replace(key, revoked=True))


def own_key(store: Store, folder: Path) -> str:
    """Returns the key of the user who runs a server, and makes it the only one.

    It is in the file "key" of the data folder, which only that user can read. Each start has
    another: after a crash somebody else may have been at the port, and been shown the one before.

    Args:
        store: keeps what there is to keep of it.
        folder: the data folder.

    Raises:
        StorageError: if the disk is full.
    """
    text, _ = make_key(LOCAL)
    with full_disk_is_a_problem("the key"):
        write_whole(folder / KEY_FILE, f"{text}\n".encode(), durable=True)
    # Whoever can start the server has had the chance to look into what ended its engine.
    install(store, [Tenant(LOCAL, LOCAL)], [key_of(text, LOCAL, SCOPES)], forgives=True)
    return text
