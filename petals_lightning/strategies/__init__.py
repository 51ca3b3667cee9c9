"""The Lightning strategy, and the swarms that it runs on."""

from petals_lightning.strategies.existing_swarms import PrivateSwarm, PublicSwarm
from petals_lightning.strategies.local_swarm import LocalSwarm
from petals_lightning.strategies.planned_steps import planned_steps
from petals_lightning.strategies.precision import precision_plugin
from petals_lightning.strategies.remote_block import RemoteBlockStrategy
from petals_lightning.strategies.swarm_provider import ServedModel, SwarmProvider
from petals_lightning.strategies.trained_weights import load_trained_weights, no_code_from

__all__ = [
    "LocalSwarm",
    "PrivateSwarm",
    "PublicSwarm",
    "RemoteBlockStrategy",
    "ServedModel",
    "SwarmProvider",
    "load_trained_weights",
    "no_code_from",
    "planned_steps",
    "precision_plugin",
]
