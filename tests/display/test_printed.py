"""What is printed as pages and PNGs."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest
from PIL import Image
from rich.table import Table
from rich.text import Text

from insitu.display.printed import write_printed_html, write_printed_picture
from tests.display.pages import needs_chromium

LINES = ["├── a <b>: [bold]", "│   └── é 城", "", "end"]


def test_a_page_has_what_was_printed_character_by_character(tmp_path: Path) -> None:
    table = Table(box=None, padding=0)
    table.add_column("head")
    for line in LINES:
        table.add_row(Text(line))
    write_printed_html(table, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    found = re.search(r"<pre[^>]*>(.*?)</pre>", page, re.S)
    assert found is not None
    plain = unescape(re.sub(r"<[^>]*>", "", found[1]))
    assert [line.rstrip() for line in plain.splitlines()] == ["head", *LINES]


@needs_chromium
@pytest.mark.parametrize(
    ("high", "wide"),
    [
        pytest.param(3, 20, marks=pytest.mark.thorough),
        (20, 100),
        pytest.param(2500, 10, marks=pytest.mark.thorough),
    ],
)
def test_a_png_is_as_large_as_what_was_printed(tmp_path: Path, high: int, wide: int) -> None:
    write_printed_picture(Text("\n".join(["█" * wide] * high)), tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as image:
        width, height = image.size
        dark = image.convert("L").point(lambda level: 255 * (level < 128)).getbbox()
    assert height <= 30_100 and dark is not None
    margin = height / (high * 15.86 + 32) * 16
    left, top, right, bottom = dark
    assert left == pytest.approx(margin, abs=4) and width - right == pytest.approx(margin, abs=4)
    assert top == pytest.approx(margin, abs=10) and height - bottom == pytest.approx(margin, abs=10)
