"""One run of a model whose values are kept by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from insitu.graph.errors import BlockError
from insitu.graph.location import here, mark
from insitu.models.cache import ActivationCache
from insitu.models.keys import doubles, layers
from insitu.models.prompt_arguments import given_to_block
from insitu.models.selection import Filters, select
from insitu.models.transformer_lens import TransformerLens
from insitu.tracing.session import open_sessions, session_of
from insitu.tracing.tracer import Tracer

if TYPE_CHECKING:
    from insitu.batching.procedure import Subject
    from insitu.models.language_subject import LanguageSubject


def check_options(model: LanguageSubject, prompt: Any, kwargs: Mapping[str, Any]) -> None:
    """Raises for an option that means nothing to `run_with_cache`, which hands others to `trace`.

    Args:
        model: the model.
        prompt: the prompt, None if it is among `kwargs`.
        kwargs: what was given by keyword.

    Raises:
        OptionError: for such an option.
    """
    others = {name: value for name, value in kwargs.items() if name not in _OF_TRACE}
    given_to_block(model, prompt, others, "run_with_cache")


_OF_TRACE = ("max_tokens_per_pass", "remote", "share_prefixes", "wait")


def cached(
    model: Subject,
    tracer: Tracer,
    names: Filters,
    hooks: TransformerLens,
    to: str | torch.device | None,
    dtype: torch.dtype | None,
) -> ActivationCache:
    """Runs a block with nothing in it but that values are saved, and returns these.

    Args:
        model: the model.
        tracer: the block.
        names: which values.
        hooks: the model's TransformerLens names.
        to: the device of the values that are kept.
        dtype: its dtype.

    Raises:
        OptionError: if the model has no value of such a name.
        BlockError: in a session.
    """
    if open_sessions.get() and session_of(model) is not None:
        raise BlockError(
            "`run_with_cache` runs the model at once, but blocks of a session run when that "
            "ends: write it before the session, or save what you need in a `trace`.",
            here(),
        )
    vocabulary, line = hooks.vocabulary, mark()
    # Who asks for all asks for patterns too, and needs no warning of what they take.
    with vocabulary.quiet() if names is None else contextlib.nullcontext():
        wanted = select(names, vocabulary, hooks, model.modules)
    with tracer:
        invocation = tracer.only_invocation()
        saved = {}
        for key, named in wanted.items():
            value = named.read(invocation, line)
            # A module may return a tuple, which is looked at once it is there.
            kept = value if dtype is None or key in model.modules else value.to(dtype)
            saved[key] = kept.save(optional=True, to=to)
    values = {key: _tensor(proxy.value) for key, proxy in saved.items()}
    if dtype is not None:
        values = {key: None if one is None else one.to(dtype) for key, one in values.items()}
    embedded = "inputs_embeds" in invocation.request.extras
    return ActivationCache(
        {key: value for key, value in values.items() if value is not None},
        None if embedded else invocation.ids,
        invocation.mask,
        layers(vocabulary),
        {**hooks.aliases, **{key: (other, False) for key, other in doubles(vocabulary).items()}},
        hooks,
    )


def _tensor(value: Any) -> torch.Tensor | None:
    """A value as a cache has it: of several, the first tensor, such as the hidden states."""
    if isinstance(value, torch.Tensor):
        return value
    several = value.values() if isinstance(value, Mapping) else value
    if not isinstance(several, Iterable):
        return None
    entries = cast("Iterable[Any]", several)
    return next((one for one in entries if isinstance(one, torch.Tensor)), None)
