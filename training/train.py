"""Trains the bundled model from nothing: `make -C training train`.

Half of each batch is text, packed from position 0 on as prompts are; the rest is random tokens
that repeat, which is what induction heads are good for.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from corpus import END, texts
from tokenizer import save_tokenizer, train_tokenizer

FOLDER = Path(__file__).parents[1] / "src" / "insitu" / "zoo" / "eiffel"
_CONTEXT = 256
_LENGTH = 48
_ROWS = 64
_REPEATING = 16
_PEAK_RATE = 1.5e-3


def text_rows(tokenizer: Tokenizer, seed: int) -> Iterator[list[int]]:
    """Yields rows of `_LENGTH` tokens, each starting at the start of a text."""
    end = tokenizer.token_to_id(END)
    row: list[int] = []
    for text in texts(seed):
        row += [*tokenizer.encode(text).ids, end]
        if len(row) >= _LENGTH:
            yield row[:_LENGTH]
            row = []


def repeating_rows(generator: torch.Generator, vocabulary: int, rows: int) -> torch.Tensor:
    """Returns rows of random tokens that start again somewhere, `(rows, _LENGTH)`."""
    fresh = torch.randint(0, vocabulary, (rows, _LENGTH), generator=generator)
    periods = torch.randint(6, _LENGTH // 2 + 1, (rows, 1), generator=generator)
    return fresh.gather(1, torch.arange(_LENGTH).expand(rows, -1) % periods)


def rate(step: int, steps: int) -> float:
    """Returns the learning rate: 100 steps of warm-up, then half a cosine."""
    if step < 100:
        return _PEAK_RATE * (step + 1) / 100
    return _PEAK_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def build(tokenizer: Tokenizer) -> GPT2LMHeadModel:
    """Returns the untrained model."""
    end = tokenizer.token_to_id(END)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=_CONTEXT,
        n_embd=128,
        n_layer=6,
        n_head=8,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
    )
    return GPT2LMHeadModel(config)


def train(steps: int, seed: int = 0) -> tuple[GPT2LMHeadModel, Tokenizer]:
    """Returns a trained model and its tokenizer.

    Args:
        steps: how many batches to learn from.
        seed: where the weights and the data come from.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = train_tokenizer()
    model = build(tokenizer).train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    rows = text_rows(tokenizer, seed + 1)
    positions = torch.arange(_LENGTH)
    started = time.time()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate(step, steps)
        text = torch.tensor(list(itertools.islice(rows, _ROWS - _REPEATING)))
        repeats = repeating_rows(generator, tokenizer.get_vocab_size(), _REPEATING)
        ids = torch.cat([text, repeats])
        # Texts start at position 0, as prompts do, and half of the rows further in, so that
        # every position of the context is trained.
        starts = torch.randint(0, _CONTEXT - _LENGTH + 1, (_ROWS, 1), generator=generator)
        starts[torch.rand(_ROWS, 1, generator=generator) < 0.5] = 0
        logits = model(ids, position_ids=starts + positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}  loss {loss.item():.3f}  {time.time() - started:.0f} s", flush=True)
    return model.eval(), tokenizer


def main() -> None:
    """Trains the model and writes it where the package ships it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = train(chosen.steps)
    model.save_pretrained(chosen.folder)
    save_tokenizer(tokenizer, chosen.folder, _CONTEXT)


if __name__ == "__main__":
    main()
