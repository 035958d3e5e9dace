"""The file of `insitu serve --keys FILE`: tenants, what they may take, and digests of their keys.

It is JSON, and holds no secret:

```json
{
  "tenants": [
    {
      "name": "ada",
      "weight": 2.0,
      "limits": {"queued_jobs": 100, "operations_a_day": 1e18, "stored_bytes": null},
      "keys": [
        {
          "prefix": "insitu_k7p2m9qd",
          "digest": "64 hexadecimal digits: the SHA-256 digest of the whole key",
          "scopes": ["jobs"],
          "expires": "2027-01-31T00:00:00Z",
          "revoked": false
        }
      ]
    }
  ]
}
```

Only `name`, `prefix` and `digest` have to be there. `id` is what the server knows a tenant by, and
is the name if it is not given: with it, a tenant can get another name and keep its jobs. `limits`
has the names of `TenantLimits`, and null is no limit.
"""

from __future__ import annotations

import logging
import math
import stat
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec

from insitu import disk
from insitu.graph.errors import InsituError, LoadError, OptionError
from insitu.server.limits import TenantLimits
from insitu.server.records import Key, Tenant
from insitu.server.storage.data_folder import write_whole
from insitu.server.storage.keys import SCOPES, checked_scopes, install
from insitu.server.storage.store import Store

logger = logging.getLogger(__name__)

_LONGEST = 64 * 2**20
_NAME = msgspec.Meta(min_length=1, max_length=200)


class KeyPart(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A key: fields as of `Key`."""

    prefix: Annotated[str, msgspec.Meta(pattern=r"^insitu_[a-z0-9]{8}\Z")]
    digest: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    scopes: list[str] = msgspec.field(default_factory=lambda: [SCOPES[0]])
    expires: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    revoked: bool = False


class TenantPart(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A tenant with its keys: fields as of `Tenant`."""

    name: Annotated[str, _NAME]
    id: Annotated[str, msgspec.Meta(max_length=200)] = ""
    weight: Annotated[float, msgspec.Meta(gt=0, le=1e9)] = 1.0
    limits: dict[str, float | None] = msgspec.field(default_factory=dict[str, float | None])
    keys: list[KeyPart] = msgspec.field(default_factory=list[KeyPart])


class KeysFile(msgspec.Struct, forbid_unknown_fields=True):
    """All of the file."""

    tenants: list[TenantPart] = msgspec.field(default_factory=list[TenantPart])


_file_of = msgspec.json.Decoder(KeysFile).decode


def read_keys(path: Path) -> tuple[list[Tenant], list[Key]]:
    """Returns the tenants and the keys in a file.

    Args:
        path: the file.

    Raises:
        LoadError: if it cannot be read, or is no such file, saying where; or if everybody on the
            machine may write it.
        OptionError: if there is no such scope or limit.
    """
    data = disk.read(path, _LONGEST)
    if path.stat().st_mode & stat.S_IWOTH:
        raise LoadError(f"Everybody can write keys into {str(path)!r}: run `chmod o-w {path}`.")
    try:
        parts = _file_of(data).tenants
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise LoadError(f"The keys in {str(path)!r} cannot be read: {error}.") from None
    tenants = [_tenant(part) for part in parts]
    keys = [_key(key, part.id or part.name) for part in parts for key in part.keys]
    for what, names in (
        ("tenant", [tenant.id for tenant in tenants]),
        ("key", [key.prefix for key in keys]),
    ):
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise LoadError(f"{str(path)!r} has the {what} {twice[0]!r} twice.")
    return tenants, keys


def write_keys(path: Path, tenants: Sequence[Tenant], keys: Sequence[Key]) -> None:
    """Writes tenants and keys to a file, readable for this user alone.

    Args:
        path: the file. One that is there is replaced as a whole.
        tenants: the tenants.
        keys: their keys.
    """
    parts = [
        TenantPart(
            tenant.name,
            "" if tenant.id == tenant.name else tenant.id,
            tenant.weight,
            {name: one if math.isfinite(one) else None for name, one in tenant.limits.items()},
            [_key_part(key) for key in keys if key.tenant == tenant.id],
        )
        for tenant in tenants
    ]
    data = msgspec.json.format(msgspec.json.encode(KeysFile(parts)))
    write_whole(path, data + b"\n", durable=True)


class WatchedKeys:
    """The keys of a file, as those of a server: also when the file is changed.

    Args:
        store: keeps them.
        path: the file.

    Raises:
        LoadError: as of `load_keys`.
        OptionError: as of `load_keys`.
    """

    def __init__(self, store: Store, path: Path) -> None:
        self._store, self._path = store, path
        self._state = self._now()
        load_keys(store, path, forgives=True)

    def look(self) -> None:
        """Takes the keys of the file, if it has changed. A file that is none changes nothing."""
        state = self._now()
        if state == self._state or state is None:
            return
        self._state = state
        try:
            load_keys(self._store, self._path)
        except InsituError as error:
            logger.warning("the keys stay as they were: %s", error)

    def _now(self) -> tuple[int, ...] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size


def load_keys(store: Store, path: Path, forgives: bool = False) -> None:
    """Makes the keys of a file those of a server, when it starts or when the file has changed.

    A key that is no longer in the file is revoked.

    Args:
        store: keeps them.
        path: the file.
        forgives: whether the strikes of tenants are taken away, as they are when a server starts:
            somebody has had the chance to look into what ended its engine.

    Raises:
        LoadError: as of `read_keys`, and if there is no key in the file.
        OptionError: as of `read_keys`.
    """
    tenants, keys = read_keys(path)
    if not any(not key.revoked for key in keys):
        raise LoadError(f"There is no key in {str(path)!r}: make one with `insitu keys`.")
    install(store, tenants, keys, forgives)


def _tenant(part: TenantPart) -> Tenant:
    limits = {name: math.inf if one is None else one for name, one in part.limits.items()}
    TenantLimits.of(limits)
    return Tenant(part.id or part.name, part.name, part.weight, limits)


def _key(part: KeyPart, tenant: str) -> Key:
    expires = None if part.expires is None else part.expires.timestamp()
    return Key(part.prefix, part.digest, tenant, checked_scopes(part.scopes), expires, part.revoked)


def _key_part(key: Key) -> KeyPart:
    expires = None
    if key.expires is not None:
        try:
            expires = datetime.fromtimestamp(key.expires, UTC)
        except (OverflowError, ValueError, OSError):
            raise OptionError(f"A key cannot expire {key.expires} seconds after 1970.") from None
    return KeyPart(key.prefix, key.digest, sorted(key.scopes, reverse=True), expires, key.revoked)
