"""The pictures of the site are what the blocks of its pages end in."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[1] / "docs"
METHODS = sorted((DOCS / "methods").glob("*.md"))

PAGE = """
```python
from insitu.methods import Result
import torch

result = Result("a", "b", torch.tensor(1.0), ())
```

```python
print(result.title)
result.plot(title="first")
```

```text
a
```

Text.

```python
figure = result.plot(title="not shown")
```

```python
figure
```

```python
raise AssertionError("behind the last picture")
```
"""


@pytest.fixture(scope="module")
def site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_picture_comes_after_the_block_that_ends_in_it(site: ModuleType) -> None:
    (end, first), (last, second) = site.pictures(PAGE, "page.md")
    assert PAGE[:end].endswith("```text\na\n```\n")
    assert PAGE[:last].endswith("```python\nfigure\n```\n")
    assert "first" in first.to_json() and "not shown" in second.to_json()


def test_a_block_that_fails_names_its_line(site: ModuleType) -> None:
    page = "Text.\n\n```python\nx = 1\nx.plot()\n```\n"
    with pytest.raises(AttributeError) as caught:
        [*site.pictures(page, "page.md")]
    assert str(caught.traceback[-1].path).endswith("page.md")
    assert caught.traceback[-1].lineno + 1 == 5
    with pytest.raises(TypeError, match="line 5: 1 is no figure"):
        [*site.pictures(page.replace("x.plot()", "x"), "page.md")]


@pytest.mark.parametrize("page", METHODS, ids=lambda page: page.stem)
def test_every_method_has_a_picture(site: ModuleType, page: Path) -> None:
    blocks = site._BLOCK.finditer(page.read_text())
    assert any(site._shown(block[1]) for block in blocks)
