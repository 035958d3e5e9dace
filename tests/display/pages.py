"""Pictures looked at: what stands where once Chromium has drawn them."""

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed, in which pictures are drawn"
)
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom")

Corner = tuple[float, float]

# The corners of the box around each text, as it is rotated, from the upper left of its picture.
_MEASURE = """
function measured(root) {
  const origin = root.getBoundingClientRect();
  const found = [];
  for (const text of root.querySelectorAll("text")) {
    const style = getComputedStyle(text);
    const clear = style.fillOpacity === "0" || /, 0\\)$/.test(style.fill);
    if (!text.textContent.trim() || style.visibility === "hidden" || clear) continue;
    const box = text.getBBox();
    if (!box.width) continue;
    const to = text.getScreenCTM();
    const corners = [[0, 0], [1, 0], [1, 1], [0, 1]].map(([x, y]) => {
      const at = new DOMPoint(box.x + x * box.width, box.y + y * box.height).matrixTransform(to);
      return [at.x - origin.left, at.y - origin.top];
    });
    const classes = [];
    for (let up = text; up && up !== root; up = up.parentElement) {
      classes.push(up.getAttribute("class") || "");
    }
    found.push({text: text.textContent, classes: classes.join(" "), corners});
  }
  return {width: origin.width, height: origin.height, texts: found};
}
"""


@dataclass(frozen=True)
class Text:
    """A text in a picture: what it says, what it is, and the corners of its box in pixels."""

    text: str
    classes: str
    corners: tuple[Corner, ...]

    @property
    def is_tick(self) -> bool:
        return bool(re.search(r"[xy]\d*tick|cbtick|\bcb\d", self.classes))

    def overlaps(self, other: "Text", slack: float = 1.5) -> bool:
        """Whether two boxes overlap by more than a few pixels: no line separates them."""
        for points in (self.corners, other.corners):
            for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1], strict=True):
                long = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
                across = (y1 - y2) / long, (x2 - x1) / long
                mine = [x * across[0] + y * across[1] for x, y in self.corners]
                theirs = [x * across[0] + y * across[1] for x, y in other.corners]
                if max(mine) < min(theirs) + slack or max(theirs) < min(mine) + slack:
                    return False
        return True


@dataclass(frozen=True)
class Drawn:
    """A picture as it was drawn."""

    width: float
    height: float
    texts: tuple[Text, ...]

    def said(self) -> list[str]:
        return [text.text for text in self.texts]

    def outside(self) -> list[str]:
        """Texts of which a part is not in the picture."""
        return [
            text.text
            for text in self.texts
            for x, y in text.corners
            if not (-0.5 <= x <= self.width + 0.5 and -0.5 <= y <= self.height + 0.5)
        ]

    def overlapping(self, ticks: bool = False) -> list[tuple[str, str]]:
        texts = [text for text in self.texts if text.is_tick or not ticks]
        return [(a.text, b.text) for a, b in combinations(texts, 2) if a.overlaps(b)]


def dumped(page: Path, patience: int = 20_000) -> str:
    """A page as it is once its scripts have run."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *_FLAGS, f"--virtual-time-budget={patience}", f"file://{page}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout


def drawn(parts: Mapping[str, str], folder: Path, head: str = "") -> dict[str, Drawn]:
    """Draws pieces of HTML, each with an svg or a plot in it, in one page.

    Args:
        parts: the pieces, by name.
        folder: where the page is put.
        head: what its scripts need.
    """
    body = "".join(
        f'<div class="part" id="part-{name}">{part}</div>' for name, part in parts.items()
    )
    script = (
        _MEASURE
        + """
    async function all() {
      for (let wait = 0; wait < 100; wait++) {
        const plots = [...document.querySelectorAll(".plotly-graph-div")];
        if (plots.every((plot) => plot.querySelector(".main-svg"))) break;
        await new Promise((done) => setTimeout(done, 50));
      }
      await document.fonts.ready;
      await new Promise((done) => setTimeout(done, 300));
      const found = {};
      for (const part of document.querySelectorAll(".part")) {
        const root = part.querySelector(".plotly-graph-div") || part.querySelector("svg");
        found[part.id.slice(5)] = measured(root);
      }
      const out = document.createElement("script");
      out.type = "application/json";
      out.id = "measured";
      out.textContent = JSON.stringify(found).replaceAll("<", "\\\\u003c");
      document.body.append(out);
    }
    window.addEventListener("load", all);
    """
    )
    page = folder / "page.html"
    page.write_text(
        f'<!doctype html><meta charset="utf-8"><body style="margin:0">{head}{body}'
        f"<script>{script}</script></body>"
    )
    found = re.search(r'<script[^>]*id="measured"[^>]*>(.*?)</script>', dumped(page), re.S)
    assert found, "the page was not measured"
    return {name: _read(told) for name, told in json.loads(found[1]).items()}


def _read(told: dict[str, Any]) -> Drawn:
    texts = tuple(
        Text(one["text"], one["classes"], tuple(map(tuple, one["corners"])))
        for one in told["texts"]
    )
    return Drawn(told["width"], told["height"], texts)
