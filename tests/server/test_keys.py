import hmac
import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from insitu import LoadError, OptionError
from insitu.remote.problems import ProblemError
from insitu.server.records import Key, Tenant
from insitu.server.storage import keys as keys_module
from insitu.server.storage.keys import (
    KEY_FILE,
    LOCAL,
    authenticate,
    install,
    key_of,
    make_key,
    own_key,
)
from insitu.server.storage.keys_file import WatchedKeys, load_keys, read_keys, write_keys
from insitu.server.storage.sqlite_store import SqliteStore
from tests.server.stores import Clocks

ADA = Tenant("ada", "ada")


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def store(tmp_path: Path, clocks: Clocks) -> Iterator[SqliteStore]:
    made = SqliteStore(tmp_path / "store", clock=clocks.made())
    made.put_tenant(ADA)
    yield made
    made.close()


def refused(store: SqliteStore, text: str, scope: str = "jobs") -> tuple[str, int, str]:
    with pytest.raises(ProblemError) as raised:
        authenticate(store, text, scope)
    problem = raised.value.problem
    assert text[16:] not in problem.detail or not text[16:]  # no secret is repeated
    return problem.code, problem.status, problem.detail


def changed(text: str, place: int) -> str:
    return text[:place] + ("a" if text[place] != "a" else "b") + text[place + 1 :]


# Keys.


def test_keys_are_long_differ_and_are_not_kept(store: SqliteStore, tmp_path: Path) -> None:
    made = [make_key("ada") for _ in range(200)]
    assert len({text for text, _ in made}) == 200
    for text, key in made:
        insitu, name, secret = text.split("_", 2)
        assert (insitu, len(name), len(secret)) == ("insitu", 8, 43)  # 43 letters of 6 bits
        assert key.prefix == f"insitu_{name}" and secret not in repr(key)
        assert key == key_of(text, "ada")
    text, key = made[0]
    store.put_key(key)
    assert authenticate(store, text) == ADA
    for path in tmp_path.iterdir():
        assert text[16:].encode() not in path.read_bytes()


def test_what_is_no_key_is_not_let_in(store: SqliteStore) -> None:
    text, key = make_key("ada")
    store.put_key(key)
    others = ["", "insitu", text[:-1], text + "a", text + "\n", " " + text, text.upper()]
    others += ["x" * 100_000, "insitu_" + "ü" * 8 + text[15:], text.replace("_", "-"), "\ud800"]
    others += [changed(text, place) for place in range(7, len(text)) if place != 15]
    others += [make_key("ada")[0]]
    for other in others:
        assert refused(store, other)[:2] == ("unauthorised", 401)
    assert authenticate(store, text) == ADA


def test_keys_are_compared_in_constant_time(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = list[tuple[Any, ...]]()

    def compare(*both: Any) -> bool:
        compared.append(both)
        return hmac.compare_digest(*both)

    class Hmac:
        compare_digest = staticmethod(compare)

    text, key = make_key("ada")
    store.put_key(key)
    monkeypatch.setattr(keys_module, "hmac", Hmac)
    authenticate(store, text)
    refused(store, changed(text, 40))
    refused(store, make_key("ada")[0])  # no key has its name, and still there is a comparison
    assert len(compared) == 3 and {len(one) for pair in compared for one in pair} == {64}


def test_keys_end(store: SqliteStore, clocks: Clocks) -> None:
    text, key = make_key("ada", expires=store.now() + 60)
    store.put_key(key)
    assert authenticate(store, text) == ADA
    clocks.wall -= 1e6  # a clock that is put back does not prolong it
    clocks.pass_by(59)
    assert authenticate(store, text) == ADA
    clocks.pass_by(1)
    assert refused(store, text)[:2] == ("unauthorised", 401)
    assert "expired" in refused(store, text)[2]
    # Who does not have the key is not told even that.
    assert "expired" not in refused(store, changed(text, 40))[2]
    text, key = make_key("ada")
    store.put_key(replace(key, revoked=True))
    assert "revoked" in refused(store, text)[2]
    assert "revoked" not in refused(store, changed(text, 40))[2]
    text, key = make_key("nobody")
    store.put_key(key)
    assert refused(store, text)[:2] == ("unauthorised", 401)


def test_keys_are_good_for_their_scopes(store: SqliteStore) -> None:
    jobs, admin, both = (make_key("ada", one) for one in (["jobs"], ["admin"], ["jobs", "admin"]))
    for _, key in (jobs, admin, both):
        store.put_key(key)
    for scope in ("jobs", "admin"):
        assert authenticate(store, both[0], scope) == ADA
    assert authenticate(store, jobs[0], "jobs") == authenticate(store, admin[0], "admin") == ADA
    code, status, detail = refused(store, jobs[0], "admin")
    assert (code, status) == ("scope", 403) and "'admin'" in detail and "jobs" in detail
    assert refused(store, admin[0], "jobs")[1] == 403
    for wrong in (["job"], [], ["jobs", "root"]):
        with pytest.raises(OptionError):
            make_key("ada", wrong)


# The key of the user who runs the server.


def test_the_users_own_key_is_in_a_private_file_and_another_at_each_start(
    store: SqliteStore, tmp_path: Path
) -> None:
    mask = os.umask(0)
    try:
        text = own_key(store, tmp_path)
    finally:
        os.umask(mask)
    path = tmp_path / KEY_FILE
    assert path.stat().st_mode & 0o777 == 0o600 and path.read_text() == f"{text}\n"
    for scope in ("jobs", "admin"):
        assert authenticate(store, text, scope).id == LOCAL
    assert own_key(store, tmp_path) != text and "revoked" in refused(store, text)[2]


@pytest.mark.parametrize("how", ["readable", "link", "pipe", "folder", "text", "empty"])
def test_a_key_file_that_others_could_read_or_have_made_is_replaced(
    store: SqliteStore, tmp_path: Path, how: str
) -> None:
    path, old = tmp_path / KEY_FILE, own_key(store, tmp_path)
    if how == "readable":
        path.chmod(0o640)
    elif how == "folder":
        path.unlink()
        path.mkdir()
        with pytest.raises(OSError):
            own_key(store, tmp_path)
        return
    else:
        path.rename(tmp_path / "moved")
        if how == "link":
            path.symlink_to(tmp_path / "moved")
        elif how == "pipe":
            os.mkfifo(path, 0o600)
        else:
            path.touch(0o600)
            path.write_text("" if how == "empty" else "hello")
    new = own_key(store, tmp_path)
    assert new != old and path.read_text() == f"{new}\n" and not path.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o600
    assert authenticate(store, new).id == LOCAL and "revoked" in refused(store, old)[2]


def test_a_start_makes_its_own_keys_the_only_ones(store: SqliteStore, tmp_path: Path) -> None:
    text, key = make_key("ada")
    install(store, [ADA], [key])
    store.strike("ada")
    install(store, [replace(ADA, name="Ada", weight=2.0)], [key])
    assert store.tenant("ada") == Tenant("ada", "Ada", 2.0, strikes=1)
    install(store, [ADA], [key], forgives=True)
    assert authenticate(store, text) == ADA
    own = own_key(store, tmp_path)
    assert "revoked" in refused(store, text)[2]
    install(store, [ADA], [key])
    assert authenticate(store, text) == ADA and "revoked" in refused(store, own)[2]


# The file of `--keys`.


def written(path: Path, *tenants: Any, **others: Any) -> Path:
    path.touch(0o600)
    path.write_text(json.dumps({"tenants": tenants, **others}))
    return path


def test_a_file_of_keys_says_who_is_let_in(store: SqliteStore, tmp_path: Path) -> None:
    (one, first), (two, second), (old, third) = (make_key("x") for _ in range(3))
    path = written(
        tmp_path / "keys.json",
        {
            "name": "Ada",
            "id": "1",
            "weight": 2,
            "limits": {"queued_jobs": 5, "stored_bytes": None},
            "keys": [
                {"prefix": first.prefix, "digest": first.digest},
                {"prefix": third.prefix, "digest": third.digest, "revoked": True},
            ],
        },
        {
            "name": "bo",
            "keys": [
                {
                    "prefix": second.prefix,
                    "digest": second.digest,
                    "scopes": ["admin"],
                    "expires": "2100-01-01T00:00:00+01:00",
                }
            ],
        },
    )
    load_keys(store, path)
    limits = {"queued_jobs": 5, "stored_bytes": math.inf}
    assert authenticate(store, one) == Tenant("1", "Ada", 2.0, limits)
    assert authenticate(store, two, "admin") == Tenant("bo", "bo")
    assert "revoked" in refused(store, old)[2]
    kept = store.key(second.prefix)
    assert kept is not None and kept.expires == datetime(2099, 12, 31, 23, tzinfo=UTC).timestamp()
    written(path, {"name": "bo", "keys": [{"prefix": second.prefix, "digest": second.digest}]})
    load_keys(store, path)
    assert "revoked" in refused(store, one)[2] and authenticate(store, two).id == "bo"


def test_keys_that_were_written_are_read_again(tmp_path: Path) -> None:
    tenants = [
        Tenant("1", "Ada", 2.0, {"queued_jobs": 5, "stored_bytes": math.inf}),
        Tenant("bo", "bo"),
    ]
    keys = [
        make_key("1", ["jobs", "admin"], 4e9)[1],
        replace(make_key("1")[1], revoked=True),
        make_key("bo", ["admin"])[1],
    ]
    path = tmp_path / "keys.json"
    write_keys(path, tenants, keys)
    assert read_keys(path) == (tenants, keys) and path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(OptionError):
        write_keys(path, tenants, [replace(keys[0], expires=1e300)])
    assert read_keys(path) == (tenants, keys)


KEY = {"prefix": "insitu_abcdefgh", "digest": "a" * 64}
WRONG: dict[str, tuple[Any, ...]] = {
    "no name": ({"keys": [KEY]},),
    "empty name": ({"name": ""},),
    "unknown field": ({"name": "ada", "wieght": 2},),
    "weight": ({"name": "ada", "weight": 0},),
    "prefix": ({"name": "ada", "keys": [{**KEY, "prefix": "insitu_abcdefgh\n"}]},),
    "whole key": ({"name": "ada", "keys": [{**KEY, "prefix": make_key("ada")[0]}]},),
    "digest": ({"name": "ada", "keys": [{**KEY, "digest": "a" * 63}]},),
    "scope": ({"name": "ada", "keys": [{**KEY, "scopes": ["job"]}]},),
    "no zone": ({"name": "ada", "keys": [{**KEY, "expires": "2030-01-01T00:00:00"}]},),
    "limit": ({"name": "ada", "limits": {"queued": 1}},),
    "negative": ({"name": "ada", "limits": {"queued_jobs": -1}},),
    "tenant twice": ({"name": "ada"}, {"name": "bo", "id": "ada"}),
    "key twice": ({"name": "ada", "keys": [KEY]}, {"name": "bo", "keys": [KEY]}),
}


@pytest.mark.parametrize("tenants", WRONG.values(), ids=WRONG)
def test_a_file_with_something_else_in_it_is_refused(
    tmp_path: Path, tenants: tuple[Any, ...]
) -> None:
    with pytest.raises((LoadError, OptionError)):
        read_keys(written(tmp_path / "keys.json", *tenants))


def test_a_file_that_is_not_there_or_open_to_all_is_refused(
    store: SqliteStore, tmp_path: Path
) -> None:
    with pytest.raises(LoadError):
        load_keys(store, tmp_path / "keys.json")
    path = written(tmp_path / "keys.json", {"name": "ada", "keys": [KEY]})
    path.chmod(0o666)
    with pytest.raises(LoadError, match="chmod o-w"):
        load_keys(store, path)
    path.chmod(0o644)
    load_keys(store, path)
    assert store.key(KEY["prefix"]) is not None
    for tenants in ([], [{"name": "ada", "keys": [{**KEY, "revoked": True}]}]):
        with pytest.raises(LoadError, match="no key"):
            load_keys(store, written(path, *tenants))
    assert store.keys() == [
        Key(KEY["prefix"], KEY["digest"], "ada", frozenset(("jobs",)), None, False)
    ]


def test_keys_of_a_file_that_changes_are_taken_while_the_server_runs(
    store: SqliteStore, tmp_path: Path
) -> None:
    path = tmp_path / "keys.json"
    (one, first), (two, second) = make_key("ada"), make_key("ada")
    write_keys(path, [ADA], [first])
    watched = WatchedKeys(store, path)
    assert authenticate(store, one) == ADA and refused(store, two)[0] == "unauthorised"
    write_keys(path, [ADA], [replace(first, revoked=True), second])
    watched.look()
    assert "revoked" in refused(store, one)[2] and authenticate(store, two) == ADA
    path.write_text("{")
    watched.look()  # nobody is shut out by a file that is broken, or gone
    path.unlink()
    watched.look()
    assert authenticate(store, two) == ADA
