"""What `dir` shows of a model and its blocks is on a page of the documentation."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import insitu
from insitu import LanguageModel, Model
from insitu.tracing.invocation import Invocation
from insitu.tracing.tracer import Tracer

DOCS = Path(__file__).parents[1] / "docs"
IDS = [[3, 4, 5]]


def pages() -> Iterator[str]:
    """What the pages say: text and code, without what is made of docstrings."""
    for page in DOCS.rglob("*.md"):
        if "reference" not in page.parts:
            yield page.read_text()
    for page in DOCS.rglob("*.ipynb"):
        for cell in json.loads(page.read_text())["cells"]:
            yield "".join(cell["source"])


SAID = "\n".join(pages())


def opened(model: LanguageModel) -> dict[str, Any]:
    with model.trace() as tracer:
        with tracer.invoke(IDS) as invoker:
            pass
    with model.generate(max_new_tokens=1) as generator:
        with generator.invoke(IDS) as other:
            pass
    return {
        "model": model,
        "tracer": tracer,
        "invoker": invoker,
        "generator": generator,
        "invoker of a generation": other,
    }


@pytest.mark.no_wire
def test_every_public_name_is_on_a_page(gpt2: LanguageModel) -> None:
    found = opened(gpt2)
    found["plain model"] = Model(nn.Sequential(nn.Linear(2, 2)))
    found["module"] = gpt2.transformer.h[0]
    for what, thing in found.items():
        module = getattr(thing, "module", None)
        children = dict(module.named_children()) if isinstance(module, nn.Module) else {}
        names = [name for name in dir(thing) if not name.startswith("_") and name not in children]
        missing = [name for name in names if not re.search(rf"[.`]{name}\b", SAID)]
        assert not missing, (what, missing)
        assert {"model": "trace", "tracer": "invoke", "invoker": "output"}.get(
            what, names[0]
        ) in names


@pytest.mark.no_wire
def test_what_is_hidden_exists(gpt2: LanguageModel) -> None:
    found = opened(gpt2)
    hidden = {
        "model": type(gpt2)._internal,
        "tracer": sys.modules[Tracer.__module__]._INTERNAL,
        "invoker": sys.modules[Invocation.__module__]._INTERNAL,
    }
    for what, names in hidden.items():
        thing = found[what]
        assert names and not names & set(dir(thing))
        for name in names:
            assert hasattr(type(thing), name) or name in vars(thing), (what, name)


def test_a_child_with_a_hidden_name_is_shown_and_reached() -> None:
    class Costly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plans = nn.Linear(2, 2)

        def forward(self, x: Any) -> Any:
            return self.plans(x)

    model = Model(Costly())
    assert "plans" in dir(model)
    assert model["plans"].module is model.module.plans


def test_what_people_type_first_is_at_the_top() -> None:
    for name in ("Graph", "Invocation", "Result", "Tracer"):
        assert isinstance(getattr(insitu, name), type) and name in insitu.__all__
        assert name in dir(insitu)
    assert insitu.Result is sys.modules["insitu.methods"].Result
    assert insitu.__version__ == version("insitu")
    with pytest.raises(AttributeError, match="nearest: 'Graph'"):
        insitu.Grahp  # noqa: B018


@pytest.mark.thorough
def test_methods_are_not_imported_before_they_are_asked_for() -> None:
    code = (
        "import sys, insitu; insitu.Graph; insitu.__version__\n"
        "assert not [name for name in sys.modules if name.startswith('insitu.methods')]\n"
        "insitu.Result\n"
        "assert 'insitu.methods' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
