"""How the files of the package stand on each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import insitu
from tests.files_entered import files_entered

ROOT = Path(insitu.__file__).parent
ROOMS = (
    *("graph", "display", "engine", "batching", "tracing", "remote", "models", "harvest", "server"),
)


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


ORDER = (
    *("graph", "display", "engine", "batching", "tracing"),
    *("remote", "zoo", "models", "methods", "harvest", "server"),
)


@pytest.mark.parametrize("room", ORDER)
def test_folders_import_from_those_above_them(room: str) -> None:
    below = {f"insitu.{name}" for name in (*ORDER[ORDER.index(room) + 1 :], "cli")}
    for name, path in FILES.items():
        if name.startswith(f"insitu.{room}."):
            found = {".".join(one.split(".")[:2]) for one in imported(path)}
            assert not found & below, name


@cache
def imports_of_all() -> dict[str, set[str]]:
    return {name: set(imported(path)) & FILES.keys() - {name} for name, path in FILES.items()}


@pytest.mark.parametrize("room", ROOMS)
def test_no_files_import_each_other_in_a_circle(room: str) -> None:
    ours = [name for name in FILES if name.startswith(f"insitu.{room}.")]
    assert len(ours) > 10
    whole = imports_of_all()
    for name in ours:
        reached, pending = set[str](), [*whole[name]]
        while pending:
            current = pending.pop()
            if current not in reached:
                reached.add(current)
                pending.extend(whole[current])
        assert name not in reached, f"what {name} imports leads back to it"


@pytest.mark.no_wire
def test_one_value_enters_few_files() -> None:
    """A reader who follows one value, from `with` to `.value`, has so many files to open."""
    # With Transformers 4, functions that the model's own forward calls pass through that file.
    assert len(files_entered().keys() - {"graph/before_torch.py"}) <= 25


def test_no_file_is_longer_than_400_lines() -> None:
    long = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}


# What is hung on modules, or taken from them, has these names. They are written in `engine/` alone.
TABLES = frozenset(
    [
        *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
        *("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_compiled_call_impl"),
        *("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks"),
        *("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"),
        *("register_module_forward_hook", "register_module_forward_pre_hook", "_call_impl"),
        *("register_buffer", "register_parameter", "register_module", "add_module"),
        *("functional_call", "_reparametrize_module", "swap_tensors"),
    ]
)
ATTRIBUTES = frozenset(["forward", "training", "_parameters", "_buffers", "_modules"])
TOUCHING = {"insitu.engine.interpose", "insitu.engine.keeping"}
READING = {
    "insitu.engine.foreign_hooks",  # whose the hooks are that are there
    "insitu.graph.dispatch",  # which module's forward is running, for a message
    "insitu.habits",  # what is written here in the place of other libraries' methods
    "insitu.models.spellings",
    "insitu.graph.before_torch",  # torch's own classes, once, when it is imported
}


def touched(path: Path) -> Iterator[str]:
    """Where a file does to modules what only the engine may do."""
    own = {"self", "model", "other", "saved", "config", "item", "target", "owner", "made"}
    for node in ast.walk(ast.parse(path.read_text())):
        name = node.attr if isinstance(node, ast.Attribute) else None
        name = node.value if isinstance(node, ast.Constant) else name
        if isinstance(name, str) and name in TABLES:
            yield f"{node.lineno}: {name}"
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = [*node.targets]
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        while targets:
            target = targets.pop()
            text = ast.unparse(target)
            if isinstance(target, ast.Tuple | ast.List):
                targets.extend(target.elts)
            elif isinstance(target, ast.Attribute) and target.attr in ATTRIBUTES:
                if not text.startswith("self."):  # an object of ours has a field of that name
                    yield f"{target.lineno}: {text}"
            elif isinstance(target, ast.Subscript):
                inner = ast.unparse(target.value)
                tables = tuple(f".{name}" for name in (*ATTRIBUTES, "__dict__"))
                if inner.endswith(tables) or (inner.startswith("vars(") and inner[5:-1] not in own):
                    yield f"{target.lineno}: {text}"


@pytest.mark.parametrize("name", sorted(FILES.keys() - TOUCHING - READING))
def test_one_place_touches_modules(name: str) -> None:
    assert [*touched(FILES[name])] == []


def test_what_touches_modules_is_seen() -> None:
    for name in TOUCHING:
        assert [*touched(FILES[name])]


PLANNER = ("crossings", "demand", "pass_plan", "arrangement", "shared_blocks", "planner", "summary")


def test_the_planner_knows_no_module() -> None:
    """It goes from plain data to plain data: nothing that it stands on has modules in sight."""
    pending, reached = [f"insitu.batching.{name}" for name in PLANNER], set[str]()
    while pending:
        current = pending.pop()
        if current not in reached:
            reached.add(current)
            pending.extend(set(imported(FILES[current])) & FILES.keys())
    rooms = {name.split(".")[1] for name in reached}
    assert rooms <= {"graph", "display", "engine", "batching"}
    for name in reached:
        if not name.startswith("insitu.graph."):  # what is recorded may be of `torch.nn`
            found = [one for one in imported(FILES[name]) if one.startswith("torch.nn")]
            source = FILES[name].read_text()
            assert not found and "from torch import nn" not in source, name
