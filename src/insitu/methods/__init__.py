"""What an instrument like this is used for: each method is a few lines on top of traces.

Every method is a function of a model and prompts, is planned as one experiment, and returns a
`Result`: numbers with named axes, which can be drawn, saved and made a table.
"""

from insitu.display.axis import Axis
from insitu.methods.causal_tracing import causal_tracing
from insitu.methods.metrics import (
    Metric,
    kl_divergence,
    log_probability,
    logit_difference,
    probability,
)
from insitu.methods.patching import activation_patching
from insitu.methods.path_patching import path_patching
from insitu.methods.result import Cell, Result

__all__ = [
    "Axis",
    "Cell",
    "Metric",
    "Result",
    "activation_patching",
    "causal_tracing",
    "kl_divergence",
    "log_probability",
    "logit_difference",
    "path_patching",
    "probability",
]
