"""Where heads look: their attention patterns, and how well known kinds of heads describe them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from insitu.display.axis import Axis
from insitu.graph.errors import OptionError, PromptError, nearest
from insitu.graph.location import here
from insitu.methods.progress import progress as bar
from insitu.methods.prompts import read_prompts
from insitu.methods.random_tokens import repeated_tokens
from insitu.methods.result import Result
from insitu.methods.sites import chosen, layers_with, site_of
from insitu.models.language_model import LanguageModel

Pairs = tuple[list[int], list[int]]
"""Queries and the keys that they are looked for at, pair by pair."""

_PATTERN = site_of("pattern")


def attention_patterns(
    model: LanguageModel,
    prompts: Any,
    *,
    layers: int | Iterable[int] | None = None,
    heads: int | Iterable[int] | None = None,
    progress: bool | None = None,
    max_tokens_per_pass: int | None = None,
) -> Result:
    """Returns how much each position attends to each other one, in every head.

    The model runs with eager attention, as no other computes patterns. Of an encoder and a decoder
    the layers are the encoder's, whose tokens the prompt's are.

    Args:
        model: the model.
        prompts: one or several, of any length.
        layers: which ones, from the end if negative; None for all that have attention.
        heads: which ones of each layer; None for all.
        progress: whether a bar shows how far it is; None for on a terminal or in a notebook.
        max_tokens_per_pass: how many tokens, with padding, a pass may have; None for as many as fit
            into a quarter of the free memory.

    Returns:
        Weights between 0 and 1 with the axes (prompt), layer, head, query, key. A layer's label is
        the number of its block, also where blocks without attention are left out.

    Raises:
        OptionError: if there is no such layer or head, or it has no attention.
    """
    read = read_prompts(model, prompts)
    stack = _stack(model)
    numbers = layers_with(model, _PATTERN, layers, stack)
    which = chosen("head", heads, model.n_heads)
    saved = []
    with (
        bar("Attention patterns", progress),
        model.trace(max_tokens_per_pass=max_tokens_per_pass) as tracer,
    ):
        for ids in read.ids:
            with tracer.invoke(ids):
                saved.append(
                    [_pattern(model, stack, n)[which].float().save(to="cpu") for n in numbers]
                )
    values = [torch.stack([layer.value for layer in of_prompt]) for of_prompt in saved]
    return Result(
        "Attention patterns",
        "attention",
        read.stacked(values, -2, -1),
        (
            *read.axis,
            Axis.of("layer", numbers),
            Axis.of("head", which),
            read.positions("query"),
            read.positions("key"),
        ),
        tokens=read.tokens,
    )


def head_scores(
    model: LanguageModel,
    prompts: Any = None,
    *,
    kinds: str | Sequence[str] | None = None,
    layers: int | Iterable[int] | None = None,
    heads: int | Iterable[int] | None = None,
    length: int = 25,
    count: int = 10,
    seed: int = 0,
    progress: bool | None = None,
    max_tokens_per_pass: int | None = None,
) -> Result:
    """Returns how much each head attends to where a head of a kind would.

    A score is a mean over the queries that have something to look for, of the attention that they
    give to it; so it is between 0 and 1.

    - "induction": from a token to the tokens that came after its earlier occurrences, itself not
      among them (the prefix matching score of Olsson et al., "In-context Learning and Induction
      Heads", 2022).
    - "previous token": from a token to the one before it.
    - "duplicate token": from a token to its earlier occurrences (Wang et al., "Interpretability in
      the Wild", 2022).

    Without prompts they are taken on random tokens that come twice: nothing can be told of these
    but by looking back.

    Args:
        model: the model.
        prompts: one or several; None for random ones.
        kinds: one; or several, which are an axis of the result; None for all three.
        layers: which ones, from the end if negative; None for all that have attention.
        heads: which ones of each layer; None for all.
        length: how many random tokens are repeated.
        count: how many random prompts.
        seed: of the random tokens.
        progress: whether a bar shows how far it is; None for on a terminal or in a notebook.
        max_tokens_per_pass: how many tokens, with padding, a pass may have; None for as many as fit
            into a quarter of the free memory.

    Returns:
        Scores with the axes (kind), layer, head. Details: "queries", over how many positions of all
        prompts the mean of each kind is.

    Raises:
        OptionError: if there is no such kind or layer or head.
        PromptError: if nothing in the prompts is to be looked for by one of the kinds.
    """
    many = not isinstance(kinds, str)
    kinds = [kinds] if isinstance(kinds, str) else list(_KINDS if kinds is None else kinds)
    if not kinds:
        raise OptionError(f"`kinds` is empty: there are {', '.join(map(repr, _KINDS))}.", here())
    if len(set(kinds)) < len(kinds):
        raise OptionError(f"Each kind is named once, not {kinds}.", here())
    for kind in kinds:
        if kind not in _KINDS:
            raise OptionError(
                f"There is no kind of head {kind!r}{nearest(kind, _KINDS)}: there are "
                f"{', '.join(map(repr, _KINDS))}.",
                here(),
            )
    if prompts is None:
        prompts = repeated_tokens(model, length=length, count=count, seed=seed)
    read = read_prompts(model, prompts)
    pairs = {kind: [_KINDS[kind](ids.tolist()) for ids in read.ids] for kind in kinds}
    queries = {kind: sum(len(set(of)) for of, _ in found) for kind, found in pairs.items()}
    for kind, number in queries.items():
        if not number:
            raise PromptError(
                f"Nothing in the prompts tells heads of the kind {kind!r}: no token has what these "
                "look for. Leave the kind out, or give no prompts, for random ones.",
                here(),
            )
    stack = _stack(model)
    numbers = layers_with(model, _PATTERN, layers, stack)
    which = chosen("head", heads, model.n_heads)
    saved: dict[tuple[str, int], list[Any]] = {(k, n): [] for k in kinds for n in numbers}
    with (
        bar("Head scores", progress),
        model.trace(max_tokens_per_pass=max_tokens_per_pass) as tracer,
    ):
        for row, ids in enumerate(read.ids):
            with tracer.invoke(ids):
                for layer in numbers:
                    pattern = _pattern(model, stack, layer)
                    for kind in kinds:
                        attention = pattern[(slice(None), *pairs[kind][row])].float().sum(-1)
                        saved[kind, layer].append(attention[which].save(to="cpu"))
    totals = {
        place: torch.stack([one.value for one in found]).sum(0) for place, found in saved.items()
    }
    values = torch.stack(
        [torch.stack([totals[kind, n] for n in numbers]) / queries[kind] for kind in kinds]
    )
    found = Result(
        "Kinds of heads",
        "mean attention",
        values,
        (Axis.of("kind", kinds), Axis.of("layer", numbers), Axis.of("head", which)),
        details={"queries": torch.tensor([queries[kind] for kind in kinds])},
    )
    return found if many else found.select(kind=0)


def _stack(model: LanguageModel) -> str:
    return "encoder_blocks" if model.traits.is_encoder_decoder else "blocks"


def _pattern(model: LanguageModel, stack: str, layer: int) -> Any:
    """The proxy of a layer's pattern, `(head, query, key)`."""
    return getattr(model, stack)[layer].role["attention"].pattern[0]


def _previous(ids: Sequence[int]) -> Pairs:
    return list(range(1, len(ids))), list(range(len(ids) - 1))


def _earlier(ids: Sequence[int], shift: int) -> Pairs:
    """Each position with those that stand some places behind earlier occurrences of its token."""
    found = [
        (query, key + shift)
        for query, token in enumerate(ids)
        for key in range(query)
        if ids[key] == token and key + shift < query
    ]
    return [query for query, _ in found], [key for _, key in found]


_KINDS: dict[str, Callable[[Sequence[int]], Pairs]] = {
    "induction": lambda ids: _earlier(ids, 1),
    "previous token": _previous,
    "duplicate token": lambda ids: _earlier(ids, 0),
}
