"""PDC, the Proactive Data Containers of HPC: a real ``pdc_server`` of an installation that ``PDC_DIR`` names."""

from __future__ import annotations

from bench.peers.protocol import System

SYSTEMS = (System("pdc", "PDC", "bench.peers.pdc.peer:PdcPeer"),)
