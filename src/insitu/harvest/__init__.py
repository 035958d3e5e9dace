"""Activations of whole data sets, on disk: `harvest` writes them, and `Activations` reads them."""

from insitu.harvest.activations import Activations
from insitu.harvest.batches import Batches
from insitu.harvest.checking import BrokenShard
from insitu.harvest.live import LiveBatches
from insitu.harvest.rows import Rows, TopFeatures
from insitu.harvest.statistics import Statistics
from insitu.harvest.torch_data import ActivationDataset

__all__ = [
    "ActivationDataset",
    "Activations",
    "Batches",
    "BrokenShard",
    "LiveBatches",
    "Rows",
    "Statistics",
    "TopFeatures",
]
