"""What an instrument like this is used for: each method is a few lines on top of traces.

Every method is a function of a model and prompts, is planned as one experiment, and returns a
`Result`: numbers with named axes, which can be drawn, saved and made a table.
"""

from insitu.display.axis import Axis
from insitu.methods.ablation import ablate
from insitu.methods.attention_patterns import attention_patterns, head_scores
from insitu.methods.attribution_patching import attribution_patching
from insitu.methods.causal_tracing import causal_tracing
from insitu.methods.circuit import Circuit, Edge
from insitu.methods.discovery import discover_circuit
from insitu.methods.edge_attribution import edge_attribution
from insitu.methods.faithfulness import faithfulness_curve, run_circuit
from insitu.methods.lens import logit_lens
from insitu.methods.metrics import (
    Metric,
    kl_divergence,
    log_probability,
    logit_difference,
    probability,
)
from insitu.methods.patching import activation_patching
from insitu.methods.probes import Probe
from insitu.methods.probing import probe
from insitu.methods.result import Cell, Result
from insitu.methods.steered import Continuation, Steered, steer
from insitu.methods.steering import SteeringVector, steering_vector
from insitu.methods.token_attribution import gradient_times_input, integrated_gradients

__all__ = [
    "Axis",
    "Cell",
    "Circuit",
    "Continuation",
    "Edge",
    "Metric",
    "Probe",
    "Result",
    "Steered",
    "SteeringVector",
    "ablate",
    "activation_patching",
    "attention_patterns",
    "attribution_patching",
    "causal_tracing",
    "discover_circuit",
    "edge_attribution",
    "faithfulness_curve",
    "gradient_times_input",
    "head_scores",
    "integrated_gradients",
    "kl_divergence",
    "log_probability",
    "logit_difference",
    "logit_lens",
    "probability",
    "probe",
    "run_circuit",
    "steer",
    "steering_vector",
]
