"""Old names work, and warn at the user's line."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

import insitu
from insitu import OptionError
from insitu.deprecation import deprecated, renamed, renamed_attribute, renames_of, warn_deprecated
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


@pytest.mark.thorough
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


@renamed(what="part", words="texts", values={"where": {"all": None}}, goes_in="0.3")
def looked_at(
    model: str, *, part: str = "heads", texts: int = 0, where: str | None = None
) -> tuple[str, str, int, str | None]:
    """Looks at a part."""
    return model, part, texts, where


def test_old_names_of_arguments_are_the_new_ones_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning) as caught:
        found = looked_at("m", what="mlps", words=2)  # pyright: ignore
        line = here(1).line - 1
    assert found == ("m", "mlps", 2, None) == looked_at("m", part="mlps", texts=2)
    assert [(one.filename, one.lineno) for one in caught] == [(__file__, line)] * 2
    assert [str(one.message) for one in caught] == [
        "`what=` is deprecated and goes in Insitu 0.3: write `part=` instead.",
        "`words=` is deprecated and goes in Insitu 0.3: write `texts=` instead.",
    ]


def test_an_old_value_is_the_new_one_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="`where='all'` .* write `where=None` instead"):
        assert looked_at("m", where="all")[-1] is None
    assert looked_at("m", where="last")[-1] == "last"


def test_an_argument_under_both_of_its_names_is_refused() -> None:
    with pytest.raises(OptionError, match="`looked_at` is given `part` and `what`"):
        looked_at("m", part="heads", what="heads")  # pyright: ignore


def test_signatures_have_the_new_names_alone() -> None:
    assert [*inspect.signature(looked_at).parameters] == ["model", "part", "texts", "where"]
    assert looked_at.__name__ == "looked_at" and looked_at.__doc__ == "Looks at a part."
    renames = renames_of(looked_at)
    assert renames is not None and renames.names == {"what": "part", "words": "texts"}
    assert renames_of(halved) is None


@pytest.mark.parametrize("names", [{"what": "parts"}, {"part": "texts"}])
def test_a_new_name_that_is_none_is_refused_where_the_function_is_written(
    names: dict[str, str],
) -> None:
    with pytest.raises(TypeError, match="cannot have"):
        renamed(**names, goes_in="0.3")(lambda part, texts: None)


def test_the_old_name_of_an_attribute_is_the_new_one_with_a_warning() -> None:
    class Thing:
        new = 3
        old = renamed_attribute("old", "new", goes_in="0.3")

    with pytest.warns(
        DeprecationWarning, match=r"`\.old` is deprecated .* write `\.new`"
    ) as caught:
        assert Thing().old == 3
        line = here(1).line - 1
    assert [one.lineno for one in caught] == [line]
    with pytest.raises(AttributeError):
        Thing().old = 4


def test_the_version_is_that_of_the_package() -> None:
    assert insitu.__version__ == version("insitu")
