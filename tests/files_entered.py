"""Prints the files that one value enters in a warm block, from `with` to `.value`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import insitu
from insitu import LanguageModel

ROOT = Path(insitu.__file__).parent


def files_entered() -> dict[str, list[str]]:
    """The functions that a warm run of one read of one value calls, by the file they stand in."""
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=20, n_positions=32, bos_token_id=0
    )
    model = LanguageModel(GPT2LMHeadModel(config).eval())
    ids = torch.tensor([[1, 2, 3]])

    def read() -> Any:
        with model.trace(ids):
            value = model.transformer.h[-1].output[0].save()
        return value.value

    entered: dict[str, list[str]] = {}

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and Path(code.co_filename).is_relative_to(ROOT):
            name = Path(code.co_filename).relative_to(ROOT).as_posix()
            entered.setdefault(name, []).append(code.co_qualname)

    read(), read()  # the first finds out about the model, the second finds its plan
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        read()
    finally:
        sys.setprofile(before)
    return entered


if __name__ == "__main__":
    found = files_entered()
    for name, functions in found.items():
        print(f"{name}: {', '.join(functions)}")
    print(f"{len(found)} files, {sum(map(len, found.values()))} calls")
