"""The head of a page: a title and a description, which browsers, searches and link previews show.

MkDocs calls the function here while it builds (`hooks` in mkdocs.yml). Both come from the page
itself: its first heading and the first sentences below. The names in the navigation are short, and
two pages may have the same one.
"""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

_LENGTH = 200  # of a description in characters: search engines cut longer ones
_MARKED = re.compile(r"<a[^>]*headerlink.*?</a>|<[^>]+>", re.S)


def on_page_content(content: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Gives a page its title and description.

    Raises:
        ValueError: if the page does not begin with a heading and a paragraph.
    """
    title, description = head(content, page.file.src_uri)
    page.meta.setdefault("description", description)
    if not page.is_homepage:
        page.meta.setdefault("title", title)
    return content


def head(content: str, name: str) -> tuple[str, str]:
    """Returns the title and the description of a page.

    Args:
        content: the page, as HTML.
        name: what the page is called in errors.

    Raises:
        ValueError: if the page does not begin with a heading and a paragraph.
    """
    found = re.search(r"<h1.*?>(.*?)</h1>(.*?)<p>(.*?)</p>", content, re.S)
    if found is None or re.search(r"<h2|<table|<pre", found[2]):
        raise ValueError(f"{name} does not begin with a heading and a paragraph.")
    sentences = re.split(r"(?<=[.?:]) (?=[A-Z])", _plain(found[3]).rstrip(":"))
    description = sentences[0]
    for sentence in sentences[1:]:
        if len(description) + len(sentence) >= _LENGTH:
            break
        description += f" {sentence}"
    return _plain(found[1]), html.escape(description)


def _plain(marked: str) -> str:
    """Returns the text of HTML, in one line."""
    return " ".join(html.unescape(_MARKED.sub("", marked)).split()).strip(" ¶")
