"""The notebooks of this site: their links lead to pages, and their pictures have a description.

MkDocs calls the function here while it builds (`hooks` in mkdocs.yml). In a repository a link of a
notebook leads to a file, such as `../harvest.md`. MkDocs turns such links of Markdown into those of
pages, and checks them. It does neither for notebooks.
"""

from __future__ import annotations

import posixpath
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

_LINK = re.compile(r'href="(?!\w+:)([^"#]+\.(?:md|ipynb))(#[^"]*)?"')
_UNDESCRIBED = 'alt="No description has been provided for this image"'


def on_page_content(content: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Mends the links and pictures of a notebook; other pages stay as they are.

    Raises:
        ValueError: if a link leads to no page.
    """
    name = page.file.src_uri
    if not name.endswith(".ipynb"):
        return content

    def mended(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), link[1]))
        target = files.get_file_from_path(path)
        if target is None:
            raise ValueError(f"{name} has a link to {link[1]!r}, which is no page.")
        return f'href="{target.url_relative_to(page.file)}{link[2] or ""}"'

    content = content.replace(_UNDESCRIBED, 'alt="The picture that the code above draws"')
    return _LINK.sub(mended, content)
