"""Old names work, and warn at the user's line."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

import insitu
from insitu.deprecation import deprecated, warn_deprecated
from insitu.graph.location import here

pytestmark = pytest.mark.no_wire


@deprecated("halved", instead="half", goes_in="0.3")
def halved(number: float, *, by: float = 2) -> float:
    """Gives a part of a number."""
    return number / by


def test_an_old_name_does_what_it_did_and_names_the_new_one_and_the_version() -> None:
    with pytest.warns(DeprecationWarning) as caught:
        assert halved(9, by=3) == 3
        line = here(1).line - 1
    (warned,) = caught
    assert str(warned.message) == (
        "`halved` is deprecated and goes in Insitu 0.3: write `half` instead."
    )
    assert (warned.filename, warned.lineno) == (__file__, line)
    assert halved.__name__ == "halved" and halved.__doc__ == "Gives a part of a number."


def test_it_warns_once_for_each_line() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            halved(1)
        halved(1)
    first, second = [warned.lineno for warned in caught]
    assert second == first + 1


def test_it_is_an_error_each_time_where_warnings_are_errors() -> None:
    for _ in range(2):
        with pytest.raises(DeprecationWarning, match="write `half` instead"):
            halved(1)


def test_an_argument_warns_at_the_line_outside_of_the_library() -> None:
    """However many frames of the library stand between: here five."""
    source = "def deep(n, last):\n    return deep(n - 1, last) if n else last()\n"
    inside: dict[str, Callable[..., None]] = {}
    exec(compile(source, str(Path(insitu.__file__).with_name("methods.py")), "exec"), inside)

    with pytest.warns(DeprecationWarning, match="`what=` is deprecated") as caught:
        inside["deep"](5, _warn)
        line = here(1).line - 1
    assert [warned.lineno for warned in caught] == [line]


# As if it stood in a file of the package, as the functions that warn of an argument do.
_WARN = compile(
    "lambda: warn_deprecated('what=', instead='parts=', goes_in='0.3')",
    str(Path(insitu.__file__).with_name("ablation.py")),
    "eval",
)
_warn = eval(_WARN, {"warn_deprecated": warn_deprecated})


def test_python_shows_it_in_a_script_and_hides_it_in_what_the_script_imports(
    tmp_path: Path,
) -> None:
    """As Python's own filters have it, for whoever can change the line."""
    (tmp_path / "imported.py").write_text(
        "from insitu.deprecation import deprecated\n"
        "old = deprecated('old', instead='new', goes_in='0.3')(lambda: None)\n"
        "def use():\n    old()\n"
    )
    script = tmp_path / "script.py"
    script.write_text("import imported\nimported.use()\nfor _ in range(2):\n    imported.old()\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stderr.count("DeprecationWarning") == 1
    assert f"{script}:4: DeprecationWarning: `old` is deprecated" in done.stderr


def test_the_version_is_that_of_the_package() -> None:
    assert insitu.__version__ == version("insitu")
