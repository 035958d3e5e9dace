"""Insitu opens up a neural network while it runs."""

import contextlib
from importlib import import_module
from typing import TYPE_CHECKING, Any

from insitu.graph.control import apply, cond, fold
from insitu.graph.errors import (
    BlockError,
    CancelledError,
    CausalityError,
    ExecutionError,
    IndexOutOfRangeError,
    InsituError,
    JobError,
    LimitError,
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
    RemoteError,
    SaveError,
    ShapeError,
    UnknownNameError,
    UnknownShapeError,
    WireError,
)
from insitu.graph.node import Graph
from insitu.graph.proxy import AnyProxy as Proxy
from insitu.models.cache import ActivationCache
from insitu.models.language_model import LanguageModel
from insitu.models.model import Model
from insitu.models.vision_language_model import VisionLanguageModel

if TYPE_CHECKING:
    from insitu import methods as methods
    from insitu.engine.job import Job
    from insitu.engine.job_joining import join, split
    from insitu.engine.job_outcome import Failure
    from insitu.engine.limits import Limits
    from insitu.engine.results import Results
    from insitu.engine.seams import Cancel, cancellable, listening, saving_to
    from insitu.engine.sinks import MemorySink, SaveKey, Sink
    from insitu.methods.result import Result
    from insitu.server.running import serve
    from insitu.tracing.invocation import Invocation
    from insitu.tracing.tracer import Tracer

    __version__: str

with contextlib.suppress(ImportError):  # einops is no dependency: it is used where it is installed
    import insitu.graph.einops_backend  # noqa: F401

# What is imported where it is first asked for: methods take longer than all the rest together.
_LATER = {
    "Cancel": "insitu.engine.seams",
    "Failure": "insitu.engine.job_outcome",
    "Invocation": "insitu.tracing.invocation",
    "Job": "insitu.engine.job",
    "Limits": "insitu.engine.limits",
    "MemorySink": "insitu.engine.sinks",
    "Result": "insitu.methods.result",
    "Results": "insitu.engine.results",
    "SaveKey": "insitu.engine.sinks",
    "Sink": "insitu.engine.sinks",
    "Tracer": "insitu.tracing.tracer",
    "cancellable": "insitu.engine.seams",
    "join": "insitu.engine.job_joining",
    "listening": "insitu.engine.seams",
    "saving_to": "insitu.engine.seams",
    "serve": "insitu.server.running",
    "split": "insitu.engine.job_joining",
}

__all__ = [
    "ActivationCache",
    "BlockError",
    "Cancel",
    "CancelledError",
    "CausalityError",
    "ExecutionError",
    "Failure",
    "Graph",
    "IndexOutOfRangeError",
    "InsituError",
    "Invocation",
    "Job",
    "JobError",
    "LanguageModel",
    "LimitError",
    "Limits",
    "LoadError",
    "MemorySink",
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
    "RemoteError",
    "Result",
    "Results",
    "SaveError",
    "SaveKey",
    "ShapeError",
    "Sink",
    "Tracer",
    "UnknownNameError",
    "UnknownShapeError",
    "VisionLanguageModel",
    "WireError",
    "__version__",
    "apply",
    "cancellable",
    "cond",
    "fold",
    "join",
    "listening",
    "saving_to",
    "serve",
    "split",
]


if not TYPE_CHECKING:  # a checker takes any name of a module that has this

    def __getattr__(name: str) -> Any:
        if name in _LATER:
            found = getattr(import_module(_LATER[name]), name)
        elif name == "__version__":
            from insitu.about import installed_version

            found = installed_version()
        elif name == "methods":  # a subpackage, which nothing has imported yet
            found = import_module("insitu.methods")
        else:
            from insitu.unknown import unknown_name  # of use only for an error

            raise unknown_name(__name__, name, __all__)
        globals()[name] = found
        return found


def _picture(graph: Graph) -> str:
    from insitu.display.graph_picture import graph_svg  # most sessions see none

    return graph_svg(graph)


Graph.picture = _picture


def __dir__() -> list[str]:
    # What a user writes; the rest of what stands here is imported for this file.
    return sorted([*__all__, "methods"])
