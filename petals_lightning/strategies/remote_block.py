"""RemoteBlockStrategy: Lightning's Trainer with the model's blocks in a swarm."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.plugins import CheckpointIO, Precision
from pytorch_lightning.strategies import SingleDeviceStrategy, StrategyRegistry
from torch import Tensor

from petals_lightning.errors import ConfigurationError
from petals_lightning.models import trainable_state_dict
from petals_lightning.strategies.local_swarm import LocalSwarm
from petals_lightning.strategies.swarm_provider import ServedModel, SwarmProvider
from petals_lightning.strategies.trained_weights import load_trained_weights, no_code_from

_CONNECTIONS = count(1)  # of all strategies of this process: a module may go from one Trainer to another


class RemoteBlockStrategy(SingleDeviceStrategy):
    """Owns the swarm for a run: brings it up before the module is configured, and leaves nothing running.

    The module builds its model in `configure_model` with `**self.trainer.strategy.client_arguments`. Checkpoints hold
    trained weights only. `Trainer(strategy="remote_blocks")` is the same with a local swarm of two servers.

    Args:
        swarm: where the blocks are; None: `LocalSwarm()`.
        accelerator, checkpoint_io, precision_plugin: as of any Lightning strategy.
    """

    strategy_name = "remote_blocks"

    def __init__(
        self,
        swarm: SwarmProvider | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ):
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)
        self.swarm = swarm or LocalSwarm()
        self.parallel_devices: list[torch.device] = []  # Lightning fills it in from the Trainer's accelerator
        self.connection_id = 0
        """Changes each time the swarm is joined. A model that was built under another one is disconnected."""
        self._client_arguments: dict[str, Any] | None = None

    @property
    def root_device(self) -> torch.device:
        """The client's device: embeddings, head and prompts. Servers have their own."""
        return self.parallel_devices[0] if self.parallel_devices else self._root_device

    @property
    def client_arguments(self) -> dict[str, Any]:
        """Keyword arguments that connect `AutoDistributed….from_pretrained` to this run's swarm."""
        if self._client_arguments is None:
            raise RuntimeError("the swarm is up between the strategy's setup_environment and teardown only")
        return dict(self._client_arguments)

    def setup_environment(self) -> None:
        if len(self.parallel_devices) > 1:
            raise ConfigurationError(
                f"devices={len(self.parallel_devices)}: the client runs on 1 device; set devices=1"
            )
        super().setup_environment()
        self._client_arguments = self.swarm.acquire(self._served_model(), self._log_dir())
        self.connection_id = next(_CONNECTIONS)

    def teardown(self) -> None:
        # Also runs when `setup_environment` failed, and after exceptions and Ctrl-C.
        from petals_lightning.client import RemoteSequential

        try:
            for part in self.lightning_module.modules() if self.lightning_module is not None else ():
                if isinstance(part, RemoteSequential):
                    part.close()
            super().teardown()
        finally:
            if self._client_arguments is not None:
                self._client_arguments = None
                self.swarm.release()

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        assert self.lightning_module is not None
        return trainable_state_dict(self.lightning_module)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads tensors and plain values, unless the Trainer was told `weights_only=False`. Raises CheckpointError."""
        with no_code_from(checkpoint_path):
            return super().load_checkpoint(checkpoint_path, weights_only=weights_only is not False)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        load_trained_weights(self.lightning_module, checkpoint["state_dict"])

    def _served_model(self) -> ServedModel:
        served = getattr(self.lightning_module, "served_model", None)
        if not isinstance(served, ServedModel):
            raise ConfigurationError(
                f"{type(self.lightning_module).__name__} must have an attribute `served_model` "
                "(petals_lightning.strategies.ServedModel), which says whose blocks it needs"
            )
        return served

    def _log_dir(self) -> Path:
        assert self.lightning_module is not None
        return Path(self.lightning_module.trainer.default_root_dir) / "servers"


StrategyRegistry.register(
    RemoteBlockStrategy.strategy_name,
    RemoteBlockStrategy,
    description="Transformer blocks on the servers of a swarm, the trained rest on one device here",
    override=True,
)
