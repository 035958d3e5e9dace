"""Activations of whole data sets, on disk: `harvest` writes them, and `Activations` reads them."""

from insitu.harvest.harvesting import Harvested, harvest
from insitu.harvest.planning import HarvestPlan, plan
from insitu.harvest.progress import HarvestProgress
from insitu.harvest.sites import SaeSite

__all__ = ["HarvestPlan", "HarvestProgress", "Harvested", "SaeSite", "harvest", "plan"]
