"""How the files of the package stand on each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import insitu

ROOT = Path(insitu.__file__).parent
ROOMS = ("graph", "tracing")


def module_of(path: Path) -> str:
    return ".".join(("insitu", *path.relative_to(ROOT).with_suffix("").parts))


FILES = {module_of(path).removesuffix(".__init__"): path for path in ROOT.rglob("*.py")}


def imported(path: Path) -> Iterator[str]:
    """The files that a file imports, wherever in it: in functions and under `TYPE_CHECKING` too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in FILES else node.module


@pytest.mark.parametrize("room", ROOMS)
def test_no_files_import_each_other_in_a_circle(room: str) -> None:
    ours = [name for name in FILES if name.startswith(f"insitu.{room}.")]
    assert len(ours) > 10
    whole = {name: set(imported(path)) & FILES.keys() - {name} for name, path in FILES.items()}
    for name in ours:
        reached, pending = set[str](), [*whole[name]]
        while pending:
            current = pending.pop()
            if current not in reached:
                reached.add(current)
                pending.extend(whole[current])
        assert name not in reached, f"what {name} imports leads back to it"
