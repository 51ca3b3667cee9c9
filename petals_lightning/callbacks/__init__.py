"""Callbacks: the output of a run while it trains, and the files that it saves."""

from petals_lightning.callbacks.last_checkpoint import LastCheckpoint
from petals_lightning.callbacks.progress import ProgressLines, progress_bar
from petals_lightning.callbacks.route_table import RouteTable
from petals_lightning.callbacks.run_summary import RunSummary
from petals_lightning.callbacks.server_monitor import ServerMonitor
from petals_lightning.callbacks.step_cost import StepCost
from petals_lightning.callbacks.swarm_metrics import SwarmMetrics

__all__ = [
    "LastCheckpoint",
    "ProgressLines",
    "RouteTable",
    "RunSummary",
    "ServerMonitor",
    "StepCost",
    "SwarmMetrics",
    "progress_bar",
]
