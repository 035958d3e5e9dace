import gc
import os

import psutil
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from insitu import LanguageModel


def resident() -> int:
    gc.collect()
    return psutil.Process(os.getpid()).memory_info().rss


@pytest.mark.slow
def test_ten_thousand_traces_do_not_grow_the_process() -> None:
    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=4, vocab_size=100, bos_token_id=0, eos_token_id=0
    )
    model = LanguageModel(GPT2LMHeadModel(config).eval())
    ids = torch.randint(0, 100, (1, 16))

    def traces(count: int) -> None:
        for _ in range(count):
            with model.trace(ids):
                hidden = model.transformer.h[0].output[0]
                (hidden * 2)[:, -1].save()
                model.lm_head.output.save()

    traces(500)
    before = resident()
    traces(10_000)
    assert resident() - before < 5 * 2**20
