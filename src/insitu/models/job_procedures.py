"""The procedures of language models that jobs name, made of options that may be anybody's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from insitu.graph.errors import OptionError
from insitu.graph.location import Location, Mark
from insitu.models.forward import LanguageForward

if TYPE_CHECKING:
    from insitu.engine.job_parts import ProcedureName
    from insitu.models.generation import Generation
    from insitu.models.language_subject import LanguageSubject

_OWN = ("max_tokens_per_pass", "share_prefixes")


def language_procedure(
    model: LanguageSubject,
    name: ProcedureName,
    options: Mapping[str, Any],
    mark: Mark,
    dry: bool,
) -> LanguageForward | Generation:
    """Returns the procedure that a job names.

    Args:
        model: the model.
        name: the name of the procedure.
        options: its options.
        mark: the user's line.
        dry: whether nothing is to run, and no weights are to be loaded.

    Raises:
        OptionError: if the model does not run so, or an option means nothing to it.
    """
    location = Location(*mark)
    model.traits.options.check([one for one in options if one not in _OWN], name, lambda: location)
    # Tensors may be filled anew by the forward that they are given to.
    given = {n: one.clone() if isinstance(one, torch.Tensor) else one for n, one in options.items()}
    budget: Any = given.pop("max_tokens_per_pass", None)
    if budget is not None and (type(budget) is not int or budget < 1):
        raise OptionError("`max_tokens_per_pass` is a whole number from 1.", location)
    if name == "trace":
        share: Any = given.pop("share_prefixes", None)
        return LanguageForward(model, given, budget, share, dry)
    if not getattr(model.module, "can_generate", lambda: False)():
        raise OptionError(
            f"The job generates, and a {type(model.module).__name__} does not.", location
        )
    from insitu.models.generation import Generation  # takes a while, and most never generate

    if given.get("stop_strings") is not None:
        given.setdefault("tokenizer", model.tokenizer)
    return Generation(model, given, location, budget)
