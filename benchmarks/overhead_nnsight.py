"""The experiments of overhead.py in nnsight, in an environment of its own.

Prints one line of JSON: microseconds over a bare forward, and nnsight's version. It imports
nothing of Insitu.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import nnsight
import torch
from timing import medians
from transformers import GPT2Config, GPT2LMHeadModel


def main() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16, n_layer=12, n_head=4, vocab_size=1000, bos_token_id=0, eos_token_id=None
    )
    module = GPT2LMHeadModel(config).eval()
    model = nnsight.NNsight(module)
    ids = torch.randint(0, 1000, (1, 16))

    def bare() -> None:
        with torch.no_grad():
            module(ids, use_cache=False)

    def save_1() -> None:
        with torch.no_grad(), model.trace(ids, use_cache=False):
            kept = model.lm_head.output.save()
        assert kept.shape == (1, 16, 1000)

    def save_12() -> None:
        kept = []
        with torch.no_grad(), model.trace(ids, use_cache=False):
            kept = nnsight.save([])
            for block in model.transformer.h[:11]:
                kept.append(block.output)
            kept.append(model.lm_head.output)
        assert len(kept) == 12

    found = medians({"bare": bare, "save_1": save_1, "save_12": save_12}, int(sys.argv[1]))
    over = {name: found[name] - found["bare"] for name in ("save_1", "save_12")}
    print(json.dumps(over | {"version": version("nnsight")}))


if __name__ == "__main__":
    main()
