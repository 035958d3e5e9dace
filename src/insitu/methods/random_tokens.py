"""Prompts of random tokens that come again: what follows can be told by looking back, and only so.

They are what heads are looked for on that copy from earlier in the prompt.
"""

from __future__ import annotations

import torch

from insitu.methods.sites import check_count
from insitu.models.language_model import LanguageModel
from insitu.models.tokens import vocabulary_of


def repeated_tokens(
    model: LanguageModel, *, length: int = 25, count: int = 10, repeats: int = 2, seed: int = 0
) -> torch.Tensor:
    """Returns prompts of random tokens, each repeated as a whole.

    Tokens are drawn without replacement where the vocabulary is large enough, and none of them is
    special; where the tokenizer begins a text with a token of its own, so do they.

    Args:
        model: the model.
        length: how many tokens come before they come again.
        count: how many prompts.
        repeats: how many times they come in all.
        seed: the tokens depend on nothing else.

    Returns:
        Token ids, `(prompt, position)`, on the CPU.

    Raises:
        OptionError: if one of the numbers is too small.
    """
    for name, number, least in (
        ("length", length, 2),
        ("count", count, 1),
        ("repeats", repeats, 2),
    ):
        check_count(name, number, least)
    size, special, start = vocabulary_of(model.module, model.config), set(), []
    tokenizer = model._tokenizer
    if tokenizer is not None and not isinstance(tokenizer, Exception):
        size = min(size, len(tokenizer))
        special = set(tokenizer.all_special_ids)
        begin = tokenizer.bos_token_id
        if begin is not None and tokenizer("").input_ids[:1] == [begin]:
            start = [begin]
    allowed = torch.tensor([token for token in range(size) if token not in special])
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        if len(allowed) >= length:
            picked = torch.randperm(len(allowed), generator=draw)[:length]
        else:
            picked = torch.randint(len(allowed), (length,), generator=draw)
        rows.append(
            torch.cat([torch.tensor(start, dtype=torch.long), allowed[picked].repeat(repeats)])
        )
    return torch.stack(rows)
