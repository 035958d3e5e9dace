"""What each standard name of a model is worth: right by plain hooks, refused, wrong, or a crash.

A value that is read by a name is compared with what plain hooks see of the layers that hold the
weights, with what the model itself returns, and with what changes when a layer is changed by a
plain hook. The library is asked for values and weights, and never where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from insitu import InsituError, PathError
from tests.fidelity.every import of_attention, of_blocks, of_model
from tests.fidelity.every.case import Case, reason_of
from tests.fidelity.every.plain import Inputs
from tests.fidelity.every.verdict import Verdict, WrongError, worst

COLUMNS = (
    *("opens", "read", "blocks", "residual", "heads", "pattern", "W_Q", "MLP", "experts"),
    *("logits", "embedding", "numbers"),
)


def judge(module: nn.Module, inputs: Inputs) -> Mapping[str, Verdict]:
    """Returns what came of each column, the worst of what came of its names.

    Args:
        module: the model.
        inputs: keyword arguments of its forward, `input_ids` among them: at least two rows.
    """
    case = Case(module, inputs)
    try:
        case.model  # noqa: B018
    except InsituError as error:
        case.say("opens", "refused", str(error).splitlines()[0])
    except Exception as error:
        case.say("opens", "crash", _said(error))
    else:
        case.say("opens", "right")
        _judge_names(case)
    return {column: worst(case.found[column]) for column in COLUMNS if column in case.found}


def _judge_names(case: Case) -> None:
    for column, compare in (
        ("read", of_model.paths),
        ("logits", of_model.logits),
        ("embedding", of_model.embedding),
        ("blocks", of_model.blocks),
        ("numbers", of_model.numbers),
    ):
        _guarded(case, column, partial(compare, case))
    for stack in ("encoder_blocks", "blocks"):
        if case.has(case.model, stack):
            for block in of_model.passed(case, case.model.role[stack]):
                _guarded(case, "blocks", partial(_judge_block, case, block))


def _judge_block(case: Case, block: Any) -> None:
    _guarded(case, "residual", partial(of_blocks.residual, case, block))
    if not case.has(block, "attention"):
        case.there("heads", block, "attention")
    for role in ("attention", "cross_attention"):
        if case.has(block, role):
            part = block.role[role]
            _guarded(case, "heads", partial(of_attention.heads, case, block, part, role))
            _guarded(case, "pattern", partial(of_attention.pattern, case, block, part, role))
            _guarded(case, "W_Q", partial(of_attention.projections, case, part))
    if case.has(block, "mlp"):
        _guarded(case, "MLP", partial(of_blocks.mlp, case, block))
    if case.has(block, "experts"):
        _guarded(case, "experts", partial(of_blocks.experts, case, block))


def _guarded(case: Case, column: str, compare: Callable[[], None]) -> None:
    """Runs a comparison: what is refused before a run says so, all other errors are crashes."""
    given, noted = case.given, len(case.found.get(column, ()))
    try:
        compare()
    except WrongError as error:
        case.say(column, "wrong", str(error))
    except PathError as error:
        case.say(column, "refused", reason_of(error))
    except Exception as error:
        case.say(column, "crash", _said(error))
    else:
        if case.given > given or len(case.found.get(column, ())) == noted:
            case.say(column, "right")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
