"""Small models with random weights, one of each architecture that the installed Transformers has.

`ZOO[name]` says what one is and what it is called with; `module_of(name)` makes it.
"""

from torch import nn

from tests.fidelity.zoo.architecture import VOCABULARY, Architecture, spread_out
from tests.fidelity.zoo.decoders import DECODERS
from tests.fidelity.zoo.encoders import ENCODERS
from tests.fidelity.zoo.mixtures import MIXTURES
from tests.fidelity.zoo.others import OTHERS
from tests.fidelity.zoo.recurrent import RECURRENT

EVERY = (*DECODERS, *MIXTURES, *RECURRENT, *ENCODERS, *OTHERS)
ZOO = {one.name: one for one in EVERY if one.exists}

__all__ = ["EVERY", "VOCABULARY", "ZOO", "Architecture", "module_of", "spread_out"]


def module_of(name: str) -> nn.Module:
    """The model of that name."""
    return ZOO[name].make()
