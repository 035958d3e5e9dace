"""What an instrument like this is used for: each method is a few lines on top of traces.

Every method is a function of a model and prompts, is planned as one experiment, and returns a
`Result`: numbers with named axes, which can be drawn, saved and made a table.
"""

from insitu.display.axis import Axis
from insitu.methods.lens import logit_lens
from insitu.methods.logit_attribution import direct_logit_attribution
from insitu.methods.metrics import (
    Metric,
    kl_divergence,
    log_probability,
    logit_difference,
    probability,
)
from insitu.methods.result import Cell, Result
from insitu.methods.tuned_lens import TunedLens, train_tuned_lens, tuned_lens

__all__ = [
    "Axis",
    "Cell",
    "Metric",
    "Result",
    "TunedLens",
    "direct_logit_attribution",
    "kl_divergence",
    "log_probability",
    "logit_difference",
    "logit_lens",
    "probability",
    "train_tuned_lens",
    "tuned_lens",
]
