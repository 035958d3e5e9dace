"""What standard names are on every type of model, as a table: a part of docs/architectures.md.

`make architectures` runs `test_every_architecture.py` with each version of Transformers and gives
the verdicts, as pytest writes them down, to this.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap
from xml.etree import ElementTree

from tests.fidelity.every.judge import COLUMNS

MEANINGS = {
    "opens": "`LanguageModel(module)` takes it",
    "read": "outputs of modules by path are what plain hooks see",
    "blocks": "`blocks` and `encoder_blocks` are what the prompt passes, one after the other",
    "residual": "`residual_in`, `residual_mid`, `residual_out` and the additions to the stream",
    "heads": "`q`, `k`, `v`, `z`, `result`, `W_O`",
    "pattern": "`scores` and `pattern`: also what the model itself returns as its attentions",
    "W_Q": "`W_Q`, `W_K`, `W_V`",
    "MLP": "`pre`, `post`, `W_in`, `W_gate`, `W_out`",
    "experts": "`router` and `weights`",
    "logits": "`logits`",
    "embedding": "`embedding`, `W_E`, `W_U`",
    "numbers": "`n_layers`, `n_heads`, `d_model`, `vocab_size`",
}
TASKS = {
    "causal": "Causal language models",
    "seq2seq": "Encoders and decoders",
    "masked": "Masked language models",
    "image-text": "Images and text",
}
_RIGHT, _REFUSED, _WRONG, _CRASH = "right", "refused", "wrong", "crash"
_SIGNS = {_WRONG: "**no**", _CRASH: "**error**"}

Cell = tuple[str, str]  # a state and its reason
Row = Mapping[str, Cell]


def verdicts(*xmls: str) -> dict[tuple[str, str], Row]:
    """Returns what came of each type, by task and type.

    Args:
        xmls: what pytest wrote with `--junit-xml`.
    """
    found: dict[tuple[str, str], Row] = {}
    for xml in xmls:
        for one in ElementTree.fromstring(xml).iter("property"):
            if one.attrib["name"] == "verdicts":
                told = json.loads(one.attrib["value"])
                cells = {column: (cell[0], cell[1]) for column, cell in told["cells"].items()}
                found[told["task"], told["type"]] = cells
    return found


def section(runs: Mapping[str, Mapping[tuple[str, str], Row]]) -> tuple[str, list[str]]:
    """Returns the totals in one sentence, and the lines of the section.

    Args:
        runs: the verdicts by the version of Transformers, the newest first.
    """
    names = sorted({name for run in runs.values() for name in run})
    cells = [cell for run in runs.values() for row in run.values() for cell in row.values()]
    counts = {state: sum(cell[0] == state for cell in cells) for state in _STATES}
    types = {kind for _, kind in names}
    totals = (
        f"{len(types)} types of model were tried with Transformers {' and '.join(runs)}: "
        f"{counts[_RIGHT]} groups of names are right, {counts[_REFUSED]} are refused with a "
        f"reason, {counts[_WRONG]} are wrong, {counts[_CRASH]} fail."
    )
    return totals, list(_lines(runs, names))


def _lines(
    runs: Mapping[str, Mapping[tuple[str, str], Row]], names: Sequence[tuple[str, str]]
) -> Iterator[str]:
    reasons: dict[str, int] = {}
    yield f"| type | {' | '.join(COLUMNS)} |"
    yield f"|{' --- |' * (len(COLUMNS) + 1)}"
    for task, heading in TASKS.items():
        yield f"| *{heading}* |{' |' * len(COLUMNS)}"
        for one, kind in names:
            if one == task:
                told = [_cell(runs, (one, kind), column, reasons) for column in COLUMNS]
                yield f"| {kind} | {' | '.join(told)} |"
    yield ""
    yield "What the columns mean:"
    yield ""
    yield from (f"- **{column}**: {MEANINGS[column]}." for column in COLUMNS)
    yield ""
    yield "Why names are refused (the first reason of each group):"
    yield ""
    for reason, number in reasons.items():
        yield from wrap(
            f"- ({number}) {reason.rstrip('.')}.", 120, subsequent_indent="  ",
            break_on_hyphens=False, break_long_words=False,
        )  # fmt: skip


_STATES = (_RIGHT, _REFUSED, _WRONG, _CRASH)


def _cell(
    runs: Mapping[str, Mapping[tuple[str, str], Row]],
    name: tuple[str, str],
    column: str,
    reasons: dict[str, int],
) -> str:
    """One cell: the same for all versions that have the type, or each version's own."""
    signs: dict[str, str] = {}
    for version, run in runs.items():
        if name in run:
            signs[version.partition(".")[0]] = _sign(run[name].get(column), reasons)
    different = set(signs.values())
    if len(different) == 1 and len(signs) == len(runs):
        return different.pop()
    return ", ".join(f"{sign} [{version}]" for version, sign in signs.items())


def _sign(cell: Cell | None, reasons: dict[str, int]) -> str:
    if cell is None:
        return "-"
    state, reason = cell
    if state == _REFUSED:
        return f"({reasons.setdefault(reason, len(reasons) + 1)})"
    return "yes" if state == _RIGHT else _SIGNS[state]
