"""Every Python block of the README and of docs/ runs, in order, and prints what it says there."""

import contextlib
import doctest
import importlib
import inspect
import io
import itertools
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import pytest

import insitu
from tests.thinning import sampled

ROOT = Path(__file__).parents[1]
# Made from tests and from docstrings; commands are run by tests/test_cli.py; for contributors.
WITHOUT_CODE = ("architectures.md", "reference/", "command_line.md", "dev/")
DOCS = [
    page
    for page in sorted((ROOT / "docs").rglob("*.md"))
    if not page.relative_to(ROOT / "docs").as_posix().startswith(WITHOUT_CODE)
]
PAGES = [ROOT / "README.md", *DOCS]
# They take most of the time of all pages and docstrings; what they show has tests of its own.
LONG = tuple(
    f"docs/{name}.md"
    for name in (
        *(
            "chat",
            "coming_from",
            "faq",
            "harvest",
            "how_it_works",
            "large_models",
            "models",
            "names",
        ),
        *("planning", "recipes/index", "methods/direct_logit_attribution", "methods/logit_lens"),
        *("remote", "sending", "training_on_activations", "which_method", "recipes/changing"),
        *("recipes/generation", "recipes/gradients", "recipes/many", "recipes/reading"),
        *("methods/ablation", "methods/activation_patching", "methods/alignment"),
        *("methods/attention_patterns", "methods/attribution_patching", "methods/causal_tracing"),
        *("methods/circuits", "methods/edge_attribution", "methods/feature_examples"),
        *("methods/index", "methods/integrated_gradients", "methods/path_patching"),
        *("methods/probing", "methods/sae", "methods/steering", "methods/tuned_lens"),
    )
)
LONG_EXAMPLES = (
    *(
        f"insitu.methods.{name}"
        for name in (
            *("attribution_patching", "causal_tracing", "discovery", "edge_attribution"),
            *("faithfulness", "patching", "path_patching"),
        )
    ),
    *("insitu.harvest.harvesting", "insitu.harvest.live_model"),
    "insitu.models.checking.verification",
)
SERVED = "http://127.0.0.1:8765"
"""Where `insitu serve` is, unless it is told otherwise."""


@contextlib.contextmanager
def as_it_says(text: str):
    """What a page says is running: `insitu serve insitu/eiffel`, as a command."""
    if SERVED not in text:
        yield
        return
    run = "from insitu.cli import app; app()"
    command = [sys.executable, "-c", run, "serve", "insitu/eiffel"]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen([*command, "--data", folder])
        try:
            wait_for(f"{SERVED}/readyz", process)
            yield
        finally:
            process.terminate()
            process.wait(30)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert process.poll() is None, "the server has ended"
        with contextlib.suppress(OSError), urllib.request.urlopen(url):
            return
        time.sleep(0.2)
    raise AssertionError("the server did not start")


# A server imports Transformers twice. CI runs these pages; `make test` runs the README up to there.
SERVING = [page for page in PAGES if SERVED in page.read_text()]
SHORT = [page for page in PAGES if not page.as_posix().endswith(LONG) and page not in SERVING]


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """The lines of each block, and what the page says that they print."""
    blocks = re.findall(r"```python\n(.*?)```(?:\s+```text\n(.*?)```)?", page.read_text(), re.S)
    assert blocks
    return blocks


def assert_printed(blocks: Iterable[tuple[str, str]], page: Path) -> None:
    namespace: dict[str, object] = {}
    for code, printed in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, str(page), "exec"), namespace)
        assert out.getvalue() == printed


@pytest.mark.parametrize(
    "page", sampled(PAGES, SHORT), ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_every_block_runs_and_prints_what_it_says(page: Path) -> None:
    with as_it_says(page.read_text()):
        assert_printed(blocks_of(page), page)


def test_blocks_of_the_readme_that_need_no_server_yet_print_what_it_says() -> None:
    page = ROOT / "README.md"
    before = list(itertools.takewhile(lambda block: SERVED not in block[0], blocks_of(page)))
    assert len(before) > 5
    assert_printed(before, page)


MODULES = [m.name for m in pkgutil.walk_packages(insitu.__path__, "insitu.")]


@pytest.mark.parametrize(
    "name", sampled(MODULES, [name for name in MODULES if name not in LONG_EXAMPLES])
)
def test_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    if ">>>" in inspect.getsource(module):  # most modules have no example
        assert doctest.testmod(module).failed == 0
