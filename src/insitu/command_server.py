"""`insitu serve`, and `insitu keys` for who may use what it serves.

Nothing of the server is imported before one of these commands runs.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from insitu.command_answers import fail, first_line
from insitu.command_options import check_dtype

if TYPE_CHECKING:
    from insitu.server.records import Key, Tenant
    from insitu.server.settings import ServedModel

keys_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Says who may use a server."
)
Arguments = ParamSpec("Arguments")

KeysFile = Annotated[
    Path, typer.Option("--keys", help="The file with keys, as `insitu serve --keys` reads it.")
]
_DAY = 24 * 3600.0
_LONGEST_LIFE = 36_500.0
_LONGEST_NAME = 200


def said_in_a_line(command: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Makes a command end with 2, and with one line that says why, if it cannot be done.

    Args:
        command: the command.
    """

    @wraps(command)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.BadParameter):
            raise
        except Exception as error:  # such as of a file that cannot be read
            fail(first_line(error))

    return wrapped


@said_in_a_line
def serve(
    models: Annotated[
        list[str], typer.Argument(help="Repo ids, folders, or bundled models.", metavar="MODEL...")
    ],
    port: Annotated[int, typer.Option(help="The port, 0 for any that is free.")] = 8765,
    host: Annotated[
        str, typer.Option(help="The address. Another than this machine's takes keys and TLS.")
    ] = "127.0.0.1",
    name: Annotated[
        list[str] | None,
        typer.Option(help="A name that the server is reached by, beside its address. Repeatable."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="The folder in which it keeps everything.")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="A file with keys, made with `insitu keys add`.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as `cuda`, or `auto`.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Such as `bfloat16`, or `auto`.")] = None,
    cert: Annotated[Path | None, typer.Option(help="The certificate for TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The key of the certificate.")] = None,
    behind_proxy: Annotated[
        bool, typer.Option("--behind-proxy", help="A proxy before it does TLS.")
    ] = False,
    durable: Annotated[
        bool, typer.Option("--durable", help="Keep jobs through a power failure too.")
    ] = False,
    no_join: Annotated[bool, typer.Option("--no-join", help="Run every job by itself.")] = False,
    no_source: Annotated[
        bool, typer.Option("--no-source", help="Do not keep the text of users' lines.")
    ] = False,
    no_weights: Annotated[
        bool, typer.Option("--no-weights", help="Let no job read weights.")
    ] = False,
) -> None:
    """Serves models to many users, until it is interrupted.

    Users write `LanguageModel(MODEL, remote="http://...")`, and the rest as without a server.
    Only the user who started it can use it, from the same machine: for others, give it keys.

    **Example:** `insitu serve insitu/eiffel --port 8765`
    """
    from insitu.server.packages import check_packages

    check_packages()
    check_dtype(dtype)
    from insitu.server.http.listening import check_exposure
    from insitu.server.running import run
    from insitu.server.settings import Settings

    loading = {"device_map": device, "dtype": dtype}
    settings = Settings(
        _served(models, {option: one for option, one in loading.items() if one is not None}),
        (data or default_data_folder()).expanduser().absolute(),
        host,
        port,
        keys,
        cert,
        tls_key,
        behind_proxy,
        tuple(name or ()),
        durable,
        joins=not no_join,
        keeps_source=not no_source,
        weights_readable=not no_weights,
    )
    check_exposure(settings)  # before models are loaded
    _log_to_stderr()
    run(settings, lambda url: typer.echo(f"Insitu serves {', '.join(models)} at {url}"))


def default_data_folder() -> Path:
    """Returns the folder in which a server keeps everything unless told otherwise."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "insitu" / "server"
    base = os.environ.get("XDG_DATA_HOME", "")
    folder = Path(base) if os.path.isabs(base) else Path.home() / ".local" / "share"
    return folder / "insitu" / "server"


@keys_app.command()
@said_in_a_line
def add(
    tenant: Annotated[str, typer.Argument(help="Whose key it is: a name.")],
    keys: KeysFile,
    scope: Annotated[
        list[str] | None,
        typer.Option(help="What it is good for: `jobs`, or `admin` for metrics. Repeatable."),
    ] = None,
    days: Annotated[float | None, typer.Option(help="After how many days it ends.")] = None,
) -> None:
    """Makes a key for somebody, and prints it. It is shown this once: the file has its digest.

    **Example:** `insitu keys add ada --keys keys.json`
    """
    from insitu.graph.errors import OptionError
    from insitu.server.records import Tenant
    from insitu.server.storage.keys import make_key
    from insitu.server.storage.keys_file import write_keys

    if not 0 < len(tenant.strip()) <= _LONGEST_NAME:
        raise OptionError(f"A key is somebody's: give a name of up to {_LONGEST_NAME} characters.")
    if days is not None and not 0 < days <= _LONGEST_LIFE:
        raise OptionError(f"`--days` is {days:g}, and no number up to {_LONGEST_LIFE:,.0f}.")
    tenants, known = _keys_in(keys)
    owner = next((one for one in tenants if tenant in (one.id, one.name)), None)
    if owner is None:
        owner = Tenant(tenant, tenant)
        tenants.append(owner)
    expires = None if days is None else time.time() + days * _DAY
    secret, key = make_key(owner.id, scope or ["jobs"], expires)
    write_keys(keys, tenants, [*known, key])
    typer.echo(secret)
    typer.echo(f"Wrote its digest to {keys}. Clients take it as INSITU_KEY.", err=True)


@keys_app.command("list")
@said_in_a_line
def list_keys(
    keys: KeysFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Lists keys by their beginnings, and whose they are.

    **Example:** `insitu keys list --keys keys.json`
    """
    from rich.console import Console
    from rich.table import Table

    tenants, known = _keys_in(keys, there=True)
    names = {one.id: one.name for one in tenants}
    rows = [
        {
            "key": key.prefix,
            "tenant": names[key.tenant],
            "scopes": sorted(key.scopes),
            "expires": None if key.expires is None else _day(key.expires),
            "state": _state(key),
        }
        for key in known
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(*rows[0] if rows else ("key", "tenant", "scopes", "expires", "state"))
    for row in rows:
        scopes = ", ".join(row["scopes"])
        table.add_row(row["key"], row["tenant"], scopes, row["expires"] or "never", row["state"])
    Console(soft_wrap=False).print(table)


@keys_app.command()
@said_in_a_line
def revoke(
    key: Annotated[str, typer.Argument(help="The beginning of the key, as `list` shows it.")],
    keys: KeysFile,
) -> None:
    """Makes a key good for nothing.

    **Example:** `insitu keys revoke insitu_k7p2m9qd --keys keys.json`
    """
    from insitu.graph.errors import OptionError, nearest
    from insitu.server.storage.keys_file import write_keys

    tenants, known = _keys_in(keys, there=True)
    prefix = "_".join(key.split("_")[:2])  # of a whole key too
    found = [one for one in known if one.prefix == prefix]
    if not found:
        there = nearest(prefix, [one.prefix for one in known])
        raise OptionError(f"There is no key {prefix!r} in '{keys}'{there}.")
    write_keys(
        keys, tenants, [replace(one, revoked=True) if one in found else one for one in known]
    )
    typer.echo(f"The key {prefix} is revoked.", err=True)


def _served(models: list[str], loading: dict[str, Any]) -> list[ServedModel]:
    """The models as a server has them, each under an id of its own."""
    from insitu.graph.errors import OptionError
    from insitu.server.running import served_model

    served = [served_model(one, loading) for one in models]
    ids = [one.id for one in served]
    for id in ids:
        if ids.count(id) > 1:
            raise OptionError(f"Two models would be called {id!r}: give each of them once.")
    return served


def _keys_in(path: Path, there: bool = False) -> tuple[list[Tenant], list[Key]]:
    """The tenants and the keys in a file, none if there is no file, unless it has to be there."""
    from insitu.server.storage.keys_file import read_keys

    return read_keys(path) if there or path.exists() else ([], [])


def _state(key: Key) -> str:
    if key.revoked:
        return "revoked"
    return "ended" if key.expires is not None and key.expires <= time.time() else "good"


def _day(moment: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(moment))


def _log_to_stderr() -> None:
    """Logs what the server does: routes and how long they took, and no prompt, body or key."""
    shown = logging.StreamHandler()
    shown.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("insitu", "uvicorn"):
        logger = logging.getLogger(name)
        logger.addHandler(shown)
        logger.setLevel(logging.INFO if name == "insitu" else logging.WARNING)
