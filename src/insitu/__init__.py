"""Insitu opens up a neural network while it runs."""

import contextlib

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
    ShapeError,
    UnknownShapeError,
    WireError,
)
from insitu.graph.proxy import Proxy
from insitu.models.cache import ActivationCache
from insitu.models.language_model import LanguageModel
from insitu.models.model import Model
from insitu.models.vision_language_model import VisionLanguageModel

with contextlib.suppress(ImportError):  # einops is no dependency: it is used where it is installed
    import insitu.graph.einops_backend  # noqa: F401

__all__ = [
    "ActivationCache",
    "BlockError",
    "CausalityError",
    "ExecutionError",
    "IndexOutOfRangeError",
    "InsituError",
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
    "ShapeError",
    "UnknownShapeError",
    "VisionLanguageModel",
    "WireError",
    "apply",
    "cond",
    "fold",
]
