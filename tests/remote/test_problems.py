"""Errors that travel as data, and come back as what they were."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

import insitu
from insitu import InsituError, LimitError, LoadError, RemoteError, ShapeError
from insitu.display.page import PictureError
from insitu.graph import errors
from insitu.graph.location import Location, SourceLine, here
from insitu.remote.problems import (
    Line,
    Problem,
    ProblemError,
    class_of,
    code_of,
    error_of,
    problem_of,
    relocated,
)

CLASSES = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, InsituError)
]


def travelled(problem: Problem) -> Problem:
    return msgspec.json.decode(msgspec.json.encode(problem), type=Problem)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_comes_back_as_it_was_at_the_users_own_line(kind: type[InsituError]) -> None:
    own = here(1)
    received = Location(SourceLine("test_problems.py", own.line, own.text), 0)
    problem = travelled(problem_of(kind("What was found.\nWhat to write.", received)))
    assert problem.code == code_of(kind) and class_of(problem.code) is kind
    assert problem.detail == "What was found.\nWhat to write."
    assert problem.line == Line("test_problems.py", own.line, own.text)
    asked: list[Line] = []

    def line_of(line: Line) -> Location:
        asked.append(line)
        return own

    error = error_of(problem, line_of)
    assert type(error) is kind and asked == [problem.line]
    assert str(error) == f"What was found.\nWhat to write.\n{own}" and error.location == own


def test_codes_are_short_and_all_different() -> None:
    codes = [code_of(kind) for kind in CLASSES]
    assert len(set(codes)) == len(CLASSES) == 24
    assert code_of(ShapeError) == "shape"
    assert code_of(errors.IndexOutOfRangeError) == "index_out_of_range"
    assert code_of(PictureError) == "insitu" and code_of(KeyError) == "internal"


def test_an_unknown_line_is_shown_as_the_server_has_it() -> None:
    problem = Problem("shape", "Shape", 422, "Wrong.", line=Line("/home/me/x.py", 3, "y = z\x1b"))
    error = error_of(problem, lambda _: None)
    assert str(error) == 'Wrong.\n  File "x.py", line 3\n    y = z '
    beyond = msgspec.structs.replace(problem, line=Line("x.py", 10**18))
    assert "line 2147483648" in str(error_of(beyond, lambda _: None))


def test_the_folders_of_a_file_stay_where_they_are() -> None:
    location = Location(SourceLine("/home/someone/secret/x.py", 3, "y = z"), 0)
    assert problem_of(ShapeError("Wrong.", location)).line == Line("x.py", 3, "y = z")


def test_a_limit_keeps_its_numbers() -> None:
    sent = LimitError("Too much", limit="nodes", found=12, allowed=10)
    found: Any = error_of(travelled(problem_of(sent, 413)), lambda _: None)
    assert (found.limit, found.found, found.allowed) == ("nodes", 12, 10)
    for number in (10**400, math.inf, -math.inf, math.nan):
        problem = travelled(problem_of(LimitError("Too much", found=number)))
        assert math.isfinite(problem.found)


def test_what_is_no_error_of_insitu_says_nothing_of_the_server() -> None:
    problem = problem_of(FileNotFoundError("/srv/secret/model.safetensors"))
    assert (problem.code, problem.status, problem.line) == ("internal", 500, None)
    assert "secret" not in repr(problem)
    error = error_of(travelled(problem), lambda _: None)
    assert type(error) is RemoteError and (error.code, error.status) == ("internal", 500)


def test_errors_about_files_say_no_folders() -> None:
    for said in (
        "'/srv/secret/gpt2/config.json' cannot be read: no such file.",
        "The weights of 'insitu/eiffel' cannot be loaded from /srv/se cret/config.json, why",
        r"C:\secret\config.json cannot be read.",
        "~/secret/config.json",
    ):
        detail = problem_of(LoadError(said)).detail
        assert "secret" not in detail and "cret" not in detail and "config.json" in detail
    kept = "See https://huggingface.co/a/b: 'insitu/eiffel' has 1/2 of them, a / b."
    assert problem_of(LoadError(kept)).detail == kept
    assert problem_of(ShapeError("einsum 'a b -> /x/y'")).detail == "einsum 'a b -> /x/y'"


SERVERS_OWN = (
    *("not_found", "unauthorised", "scope", "busy", "quota", "never_fits", "engine_died"),
    *("missing_blobs", "storage", "protocol", "too_large", "not_done", "gone"),
)


@pytest.mark.parametrize("code", SERVERS_OWN)
def test_what_only_a_server_has_is_a_remote_error(code: str) -> None:
    problem = Problem(code, code, 429, "Not now.", retry_after=3.0)
    error = error_of(travelled(problem), lambda _: None)
    assert type(error) is RemoteError and isinstance(error, RuntimeError)
    assert (error.code, error.status, error.retry_after) == (code, 429, 3.0)
    assert problem_of(error) == msgspec.structs.replace(problem, title=problem_of(error).title)
    assert insitu.RemoteError is RemoteError and "RemoteError" in insitu.__all__


def test_a_problem_that_is_raised_is_that_problem() -> None:
    problem = Problem("scope", "Scope", 403, "The key is not for this.")
    assert problem_of(ProblemError(problem)) is problem


def test_texts_of_a_server_cannot_steer_a_terminal() -> None:
    problem = Problem("\x1b[2Jx", "", 500, "One.\n\x1b]0;title\x07Two." + "x" * 10**6)
    error = error_of(problem, lambda _: None)
    assert isinstance(error, RemoteError)
    assert "\x1b" not in str(error) + error.code and "\x07" not in str(error)
    assert str(error).startswith("One.\n") and len(str(error)) < 10**5


def test_an_error_of_results_is_moved_to_the_users_own_line() -> None:
    own, received = here(1), Location(SourceLine("x.py", 3, "y = z"), 0)
    error = LimitError("Too much", received, limit="nodes", found=2, allowed=1)
    moved: Any = relocated(error, lambda _: own)
    assert type(moved) is LimitError and str(moved) == f"Too much\n{own}"
    assert (moved.location, moved.limit, moved.found) == (own, "nodes", 2)
    assert relocated(error, lambda _: None) is error
    bare = LimitError("Too much")
    assert relocated(bare, lambda _: own) is bare


def test_lines_that_a_message_names_are_the_users_own_too() -> None:
    own, other = here(1), Location(SourceLine("y.py", 7, "a[0] = b"), 0)
    said = f"It comes later and is read at\n{other}\nA write stands at"

    def line_of(line: Line) -> Location | None:
        return own if line == Line("y.py", 7, "a[0] = b") else None

    error = error_of(travelled(problem_of(ShapeError(said))), line_of)
    assert str(error) == said.replace(str(other), str(own))
    received = Location(SourceLine("x.py", 3, "y = z"), 0)
    assert str(error_of(travelled(problem_of(ShapeError(said, received))), line_of)) == (
        f"{said.replace(str(other), str(own))}\n{received}"
    )
    nothing = error_of(travelled(problem_of(ShapeError(said))), lambda _: None)
    assert str(nothing) == said
