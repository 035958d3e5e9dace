"""The pictures, links, titles and descriptions of the site, which its own hooks make."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

DOCS = Path(__file__).parents[1] / "docs"
METHODS = sorted((DOCS / "methods").glob("*.md"))
PAGES = sorted([*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")])

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


def hooks(name: str) -> ModuleType:
    """One of the files that MkDocs loads."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site() -> ModuleType:
    return hooks("pictures")


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_every_page_is_in_the_navigation(page: Path) -> None:
    name = page.relative_to(DOCS).as_posix()
    settings = (DOCS.parent / "mkdocs.yml").read_text()
    assert re.search(rf"[ ]{re.escape(name)}$", settings, re.M)


MARKDOWN = [page for page in PAGES if page.suffix == ".md"]


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_every_page_begins_with_a_title_and_a_sentence(page: Path) -> None:
    title, _, rest = page.read_text().partition("\n\n")
    assert re.fullmatch(r"# \S.*", title)
    assert re.match(r"(?!#|:::|```|\|)\S", rest)


def test_a_page_is_described_by_its_first_sentences() -> None:
    head = hooks("heads").head
    page = '<h1 id="x">A &amp; <code>b</code><a class="headerlink" href="#x">&para;</a></h1>\n'
    first, second = "It reads <em>a</em> &lt; b.", f"It writes {'c' * 180}."
    assert head(f"{page}<p>{first} {second}</p>", "x.md") == ("A & b", "It reads a &lt; b.")
    assert head(f"{page}<p>{first} It stops.</p>", "x.md")[1] == "It reads a &lt; b. It stops."
    with pytest.raises(ValueError, match=r"x\.md does not begin"):
        head(f"{page}<h2>B</h2><p>{first}</p>", "x.md")


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_an_item_of_a_list_is_no_part_of_the_paragraph_before(page: Path) -> None:
    """Behind a second paragraph of an item, Markdown takes a line for another one of its lines."""
    in_code = has_paragraphs = False
    before, swallowed = "", list[str]()
    for line in page.read_text().splitlines():
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code and re.match(r"(\d+\.|-) ", line):
            if has_paragraphs and before.startswith("    "):
                swallowed.append(line)
            has_paragraphs = False
        elif not in_code:
            has_paragraphs = not line or (has_paragraphs and line.startswith(" "))
        before = line
    assert not swallowed


def test_links_of_notebooks_lead_to_pages() -> None:
    mended = hooks("notebooks").on_page_content
    target = SimpleNamespace(url_relative_to=lambda file: "../../methods/sae/")
    files = SimpleNamespace(get_file_from_path={"methods/sae.md": target}.get)
    notebook = SimpleNamespace(file=SimpleNamespace(src_uri="tutorials/a.ipynb"))
    other = '<a href="https://example.org/a.md">b</a><a href="a.ipynb">c</a>'

    def link(path: str) -> str:
        return mended(f'<a href="{path}">sae</a>', page=notebook, config=None, files=files)

    assert link("../methods/sae.md#cost") == '<a href="../../methods/sae/#cost">sae</a>'
    assert link("https://example.org/a.md") == '<a href="https://example.org/a.md">sae</a>'
    with pytest.raises(ValueError, match=r"a link to '\.\./sae\.md', which is no page"):
        link("../sae.md")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="a.md"))
    assert mended(other, page=page, config=None, files=files) == other
