"""What an instrument like this is used for: each method is a few lines on top of traces.

Every method is a function of a model and prompts, is planned as one experiment, and returns a
`Result`: numbers with named axes, which can be drawn, saved and made a table.
"""

from insitu.display.axis import Axis
from insitu.methods.alignment import distributed_alignment_search
from insitu.methods.alignments import Alignment
from insitu.methods.metrics import (
    Metric,
    kl_divergence,
    log_probability,
    logit_difference,
    probability,
)
from insitu.methods.probes import Probe
from insitu.methods.probing import probe
from insitu.methods.result import Cell, Result
from insitu.methods.sae import SparseAutoencoder
from insitu.methods.splicing import Spliced, sae_features, use_sae
from insitu.methods.steered import Continuation, Steered, steer
from insitu.methods.steering import SteeringVector, steering_vector

__all__ = [
    "Alignment",
    "Axis",
    "Cell",
    "Continuation",
    "Metric",
    "Probe",
    "Result",
    "SparseAutoencoder",
    "Spliced",
    "Steered",
    "SteeringVector",
    "distributed_alignment_search",
    "kl_divergence",
    "log_probability",
    "logit_difference",
    "probability",
    "probe",
    "sae_features",
    "steer",
    "steering_vector",
    "use_sae",
]
