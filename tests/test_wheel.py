"""The wheel: what is in it, and that it works where nothing of the repository is."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import insitu

pytestmark = [pytest.mark.slow, pytest.mark.no_wire]

ROOT = Path(__file__).parents[1]
MOST_BYTES = 8_000_000


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints, without anything of the repository in its path."""
    given = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=given, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Where the build backend is installed, as `insitu[test]` has it, nothing is downloaded.
    isolation = ["--no-build-isolation"] if find_spec("hatchling") else []
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", *isolation, "-w", folder, ROOT, cwd=folder)
    (found,) = folder.glob("insitu-*.whl")
    return found


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel, and with the packages of this one behind it."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Paths of a `.pth` file come last, and its folders' own `.pth` files are not read: an editable
    # install of the repository in this environment is not seen.
    (packages / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", "--force-reinstall", wheel, cwd=folder)
    return folder


def test_the_wheel_is_small_and_has_the_package_alone(wheel: Path) -> None:
    assert wheel.stat().st_size < MOST_BYTES
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    about = f"insitu-{insitu.__version__}.dist-info/"
    assert {name.partition("/")[0] + "/" for name in names} == {"insitu/", about}
    assert [name for name in names if "test" in name or "__pycache__" in name] == []
    kinds = {Path(name).suffix for name in names if name.startswith("insitu/")}
    assert kinds == {".py", ".md", ".json", ".safetensors", ".typed"}
    ours = Path(insitu.__file__).parent
    tracked = run("git", "ls-files", ".", cwd=ours).split() if (ROOT / ".git").exists() else []
    assert {f"insitu/{name}" for name in tracked} <= {*names}


def test_the_installed_wheel_says_its_version_and_has_its_model(fresh: Path) -> None:
    assert run(fresh / "bin" / "insitu", "--version", cwd=fresh) == (
        f"insitu {insitu.__version__}\n"
    )
    code = (
        "import insitu, insitu.zoo, pathlib\n"
        "from insitu import LanguageModel\n"
        "print(pathlib.Path(insitu.__file__).parent)\n"
        "files = pathlib.Path(insitu.zoo.folder('insitu/eiffel')).iterdir()\n"
        "print(sorted(path.name for path in files))\n"
        "model = LanguageModel('insitu/eiffel')\n"
        "with model.generate('The Eiffel Tower is in the city of', max_new_tokens=1) as run: pass\n"
        "print(model.tokenizer.decode(run.output[0, -1]))\n"
    )
    place, files, answer = run(fresh / "bin" / "python", "-c", code, cwd=fresh).splitlines()
    assert Path(place).is_relative_to(fresh)
    assert "model.safetensors" in files and "config.json" in files
    assert answer == " Paris"
