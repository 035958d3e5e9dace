"""Activations of whole data sets, on disk: `harvest` writes them, and `Activations` reads them."""

from insitu.harvest.activations import Activations
from insitu.harvest.batches import Batches
from insitu.harvest.checking import BrokenShard
from insitu.harvest.exports import Exported
from insitu.harvest.harvesting import Harvested, harvest
from insitu.harvest.live import LiveBatches
from insitu.harvest.live_model import live
from insitu.harvest.planning import HarvestPlan, plan
from insitu.harvest.progress import HarvestProgress
from insitu.harvest.site_statistics import Statistics
from insitu.harvest.sites import SaeSite
from insitu.harvest.stored_rows import StoredRows, TopFeatures
from insitu.harvest.torch_data import ActivationDataset

__all__ = [
    "ActivationDataset",
    "Activations",
    "Batches",
    "BrokenShard",
    "Exported",
    "HarvestPlan",
    "HarvestProgress",
    "Harvested",
    "LiveBatches",
    "SaeSite",
    "Statistics",
    "StoredRows",
    "TopFeatures",
    "harvest",
    "live",
    "plan",
]
