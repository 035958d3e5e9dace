"""Activations of whole data sets, on disk: `harvest` writes them, and `Activations` reads them."""

from insitu.harvest.activations import Activations, BrokenShard
from insitu.harvest.batches import Batches
from insitu.harvest.rows import Rows, TopFeatures
from insitu.harvest.statistics import Statistics

__all__ = [
    "Activations",
    "Batches",
    "BrokenShard",
    "Rows",
    "Statistics",
    "TopFeatures",
]
