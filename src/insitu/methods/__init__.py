"""What an instrument like this is used for: each method is a few lines on top of traces.

Every method is a function of a model and prompts, is planned as one experiment, and returns a
`Result`: numbers with named axes, which can be drawn, saved and made a table.
"""

from insitu.display.axis import Axis
from insitu.methods.attribution_patching import attribution_patching
from insitu.methods.circuit import Circuit, Edge
from insitu.methods.discovery import discover_circuit
from insitu.methods.edge_attribution import edge_attribution
from insitu.methods.faithfulness import faithfulness_curve, run_circuit
from insitu.methods.metrics import (
    Metric,
    kl_divergence,
    log_probability,
    logit_difference,
    probability,
)
from insitu.methods.result import Cell, Result

__all__ = [
    "Axis",
    "Cell",
    "Circuit",
    "Edge",
    "Metric",
    "Result",
    "attribution_patching",
    "discover_circuit",
    "edge_attribution",
    "faithfulness_curve",
    "kl_divergence",
    "log_probability",
    "logit_difference",
    "probability",
    "run_circuit",
]
