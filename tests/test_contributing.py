"""What the pages for contributors say of files and folders is so."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "insitu"
FOLDERS = sorted({path.parent for path in PACKAGE.rglob("*.py")})
PAGES = [*sorted((ROOT / "docs" / "dev").rglob("*.md")), ROOT / "CONTRIBUTING.md"]
FILE = re.compile(r"`((?:\.\./|[\w.-]+/)*[\w*.-]+\.(?:py|md|toml|yml|txt|svg|json)|(?:[\w.-]+/)+)`")


def missing(page: Path, roots: list[Path]) -> list[str]:
    """The files and folders that a page names, and that are in none of some folders."""
    named = FILE.findall(page.read_text())
    real = [name for name in named if not re.search(r"NAME|FOLDER", name)]
    return [name for name in real if not any([*root.glob(name)] for root in roots)]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_folder_has_a_readme_that_names_files_that_are_there(folder: Path) -> None:
    page = folder / "README.md"
    named = page.read_text()
    assert len(named.splitlines()) <= 30, "what is more belongs to docs/dev"
    inner = [path for path in folder.iterdir() if path.is_dir()]
    assert missing(page, [folder, *inner, PACKAGE, ROOT]) == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_file_is_in_the_readme_of_its_folder(folder: Path) -> None:
    patterns = [Path(name).name for name in FILE.findall((folder / "README.md").read_text())]
    files = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    assert [name for name in files if not any(fnmatch(name, one) for one in patterns)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_that_a_page_for_contributors_names_is_there(page: Path) -> None:
    folders = [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())]
    tests = [ROOT / "tests", ROOT / "tests" / "fidelity" / "zoo"]
    assert missing(page, [ROOT, page.parent, *folders, *tests]) == []


def test_a_name_that_is_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Begin with `graph/nodes.py`, then `graph/node.py` and `nowhere/`.")
    assert missing(page, [PACKAGE]) == ["graph/nodes.py", "nowhere/"]


def test_every_decision_is_in_the_list_and_says_what_was_measured() -> None:
    folder = ROOT / "docs" / "dev" / "decisions"
    listed = re.findall(r"\]\((\d\d_\w+\.md)\)", (folder / "index.md").read_text())
    assert listed == sorted(path.name for path in folder.glob("[0-9]*.md"))
    for name in listed:
        text = (folder / name).read_text()
        for part in ("Context", "Decision", "Measured", "Cost", "What would change it"):
            assert f"**{part}.**" in text, (name, part)


FORMS = sorted((ROOT / ".github").rglob("*.yml"))


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_workflows_and_forms_are_what_their_readers_take(path: Path) -> None:
    said = yaml.safe_load(path.read_text())
    if path.parent.name == "workflows":
        assert said[True].keys() <= {"push", "pull_request", "schedule", "workflow_dispatch"}
        for job in said["jobs"].values():
            assert {"runs-on", "steps"} <= job.keys() and job["steps"]
            for step in job["steps"]:
                assert ("uses" in step) != ("run" in step)
            needed = job.get("needs", [])
            assert {needed} <= said["jobs"].keys() if isinstance(needed, str) else not needed
    elif path.stem != "config":
        assert {"name", "description", "body"} <= said.keys()
        ids = [part["id"] for part in said["body"] if part["type"] != "markdown"]
        assert len(ids) == len(set(ids)) > 1


def test_workflows_use_targets_and_files_that_are_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text()
        assert set(re.findall(r"run: make ([a-z-]+)", text)) <= targets
        for name in re.findall(r"[\w-]*constraints[\w-]*\.txt", text):
            assert (ROOT / name).is_file(), (path, name)
    assert "coverage" in targets


def test_the_tests_run_on_two_pythons_and_two_generations_of_transformers() -> None:
    said = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    matrix = said["jobs"]["tests"]["strategy"]["matrix"]
    assert len(matrix["python"]) == len(matrix["constraints"]) == 2
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert needed == f">={matrix['python'][0]}"


def test_the_citation_is_of_this_version_and_the_hooks_are_ours() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (said["version"], said["license"]) == (project["version"], project["license"])
    assert {"cff-version", "message", "title", "authors"} <= said.keys()
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["id"] for hook in repo["hooks"]] == [
        "ruff-format",
        "ruff-check",
        "pyright",
        "prose",
    ]


def test_the_changelog_has_the_version_that_comes_next() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    heads = re.findall(r"^## \[(.+?)\]", text, re.M)
    assert heads[0] == "Unreleased"
    assert version in heads or f"{version} will be the first release" in text
