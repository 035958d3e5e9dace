"""What an experiment costs over a forward that takes no time, by how much the caches have lost.

On a busy machine whole forwards vary by more than what is to be measured; these differences are
found again to within 1 or 2 µs. Before each run some memory is swept through: 3 MB take the place
of what a core's own caches held, 64 MB that of what the cores share, which on a shared machine is
what the neighbours do during a forward. Run by `make bench`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from overhead import Insitu, Plain, build
from timing import medians
from transformers import GPT2LMHeadModel

NAMES = ("save_1", "patch", "save_12")


def without_work() -> GPT2LMHeadModel:
    """A GPT-2 whose blocks and head are called and return what they are given."""
    module = build(16, 4, 1000)
    hidden = torch.randn(1, 16, 16)
    for part in (*module.transformer.h, module.lm_head):
        part.forward = lambda value: value

    def forward(*args: object, **kwargs: object) -> torch.Tensor:
        value = hidden
        for block in module.transformer.h:
            value = block(value)
        return module.lm_head(value)

    module.forward = forward
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--megabytes", type=float, nargs="*", default=[0, 3, 16, 64])
    chosen = parser.parse_args()
    module, ids = without_work(), torch.zeros(1, 16, dtype=torch.int64)
    plain, insitu = Plain(module, ids), Insitu(module, ids)
    cases: dict[str, Callable[[], object]] = {"bare": plain.bare}
    for name in NAMES:
        cases[f"hooks {name}"] = getattr(plain, name)
        cases[f"insitu {name}"] = getattr(insitu, name)
    print("µs over a forward that takes no time: hooks by hand, and Insitu")
    print("MB swept".rjust(10), *(name.replace("_", " ").rjust(16) for name in NAMES))
    for size in chosen.megabytes:
        swept = torch.ones(max(1, int(size * 1e6) // 8), dtype=torch.float64)
        found = medians(cases, chosen.rounds, before=swept.sum)
        over = {name: found[name] - found["bare"] for name in cases}
        pairs = (f"{over[f'hooks {n}']:7.0f}{over[f'insitu {n}']:9.0f}" for n in NAMES)
        print(f"{size:10g}", *pairs)


if __name__ == "__main__":
    main()
