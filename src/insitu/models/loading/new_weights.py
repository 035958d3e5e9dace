"""Weights that a load made anew, because no file has them.

Transformers draws them at random with a warning, so a model gives other numbers each time that it
is loaded. Left out here are buffers, weights that are tied to ones that a file has, and weights
that files may lack by the model's class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

_SHOWN = 3  # names in a message


def new_weights(module: nn.Module, report: Mapping[str, Any]) -> list[str]:
    """Returns the names of the parameters that a load has made anew.

    Args:
        module: the loaded model.
        report: what `from_pretrained` told with `output_loading_info=True`.
    """
    missing: set[str] = set(report.get("missing_keys") or ())
    # Each is a name, with the two shapes behind it.
    resized = {
        one if isinstance(one, str) else one[0] for one in report.get("mismatched_keys") or ()
    }
    anew = missing | resized
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    there = {id(weight) for name, weight in parameters.items() if name not in anew}
    tied = {name for name, weight in parameters.items() if name in missing and id(weight) in there}
    return sorted(anew - buffers - tied)


def new_adapter_weights(module: Any, place: str, where: Mapping[str, Any], name: str) -> list[str]:
    """Returns the names of an adapter's parameters that its file lacks.

    Args:
        module: the model, with the adapter in it.
        place: the folder or repository of the adapter.
        where: arguments that say where files are.
        name: what the adapter is called in the model.
    """
    from peft import get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    options = {key: value for key, value in where.items() if key != "trust_remote_code"}
    there = {_plain(key) for key in load_peft_weights(place, device="cpu", **options)}
    wanted = get_peft_model_state_dict(module, adapter_name=name, save_embedding_layers=False)
    return sorted(key for key in map(_plain, wanted) if key not in there)


def refusal(name: str, kind: str, anew: Iterable[str], asked: bool) -> str:
    """Returns the message of an error about weights that a load has made anew.

    Args:
        name: what the user called the model.
        kind: the class that it was loaded with.
        anew: the names of the weights.
        asked: whether the user chose the class with `task=`.
    """
    anew = list(anew)
    shown = ", ".join(anew[:_SHOWN]) + (", ..." if len(anew) > _SHOWN else "")
    count = f"{len(anew)} of the weights" if len(anew) > 1 else "a weight"
    instead = "Leave out `task=` for the class that it was saved from, or pass" if asked else "Pass"
    return (
        f"The files of {name!r} lack {count} of {kind}: {shown}. They would be drawn at random, "
        f"others at each load. {instead} `allow_new_weights=True` to have them drawn."
    )


def _plain(key: str) -> str:
    """The name of an adapter's weight, the same for every model that the adapter was saved in."""
    return key.removeprefix("base_model.model.")
