"""What experiments take that are written as plain invocations, against the same with hooks.

Random models of the size of GPT-2 small, like Llama, and 16 wide. Every experiment is first run
once in each way, and the results compared. Run by `make bench-peers`, which gives `--peers` the
Pythons of environments that have other libraries: they run `experiments_NAME.py`.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from cases import (
    Cases,
    Subject,
    batches,
    edges,
    generations,
    gradients,
    patching,
    runs,
    subject,
    sweep,
)
from peers import ask
from subjects import fingerprint, gpt2, llama
from tables import Figure, Table, figures, write_part
from timing import medians

SMALL, LLAMA, NARROW = "GPT-2 small's size", "like Llama", "16 wide"


@dataclass(frozen=True, slots=True)
class Experiment:
    """What is measured, on which models, and how many more rounds it takes than others."""

    name: str
    cases: Callable[[Subject], Cases]
    subjects: Sequence[str] = (SMALL, LLAMA)
    more: int = 1


@dataclass(frozen=True, slots=True)
class Measured:
    """The medians of an experiment on a model, in milliseconds, and what its results are like."""

    name: str
    subject: str
    times: dict[str, float]
    fingerprint: float


EXPERIMENTS = (
    Experiment("sweep 12 x 16", partial(sweep.sweep, length=16)),
    Experiment("sweep 12 x 48", partial(sweep.sweep, length=48), (SMALL,)),
    Experiment("sweep 12 x 4", partial(sweep.sweep, length=4)),
    Experiment("heads 12 x 12", patching.heads),
    Experiment("causal tracing", patching.tracing),
    Experiment("steering", runs.steering, more=4),
    Experiment("logit lens", runs.lens, more=4),
    Experiment("attribution patching", gradients.attribution, more=4),
    Experiment("attribution patching of 16 pairs", gradients.pairs, (SMALL,)),
    Experiment("edge attribution of 16 pairs", edges.edges, (SMALL,)),
    Experiment("gradients of 32 ragged prompts", gradients.ragged, (SMALL,)),
    Experiment("64 ragged prompts", batches.ragged, (SMALL,)),
    Experiment("64 ragged prompts", batches.ragged, (NARROW,), more=20),
    Experiment("block 6 of 512 prompts", batches.collecting, (SMALL,)),
    Experiment("32 steered generations", generations.steered, (SMALL,)),
    Experiment("32 sampled generations", generations.sampled, (SMALL,)),
    Experiment("a trace in a loop", runs.loop, (NARROW,), more=100),
)


def build(name: str) -> Subject:
    made = {SMALL: gpt2, LLAMA: llama, NARROW: lambda: gpt2(16, 4, 1000)}
    return subject(name, made[name]())


def measure(experiment: Experiment, on: Subject, rounds: int) -> Measured:
    """Compares the results of all cases, and times them."""
    cases = experiment.cases(on)
    ours = cases["insitu"]()
    for name, case in cases.items():
        if name not in ("bare", "insitu"):
            found, expected = torch.stack(ours), torch.stack(list(case()))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    taken = medians(cases, rounds * experiment.more, warm_up=0)
    times = {name: microseconds / 1e3 for name, microseconds in taken.items()}
    return Measured(experiment.name, on.name, times, fingerprint(ours))


def table(measured: Measured) -> Table:
    bare, ours = measured.times.get("bare"), measured.times["insitu"]
    rows = [
        [name, f"{time:,.3f}", f"{time / bare:.2f}" if bare else "", f"{time / ours:.2f}"]
        for name, time in measured.times.items()
    ]
    columns = ("", "ms", "of a bare forward", "of Insitu")
    return Table(f"{measured.name}, {measured.subject}", columns, rows)


def held(measured: Sequence[Measured], counted: Sequence[Figure]) -> list[Figure]:
    """Returns the figures that the project holds itself to, of what was measured."""
    times = {(each.name, each.subject): each.times for each in measured}
    alone, layered = "hooks, a run each", "hooks, a batch per layer"
    ratios = (
        ("sweep 12 x 16", SMALL, layered, "insitu", 2.4, True),
        ("sweep 12 x 48", SMALL, layered, "insitu", 3.4, True),
        ("sweep 12 x 16", SMALL, alone, "insitu", 6, True),
        ("sweep 12 x 4", SMALL, layered, "insitu", 1, True),
        ("64 ragged prompts", SMALL, "hooks, one by one", "insitu", 1.5, True),
        ("64 ragged prompts", NARROW, "hooks, one by one", "insitu", 4, True),
        ("block 6 of 512 prompts", SMALL, "insitu", "hooks, full forwards", 0.6, False),
        ("attribution patching of 16 pairs", SMALL, "insitu", "hooks, one batch", 1.3, False),
        ("edge attribution of 16 pairs", SMALL, "insitu", "hooks, one batch", 1.3, False),
        ("gradients of 32 ragged prompts", SMALL, "insitu", "hooks, one batch", 1.15, False),
        ("32 steered generations", SMALL, "insitu", "hooks, one batch", 1.15, False),
        ("32 steered generations", SMALL, "hooks, one by one", "insitu", 8, True),
        ("32 sampled generations", SMALL, "insitu", "bare", 1.3, False),
    )
    found = [
        Figure(f"{name}, {on}: {top} / {bottom}", taken[top] / taken[bottom], limit, least)
        for name, on, top, bottom, limit, least in ratios
        if (taken := times.get((name, on)))
    ]
    if taken := times.get(("a trace in a loop", NARROW)):
        over = (taken["insitu"] - taken["bare"]) * 1e3
        found.append(Figure("a trace in a loop over bare, µs", over, 60))
    return [*found, *counted]


def operations(on: Subject) -> Figure:
    """How far the operations that the sweep does are from those that its plan says."""
    done, planned = sweep.operations(on, 16)
    return Figure("sweep 12 x 16: operations off the plan's, share", abs(done / planned - 1), 0.05)


def compare(measured: Measured, told: dict[str, Any]) -> Table | None:
    """Returns what a peer takes for an experiment, None if it did not measure this one.

    Raises:
        ValueError: if it found something else than Insitu did.
    """
    found = told["measured"].get(measured.name)
    if found is None or measured.subject != SMALL:
        return None
    bare, ours = found["times"].pop("bare"), measured.times
    rows: list[list[str]] = []
    for case, time in found["times"].items():
        if not math.isclose(found["fingerprints"][case], measured.fingerprint, rel_tol=1e-3):
            raise ValueError(f"{told['library']}, {measured.name}: {case} finds something else")
        share = (time / bare) / (ours["insitu"] / ours["bare"])
        rows.append([case, f"{time:,.3f}", f"{time / bare:.2f}", f"{share:.2f}"])
    columns = ("", "ms", "of its bare forward", "of Insitu, in bare forwards")
    return Table(f"{measured.name}, {told['library']}", columns, rows)


def machine() -> str:
    """What the numbers were measured on, and when."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return (
        f"{date.today()}, {os.cpu_count()} cores ({model[1] if model else platform.machine()}), "
        f"{memory:.0f} GiB, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}, Transformers {transformers.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of what takes seconds")
    parser.add_argument("--only", default="", help="what the names of experiments contain")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peers", nargs="*", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--write", type=Path, help="a file for all tables, such as RESULTS.md")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    tables: list[Table] = []
    measured: list[Measured] = []
    counted: list[Figure] = []

    def show(found: Table) -> None:
        tables.append(found)
        print(found.text(), end="\n\n", flush=True)

    for name in (NARROW, SMALL, LLAMA):  # what takes microseconds before what fills the memory
        on = build(name)
        for experiment in EXPERIMENTS:
            if name in experiment.subjects and chosen.only in experiment.name:
                measured.append(measure(experiment, on, chosen.rounds))
                show(table(measured[-1]))
                if name == SMALL and experiment.name == "sweep 12 x 16":
                    counted.append(operations(on))
    for peer in chosen.peers:
        told = ask(*peer.split("="), rounds=chosen.rounds, only=chosen.only)
        for found in filter(None, (compare(each, told) for each in measured)):
            show(found)
    tables.insert(0, figures(held(measured, counted)))
    print(tables[0].text())
    if chosen.write is not None:
        parts = [TITLE.format(machine=machine()), *(found.markdown() for found in tables)]
        write_part(chosen.write, parts)


TITLE = """# Experiments, measured

Written by `make bench-peers`: {machine}.

Random models; medians of rounds in which all cases of one table run interleaved. Results are
compared before times are taken, those of other libraries by a fingerprint. Each library has an
environment and a process of its own, so it is compared in forwards of the bare model beside it.
"""


if __name__ == "__main__":
    main()
