"""Generation with a steering vector added at each step, for one strength or several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, Literal, TypeAlias

import torch

from insitu.deprecation import renamed
from insitu.graph.errors import OptionError, PromptError
from insitu.graph.location import here
from insitu.methods.activations import stream_site
from insitu.methods.continuations import Continuation, Steered
from insitu.methods.progress import progress as bar
from insitu.methods.prompts import read_prompts
from insitu.methods.sites import check_positions, chosen, numbers_of
from insitu.methods.steering import SteeringVector
from insitu.models.language_model import LanguageModel
from insitu.models.prompt_arguments import check_budget

Positions: TypeAlias = int | Iterable[int] | Literal["last", "generated"] | None
"""Where a vector is added: everywhere, if None; from the last position of the prompt on; to
generated tokens only; or at those positions of the prompt that have some numbers."""

# Options of `generate` with which rows of one length go on in a batch as each would alone.
_OF_ROWS = frozenset(["max_new_tokens", "eos_token_id", "pad_token_id", "use_cache"])


@renamed(strength="strengths", values={"positions": {"all": None}}, goes_in="0.3")
def steer(
    model: LanguageModel,
    prompts: Any,
    vector: SteeringVector,
    *,
    strengths: float | Sequence[float] = 1.0,
    layers: int | Iterable[int] | None = None,
    positions: Positions = None,
    max_new_tokens: int = 20,
    seed: int | None = None,
    progress: bool | None = None,
    max_tokens_per_pass: int | None = None,
    **kwargs: Any,
) -> Steered:
    """Generates with a vector added to what the model computes, at each step.

    Args:
        model: the model.
        prompts: one prompt or several, of any lengths.
        vector: the vector that is added.
        strengths: what it is multiplied with: one number, or several, with a continuation of each
            prompt under each. 0 is the model as it is.
        layers: in which of its layers it is added; None for all that it has.
        positions: at which positions of each prompt, from its end if negative; None for all, and
            for all generated tokens. Also "last", from the last position of the prompt on (as
            Rimsky et al. 2023 do), or "generated", to generated tokens only.
        max_new_tokens: how many tokens are generated at most.
        seed: with sampling, where the draws of each continuation start; None for wherever torch's
            own are, as of `model.generate`.
        progress: whether a bar shows how far it is; None for on a terminal or in a notebook.
        max_tokens_per_pass: how many tokens, with padding and those to come, a batch may have; None
            for as many as fit into a quarter of the free memory.
        kwargs: of `model.generate`, such as `do_sample=True`.

    Returns:
        The continuations, of each prompt under each strength.

    Raises:
        OptionError: if the vector has no such layer, or the positions are of no known kind, need
            a cache that is turned off, or are none of the blocks', as behind an encoder.

    Example:
        `steer(model, prompt, vector, strengths=[-2, 0, 2], max_new_tokens=5).texts`
    """
    factors = _strengths(strengths)
    if not factors:
        raise OptionError("There is no strength: give a number, or several.", here())
    if any(one != one for one in factors):
        raise OptionError("A strength is a number, not nan.", here())
    several = kwargs.get("num_return_sequences", _setting(model, "num_return_sequences"))
    if several not in (None, 1):
        raise OptionError(
            "`steer` gives one continuation for each prompt and strength, so "
            "`num_return_sequences` means nothing: give the prompt several times.",
            here(),
        )
    vector = vector if layers is None else vector.select(layers)
    check_budget(max_tokens_per_pass)
    read = read_prompts(model, prompts)
    where = positions if isinstance(positions, str) else numbers_of("position", positions)
    _check(model, min(read.lengths), where, kwargs)
    cases = [(p, s) for p in range(len(read)) for s in range(len(factors))]
    given = {} if seed is None else {"seed": seed}
    kwargs["max_new_tokens"] = max_new_tokens
    # Rows of one length need no padding, so they may share an invocation.
    together = (
        seed is None and kwargs.keys() <= _OF_ROWS and _setting(model, "num_beams") in (None, 1)
    )
    groups = [[case] for case in cases]
    if together:
        by_length = sorted(cases, key=lambda case: read.lengths[case[0]])
        of_length = groupby(by_length, lambda case: read.lengths[case[0]])
        whole = [(length + max_new_tokens, list(cases)) for length, cases in of_length]
        groups = [part for size, rows in whole for part in _cut(rows, size, max_tokens_per_pass)]
    shown = bar("Steering", progress)
    with shown, model.generate(max_tokens_per_pass=max_tokens_per_pass, **kwargs) as generator:
        invoked = []
        for group in groups:
            ids = torch.stack([read.ids[prompt] for prompt, _ in group])
            rows: Any = torch.tensor([float(factors[s]) for _, s in group])
            with generator.invoke(ids, **given) as invoker:
                factor = rows if together else factors[group[0][1]]
                _add(model, vector, invoker, factor, where)
            invoked.append(invoker)
    ends = _ends(model, kwargs)
    found: dict[tuple[int, int], Continuation] = {}
    for group, invoker in zip(groups, invoked, strict=True):
        for row, case in zip(_rows(invoker.output), group, strict=True):
            prompt, number = case
            ids = _until_end(row[_given(model, read.lengths[prompt]) :], ends)
            text = _text(model, ids)
            found[case] = Continuation(prompt, factors[number], ids, text)
    title = f"Steering along {vector.site}, layer {', '.join(map(str, vector.layers))}"
    return Steered(tuple(found[case] for case in cases), tuple(factors), title)


def _cut(
    rows: Sequence[tuple[int, int]], length: int, most: int | None
) -> Iterator[list[tuple[int, int]]]:
    """Cuts rows of some length into parts of at most so many tokens: an invocation is never cut."""
    count = len(rows) if most is None else max(most // max(length, 1), 1)
    for first in range(0, len(rows), count):
        yield [*rows[first : first + count]]


def _add(
    model: LanguageModel,
    vector: SteeringVector,
    invoker: Any,
    factor: Any,
    positions: Any,
) -> None:
    """Adds a vector in the steps of an open invocation."""
    if positions == "generated":
        site = stream_site(vector.site)
        with invoker.every_step():
            # With a cache, the step of the prompt is the one that has several positions.
            value = site.read(model, chosen("layer", vector.layers, model.n_layers)[0])
            alone = torch.ones_like(value[:, :, :1]).sum(1) == 1
            vector.apply(model, factor * alone[:, 0])
    elif positions in (None, "last"):
        with invoker.every_step():
            vector.apply(model, factor, positions=positions)
    else:
        vector.apply(model, factor, positions=positions)


def _check(model: LanguageModel, shortest: int, positions: Any, kwargs: dict[str, Any]) -> None:
    if not isinstance(positions, list) and positions not in (None, "last", "generated"):
        raise OptionError(
            f'Positions are numbers, "last", "generated", or None for all, not {positions!r}.',
            here(),
        )
    if isinstance(positions, list):
        check_positions(model)
    if positions == "generated" and model.traits.is_encoder_decoder:
        raise OptionError(
            "The first token that this model's blocks process is one that it starts with, and not "
            'a generated one, and no step tells them apart: positions="generated" is not for it.',
            here(),
        )
    if positions == "generated" and shortest == 1:
        raise PromptError(
            'A prompt of one token is not told from a generated token: positions="generated" takes '
            "longer ones.",
            here(),
        )
    cached = kwargs.get("use_cache", _setting(model, "use_cache"))
    if positions is not None and cached is False:
        raise OptionError(
            f"Without a key-value cache each step computes all positions anew, so positions="
            f"{positions!r} means another one in each: leave `use_cache` on, or use None.",
            here(),
        )


def _strengths(given: Any) -> list[Any]:
    """One strength or several as a list."""
    one = hasattr(given, "__float__") and not getattr(given, "ndim", 0)
    strengths = [given] if one or isinstance(given, str) else list(given)
    for strength in strengths:
        if isinstance(strength, bool) or not hasattr(strength, "__float__"):
            raise OptionError(f"A strength is a number, not {strength!r}.", here())
    return [one if isinstance(one, int | float) else float(one) for one in strengths]


def _setting(model: LanguageModel, name: str) -> Any:
    """An option that the model itself has for generations."""
    return getattr(getattr(model.module, "generation_config", None), name, None)


def _ends(model: LanguageModel, kwargs: dict[str, Any]) -> torch.Tensor:
    """The ids of tokens that end a generation."""
    ends = kwargs.get("eos_token_id", _setting(model, "eos_token_id"))
    return torch.tensor([ends] if isinstance(ends, int) else list(ends or []), dtype=torch.long)


def _until_end(ids: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Generated tokens up to the first that ends it; what follows only fills up a batch."""
    ended = torch.isin(ids, ends).nonzero()
    return ids[: int(ended[0]) + 1] if len(ended) else ids


def _rows(output: Any) -> torch.Tensor:
    """The token ids that a generation returned."""
    return (output if isinstance(output, torch.Tensor) else output.sequences).cpu()


def _given(model: LanguageModel, length: int) -> int:
    """How many of the tokens that a generation returns were there before it."""
    return 1 if model.traits.is_encoder_decoder else length


def _text(model: LanguageModel, ids: torch.Tensor) -> str:
    tokenizer = model._tokenizer
    if tokenizer is None or isinstance(tokenizer, Exception):
        return ""
    return tokenizer.decode(ids, skip_special_tokens=True)
