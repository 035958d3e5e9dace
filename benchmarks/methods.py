"""What methods take against the same loops with hooks, one run at a time, in one process.

On a random model of the size of GPT-2 small, with the progress bar on. Results are compared before
times are taken, and the exit status is 1 if a ratio is below what the project holds itself to.
"""

from __future__ import annotations

import argparse
import sys

import torch
from plain import Change, collect, logits, on_input
from subjects import LAYERS, LENGTH, gpt2, tokens
from timing import medians
from torch import nn

from insitu import LanguageModel
from insitu.methods import activation_patching, logit_difference

ANSWER, INSTEAD = 11, 23
LEAST = 5.0  # times as long with hooks


def with_hooks(module: nn.Module, clean: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
    """Patches what each block is given at each position, `(layer, position)`."""
    blocks = list(module.transformer.h)

    def one(donor: torch.Tensor, position: int) -> Change:
        def patch(value: torch.Tensor) -> None:
            value[:, position] = donor[:, position]

        return patch

    found = []
    for block, donor in zip(blocks, collect(module, blocks, clean, on_input), strict=True):
        for position in range(clean.shape[1]):
            with on_input(block, one(donor, position)):
                last = logits(module, corrupted)[0, -1]
                found.append(last[ANSWER] - last[INSTEAD])
    return torch.stack(found).reshape(len(blocks), -1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    module = gpt2()
    model = LanguageModel(module)
    clean, corrupted = tokens(module, LENGTH, 1), tokens(module, LENGTH, 2)

    def insitu() -> torch.Tensor:
        metric = logit_difference(ANSWER, INSTEAD)
        return activation_patching(
            model,
            clean[0],
            corrupted[0],
            metric,
            sites="residual_in",
            normalised=False,
            progress=True,
        ).values

    def hooks() -> torch.Tensor:
        return with_hooks(module, clean, corrupted)

    torch.testing.assert_close(insitu(), hooks(), rtol=1e-3, atol=1e-4)
    times = medians({"hooks": hooks, "insitu": insitu}, chosen.rounds, warm_up=0)
    ratio = times["hooks"] / times["insitu"]
    print(f"activation patching, {LAYERS} layers x {LENGTH} positions, residual_in")
    print(f"  hooks, a run each  {times['hooks'] / 1e6:8.2f} s")
    print(f"  insitu             {times['insitu'] / 1e6:8.2f} s")
    print(f"  ratio              {ratio:8.2f}   (at least {LEAST:g})")
    return 0 if ratio >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
