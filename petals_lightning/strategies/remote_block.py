"""RemoteBlockStrategy: Lightning's Trainer with the model's blocks in a swarm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities import move_data_to_device
from lightning_fabric.utilities.data import sized_len
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.plugins import CheckpointIO, Precision
from pytorch_lightning.strategies import SingleDeviceStrategy, StrategyRegistry
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor

from petals_lightning.errors import ConfigurationError
from petals_lightning.models import trainable_state_dict
from petals_lightning.strategies.batches_in_flight import BEGUN, BatchesInFlight
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
        self._forwards: ThreadPoolExecutor | None = None

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

    def process_dataloader(self, dataloader: Any) -> Any:
        """Has the forwards of evaluation batches begun ahead of their turn, if the module lets it (`evaluate`).

        Not those of a loader without a length: Lightning takes its first batch before callbacks that change weights for
        an evaluation (averages) have done so.
        """
        module, size = self.lightning_module, self.swarm.batches_in_flight
        assert module is not None
        one_by_one = size == 1 or sized_len(dataloader) is None or _changes_batches(module)
        if module.trainer.training or one_by_one or not hasattr(module, "evaluate"):
            return super().process_dataloader(dataloader)
        return BatchesInFlight(dataloader, self._begin, size, lambda: _batches_to_come(module.trainer))

    def _begin(self, batch: dict[str, Any]) -> dict[str, Any]:
        module: Any = self.lightning_module
        predicting = module.trainer.predicting
        as_inference = torch.is_inference_mode_enabled()

        def forward() -> Any:
            # Threads begin with gradients on, and without the Trainer's precision.
            with torch.no_grad(), torch.inference_mode(as_inference), self.precision_plugin.forward_context():
                moved = move_data_to_device(self.precision_plugin.convert_input(batch), self.root_device)
                return module.evaluate(moved, predicting=predicting)

        if self._forwards is None:
            self._forwards = ThreadPoolExecutor(self.swarm.batches_in_flight, "evaluation")
        return batch | {BEGUN: self._forwards.submit(forward)}

    def teardown(self) -> None:
        # Also runs when `setup_environment` failed, and after exceptions and Ctrl-C.
        from petals_lightning.client import RemoteSequential

        try:
            if self._forwards is not None:  # those of a pass that has ended early
                self._forwards.shutdown(cancel_futures=True)
                self._forwards = None
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


def _changes_batches(module: pl.LightningModule) -> bool:
    """Whether the user does something to batches before they reach a step, which a forward begun before would miss."""
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    data = getattr(module.trainer, "datamodule", None)
    return any(is_overridden(hook, owner) for hook in hooks for owner in (module, data) if owner is not None)


def _batches_to_come(trainer: pl.Trainer) -> int | None:
    """How many batches of each loader the running evaluation takes at most; None: all."""
    if trainer.sanity_checking:
        limits = trainer.num_sanity_val_batches
    elif trainer.predicting:
        limits = trainer.num_predict_batches
    else:
        limits = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
    most = max(limits)
    return None if most == math.inf else int(most)


StrategyRegistry.register(
    RemoteBlockStrategy.strategy_name,
    RemoteBlockStrategy,
    description="Transformer blocks on the servers of a swarm, the trained rest on one device here",
    override=True,
)
