"""Looks for sentences that have to be read twice, in pages, docstrings and error messages.

Too long is a sentence of more than 35 words; code in backticks counts as one. Banned are a few
constructions that stand where a noun would do. Quotations and questions may have them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

MOST_WORDS = 35
BANNED = re.compile(r"\b(what is|likewise|whatever|of which|(?:is|are|was) found out)\b", re.I)
_END = re.compile(r"(?<=[.!?])[\"')*]*\s+(?=[\"'(*]*[A-Z`\d])|\n\s*\n")
_CODE = re.compile(r"^ *(```|~~~).*?^ *\1\s*$|<(svg|style|!--).*?(-->|</\2>)", re.M | re.S)
_INLINE = re.compile(r"``.+?``|`[^`]+`|\$[^$]+\$|https?://\S+", re.S)
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_ITEM = re.compile(r"^\s*(?:[-*+]|\d+\.|#{1,6}|>|:::|!!!|\|)\s", re.M)
_ENTRY = re.compile(r"^ *(?:\*{0,2}\w+(?:, \*{0,2}\w+)*: (?=\S)|[-*] |[A-Z]\w+:$)", re.M)
_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”")


def faults(text: str) -> Iterator[str]:
    """Why sentences of a text have to be read twice, each with its beginning."""
    for sentence in _END.split(_LINK.sub(r"\1", _INLINE.sub(" Code ", text))):
        words = re.findall(r"[\w'.,/%-]*\w[\w'.,/%-]*", sentence or "")
        start = " ".join(words[:8])
        if len(words) > MOST_WORDS:
            yield f"{len(words)} words: {start} ..."
        found = BANNED.search(_QUOTED.sub(" quoted ", sentence or ""))
        if found and not sentence.rstrip("\"' *)").endswith("?"):
            yield f"`{found[1]}`: {start} ..."


def page_faults(page: Path) -> list[str]:
    """The faults of a Markdown page, each paragraph, item and cell by itself."""
    text = _CODE.sub("\n\n", page.read_text())
    text = re.sub(r"^( *\|.*)$", lambda row: row[0].replace("|", "\n\n"), text, flags=re.M)
    return [*faults(_ITEM.sub("\n\n", text))]


def docstring_faults(source: str) -> list[str]:
    """The faults of docstrings, those of attributes too, without their examples."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            text = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                plain = re.sub(r"^ *>>>.*?(?=\n\s*\n|\Z)", "", text.value, flags=re.M | re.S)
                plain = re.sub(r"^.*  # .*$", "\n\n", plain, flags=re.M)  # lines of code
                # Each argument and each item by itself, without its name.
                plain = _ENTRY.sub("\n\n", plain)
                found += [f"line {statement.lineno}: {fault}" for fault in faults(plain)]
    return found


def message_faults(source: str) -> list[str]:
    """The faults of messages: the texts that errors and warnings are made of."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        name = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Call) and (name.endswith("Error") or name == "warn") and node.args:
            text = _text(node.args[0]).replace("\n", "\n\n")
            found += [f"line {node.lineno}: {fault}" for fault in faults(text)]
    return found


def _text(node: ast.expr) -> str:
    """What a text says, with a word for each thing that is put into it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return "thing"
