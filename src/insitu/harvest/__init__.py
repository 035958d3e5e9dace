"""Activations of whole data sets, on disk: `harvest` writes them, and `Activations` reads them."""

from insitu.harvest.harvesting import Harvested, harvest
from insitu.harvest.live_model import live
from insitu.harvest.planning import HarvestPlan, plan
from insitu.harvest.progress import HarvestProgress
from insitu.harvest.reading.activations import Activations
from insitu.harvest.reading.batches import Batches
from insitu.harvest.reading.checking import BrokenShard
from insitu.harvest.reading.exports import Exported
from insitu.harvest.reading.live import LiveBatches
from insitu.harvest.reading.site_statistics import Statistics
from insitu.harvest.reading.stored_rows import StoredRows, TopFeatures
from insitu.harvest.reading.torch_data import ActivationDataset
from insitu.harvest.running.sites import SaeSite

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
