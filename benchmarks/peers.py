"""How other libraries are measured: each in an environment and a process of its own.

`tell` is for `experiments_NAME.py`, which runs there and imports nothing of Insitu; `ask` runs it.
Times are compared with those of a bare forward in the same process, results by their fingerprint.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from subjects import fingerprint
from timing import medians

Cases = Mapping[str, Callable[[], list[torch.Tensor]]]


def tell(library: str, experiments: Mapping[str, Callable[[], Cases]]) -> None:
    """Measures experiments as asked and prints a line of JSON: times in ms, and fingerprints."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    measured = {}
    for name, make in experiments.items():
        if asked["only"] not in name:
            continue
        cases = make()
        prints = {case: fingerprint(run()) for case, run in cases.items()}
        taken = medians(cases, asked["rounds"], warm_up=0)
        times = {case: microseconds / 1e3 for case, microseconds in taken.items()}
        measured[name] = {"times": times, "fingerprints": prints}
    print(json.dumps({"library": f"{library} {version(library)}", "measured": measured}))


def ask(name: str, python: str, rounds: int, only: str = "") -> dict[str, Any]:
    """Runs the script of a peer with its Python and returns what it told."""
    script = Path(__file__).with_name(f"experiments_{name}.py")
    asked = {"rounds": rounds, "only": only, "threads": torch.get_num_threads()}
    command = [python, str(script), json.dumps(asked)]
    without_ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=without_ours)
    return json.loads(done.stdout.splitlines()[-1])
