"""Insitu opens up a neural network while it runs."""

import contextlib
from typing import TYPE_CHECKING, Any

from insitu.graph.control import apply, cond, fold
from insitu.graph.errors import (
    BlockError,
    CausalityError,
    ExecutionError,
    IndexOutOfRangeError,
    InsituError,
    LoadError,
    MissingPackageError,
    NeverRanError,
    NotCachedError,
    NoValueError,
    OperationError,
    OptionError,
    PathError,
    PromptError,
    PromptTypeError,
    SaveError,
    ShapeError,
    UnknownShapeError,
    WireError,
)
from insitu.graph.proxy import AnyProxy as Proxy
from insitu.models.cache import ActivationCache
from insitu.models.language_model import LanguageModel
from insitu.models.model import Model
from insitu.models.vision_language_model import VisionLanguageModel

if TYPE_CHECKING:
    from insitu.graph.node import Graph
    from insitu.methods.result import Result
    from insitu.tracing.invocation import Invocation
    from insitu.tracing.tracer import Tracer

    __version__: str

with contextlib.suppress(ImportError):  # einops is no dependency: it is used where it is installed
    import insitu.graph.einops_backend  # noqa: F401

# What is imported where it is first asked for: methods take longer than all the rest together.
_LATER = {
    "Graph": "insitu.graph.node",
    "Invocation": "insitu.tracing.invocation",
    "Result": "insitu.methods.result",
    "Tracer": "insitu.tracing.tracer",
}

__all__ = [
    "ActivationCache",
    "BlockError",
    "CausalityError",
    "ExecutionError",
    "Graph",
    "IndexOutOfRangeError",
    "InsituError",
    "Invocation",
    "LanguageModel",
    "LoadError",
    "MissingPackageError",
    "Model",
    "NeverRanError",
    "NoValueError",
    "NotCachedError",
    "OperationError",
    "OptionError",
    "PathError",
    "PromptError",
    "PromptTypeError",
    "Proxy",
    "Result",
    "SaveError",
    "ShapeError",
    "Tracer",
    "UnknownShapeError",
    "VisionLanguageModel",
    "WireError",
    "__version__",
    "apply",
    "cond",
    "fold",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        from importlib import import_module

        found = getattr(import_module(_LATER[name]), name)
    elif name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            found = version("insitu")
        except PackageNotFoundError:  # its source alone is on the path
            found = "0+unknown"
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
