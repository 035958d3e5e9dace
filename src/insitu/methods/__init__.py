"""What an instrument like this is used for: each method is a few lines on top of traces.

Every method is a function of a model and prompts, is planned as one experiment, and returns a
`Result`: numbers with named axes, which can be drawn, saved and made a table.
"""

from typing import TYPE_CHECKING, Any

from insitu.display.axis import Axis
from insitu.methods.ablation import ablate
from insitu.methods.alignment import distributed_alignment_search
from insitu.methods.alignments import Alignment
from insitu.methods.attention_patterns import attention_patterns, head_scores
from insitu.methods.attribution_patching import attribution_patching
from insitu.methods.boundary import guard
from insitu.methods.causal_tracing import causal_tracing
from insitu.methods.circuit import Circuit, Edge
from insitu.methods.continuations import Continuation, Steered
from insitu.methods.discovery import discover_circuit
from insitu.methods.edge_attribution import edge_attribution
from insitu.methods.examples import FeatureExample, FeatureExamples
from insitu.methods.faithfulness import completeness_curve, faithfulness_curve, run_circuit
from insitu.methods.feature_examples import feature_examples
from insitu.methods.lens import logit_lens
from insitu.methods.logit_attribution import direct_logit_attribution
from insitu.methods.measured_run import Run
from insitu.methods.metrics import (
    Metric,
    kl_divergence,
    log_probability,
    logit_difference,
    probability,
)
from insitu.methods.patching import activation_patching
from insitu.methods.path_patching import path_patching
from insitu.methods.probes import Probe, Probes
from insitu.methods.probing import probe
from insitu.methods.result import Cell, Result
from insitu.methods.sae import SparseAutoencoder
from insitu.methods.splicing import Spliced, sae_features, use_sae
from insitu.methods.steered import steer
from insitu.methods.steering import SteeringVector, steering_vector
from insitu.methods.token_attribution import gradient_times_input, integrated_gradients
from insitu.methods.tuned_lens import TunedLens, train_tuned_lens, tuned_lens

__all__ = [
    "Alignment",
    "Axis",
    "Cell",
    "Circuit",
    "Continuation",
    "Edge",
    "FeatureExample",
    "FeatureExamples",
    "Metric",
    "Probe",
    "Probes",
    "Result",
    "Run",
    "SparseAutoencoder",
    "Spliced",
    "Steered",
    "SteeringVector",
    "TunedLens",
    "ablate",
    "activation_patching",
    "attention_patterns",
    "attribution_patching",
    "causal_tracing",
    "completeness_curve",
    "direct_logit_attribution",
    "discover_circuit",
    "distributed_alignment_search",
    "edge_attribution",
    "faithfulness_curve",
    "feature_examples",
    "gradient_times_input",
    "head_scores",
    "integrated_gradients",
    "kl_divergence",
    "log_probability",
    "logit_difference",
    "logit_lens",
    "path_patching",
    "probability",
    "probe",
    "run_circuit",
    "sae_features",
    "steer",
    "steering_vector",
    "train_tuned_lens",
    "tuned_lens",
    "use_sae",
]

guard(globals(), __all__)


if not TYPE_CHECKING:  # a checker takes any name of a module that has this

    def __getattr__(name: str) -> Any:
        from insitu.unknown import unknown_name  # of use only for an error

        raise unknown_name(__name__, name, __all__)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
