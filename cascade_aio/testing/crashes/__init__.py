"""Real processes on real file systems, killed at random, and what must be there afterwards. See ``campaign``."""

from cascade_aio.testing.crashes.campaign import run_campaign
from cascade_aio.testing.crashes.disks import FILE_SYSTEMS, missing_for
from cascade_aio.testing.crashes.figures import CampaignError, Figures
from cascade_aio.testing.crashes.seed import GENERATIONS_PER_SEED

__all__ = ["FILE_SYSTEMS", "GENERATIONS_PER_SEED", "CampaignError", "Figures", "missing_for", "run_campaign"]
