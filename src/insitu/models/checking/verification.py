"""Whether a model's parts are what they seem.

What a standard name stands for is found on tensors without data. Here the values that stand there
are read in a run of the model, and must hang together as the values of such parts do.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from insitu.display.report import Report
from insitu.graph.errors import OptionError, UnknownShapeError
from insitu.graph.location import here
from insitu.models.blocks import find_stacks
from insitu.models.checking.blocks import checks_of_blocks
from insitu.models.checking.inventory import parts_of, sizes_of
from insitu.models.checking.logits import check_of_logits
from insitu.models.checking.reading import small_call
from insitu.models.checking.run import run_of

if TYPE_CHECKING:
    from insitu.models.model import Model


def check(model: Model, name: str | None = None) -> Report:
    """Looks at what a model consists of, and verifies it in a run of a few tokens.

    Args:
        model: a Transformers model. Its weights are loaded if they are not there yet.
        name: what to call it; its class unless given.

    Returns:
        What each standard name stands for, and what holds of the values that stand there.

    Raises:
        LoadError: if the weights cannot be loaded.
        OptionError: if it is no Transformers model, or in training mode, in which dropout changes
            the values that are read.
        UnknownShapeError: if it is not known what the model is called with.

    Example:
        >>> from insitu import LanguageModel
        >>> from insitu.models.checking import check
        >>> report = check(LanguageModel("insitu/eiffel"))
        >>> report.ok, report.sizes["n_heads"]
        (True, 8)
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attention scores and patterns")  # eager attention
        return _checked(model, name)


def _checked(model: Model, name: str | None) -> Report:
    module = model.load()
    if not model.vocabulary.names:
        raise OptionError(
            f"{type(module).__name__} is no Transformers model, so it has no standard names.",
            here(),
        )
    if any(part.training for part in model.modules.values()):
        raise OptionError(
            "The model, or a part of it, is in training mode, where dropout changes values on "
            "their way: call `model.module.eval()` first.",
            here(),
        )
    call = small_call(model)
    if call is None:
        raise UnknownShapeError(
            f"It is not known what a {type(module).__name__} is called with.", here()
        )
    stacks = find_stacks(module, module.config)
    run = run_of(model, call, stacks)
    shapes = {key: tuple(value.shape) for key, value in run.values.items()}
    architecture = type(module).__name__
    return Report(
        name=name or architecture,
        architecture=architecture,
        sizes=sizes_of(model),
        parts=parts_of(model, stacks, shapes),
        checks=[*checks_of_blocks(run), *check_of_logits(run)],
    )
