"""What an instrument like this is used for: each method is a few lines on top of traces.

Every method is a function of a model and prompts, is planned as one experiment, and returns a
`Result`: numbers with named axes, which can be drawn, saved and made a table.
"""

from insitu.display.axis import Axis
from insitu.methods.ablation import ablate
from insitu.methods.attention_patterns import attention_patterns, head_scores
from insitu.methods.metrics import (
    Metric,
    kl_divergence,
    log_probability,
    logit_difference,
    probability,
)
from insitu.methods.result import Cell, Result
from insitu.methods.token_attribution import gradient_times_input, integrated_gradients

__all__ = [
    "Axis",
    "Cell",
    "Metric",
    "Result",
    "ablate",
    "attention_patterns",
    "gradient_times_input",
    "head_scores",
    "integrated_gradients",
    "kl_divergence",
    "log_probability",
    "logit_difference",
    "probability",
]
