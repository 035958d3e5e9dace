"""Which options loading takes: a slip is told where the model is made, and not at the first run.

`from_pretrained` has `**kwargs`, and its code takes options from them by name. The others go to the
config, where that has such a setting, and then to the class of the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from types import CodeType
from typing import Any

from insitu.graph.errors import OptionError, nearest
from insitu.graph.location import Location
from insitu.habits import OF_LOADING, habit


def check_loading(kind: Any, config: Any, options: Collection[str], location: Location) -> None:
    """Raises if an option is none of loading.

    Args:
        kind: the class that the model is loaded with, or an automatic one.
        config: the model's config.
        options: the names of what was given.
        location: the user's line.

    Raises:
        OptionError: if neither loading nor the config nor the class of the model takes it.
    """
    if not options or "trust_remote_code" in options:  # then the code is the repository's own
        return
    # An automatic class is no model itself, and what it chooses is known when it has loaded.
    own = {} if hasattr(kind, "from_config") else inspect.signature(kind.__init__).parameters
    for name in options:
        if name in own or name in _taken() or hasattr(config, name):
            continue
        there = {*_signature(), *_usual(), *vars(config)}
        raise OptionError(
            f"There is no option `{name}` of loading{habit(name, OF_LOADING)}{nearest(name, there)}"
            f". `from_pretrained` takes none of this name, and the config has no such setting.",
            location,
        )


def _usual() -> tuple[str, ...]:
    """The options that are given most often, and stand in no signature."""
    return ("attn_implementation", "device_map", "dtype", "quantization_config", "torch_dtype")


@cache
def _signature() -> Mapping[str, Any]:
    from transformers import PreTrainedModel

    return inspect.signature(PreTrainedModel.from_pretrained).parameters


@cache
def _taken() -> frozenset[str]:
    """All names in the code of Transformers that options go through: a few more than it takes."""
    from transformers import AutoModelForCausalLM, PreTrainedModel

    config: Any = PreTrainedModel.config_class or _config_class()
    functions = (
        PreTrainedModel.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        config.from_pretrained,
        config.get_config_dict,
        config._get_config_dict,
        config.from_dict,
    )
    found = {*_signature(), *_usual()}
    for function in functions:
        found.update(_words(inspect.unwrap(getattr(function, "__func__", function)).__code__))
    return frozenset(found)


def _config_class() -> Any:
    import transformers

    # Named otherwise in version 5.
    return getattr(transformers, "PreTrainedConfig", None) or transformers.PretrainedConfig


def _words(code: CodeType) -> Iterator[str]:
    yield from code.co_varnames
    for constant in code.co_consts:
        if isinstance(constant, str) and constant.isidentifier():
            yield constant
        elif isinstance(constant, tuple):
            yield from (one for one in constant if isinstance(one, str))
        elif isinstance(constant, CodeType):
            yield from _words(constant)
