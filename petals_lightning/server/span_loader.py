"""Loads blocks into the memory of a server's devices, or says in one line why they do not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModel

from petals_lightning.errors import ConfigurationError, is_out_of_memory
from petals_lightning.hf import Checkpoint, block_bytes
from petals_lightning.hf.checkpoint import first_line
from petals_lightning.hf.decoder import model_class
from petals_lightning.server.access.limits import GIB
from petals_lightning.server.blocks.span import BlockSpan
from petals_lightning.server.config import ServerConfig
from petals_lightning.server.loading import load_span
from petals_lightning.server.memory_plan import free_memory, plan_memory, split_blocks

logger = logging.getLogger(__name__)


class SpanLoader:
    """Loads spans of one model.

    Args:
        checkpoint: the model.
        config: how its blocks are kept.
        on_shard: progress of loading.

    Attributes:
        devices: where blocks run.

    Raises:
        ConfigurationError: `config` names a device and devices.
    """

    def __init__(
        self, checkpoint: Checkpoint, config: ServerConfig, on_shard: Callable[[str, int, int], None] | None = None
    ):
        if config.device is not None and config.devices is not None:
            raise ConfigurationError("give --device or --devices, not both")
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.devices = [torch.device(name) for name in config.devices or (config.device or default,)]
        self._checkpoint, self._config, self._on_shard = checkpoint, config, on_shard

    def plan(self, adapters_bytes: int) -> ServerConfig:
        """The settings with as many blocks as fit beside adapters, and with budgets that leave room for them.

        Raises:
            ConfigurationError: not even one block fits.
        """
        config = self._config
        free = config.memory if config.memory is not None else self._free_memory()
        is_gpu = self.devices[0].type == "cuda"
        plan = plan_memory(self._block_bytes(), config, free - adapters_bytes, is_gpu=is_gpu)
        logger.info("memory of %s: %s", " and ".join(map(str, self.devices)), plan)
        return plan.applied_to(config)

    def load(self, start: int, end: int) -> BlockSpan:
        """Blocks [start, end).

        Raises:
            ConfigurationError: their weights take more memory than is free: Linux would kill the process.
            UnsupportedModelError: the family cannot be served.
        """
        weights, free = sum(self._block_bytes()[start:end]), self._free_memory()
        if weights > free:
            raise self._too_large(start, end, f"their weights take {weights / GIB:.3g} GiB, {free / GIB:.3g} are free")
        return load_span(
            self._checkpoint,
            start,
            end,
            devices=self._devices_of_blocks(start, end),
            dtype=self._config.dtype,
            quant_type=self._config.quant_type,
            share_prefix=self._config.share_prefix,
            on_shard=self._on_shard,
        )

    @contextmanager
    def telling_lack_of_memory(self, start: int, end: int) -> Iterator[None]:
        """Raises ConfigurationError where blocks [start, end) or what is measured of them need too much memory."""
        try:
            yield
        except (MemoryError, OSError, RuntimeError) as e:
            if not is_out_of_memory(e):
                raise
            raise self._too_large(start, end, first_line(e)) from e

    def _too_large(self, start: int, end: int, reason: str) -> ConfigurationError:
        return ConfigurationError(
            f"blocks {start}:{end} of {self._checkpoint.name_or_path} do not fit in the memory of this machine's "
            f"{self.devices[0].type} ({reason}). Hold fewer blocks with --num-blocks or --block-indices, or shrink "
            "them with --dtype bfloat16 or --quant-type nf4"
        )

    def _free_memory(self) -> int:
        return sum(map(free_memory, set(self.devices)))

    def _block_bytes(self) -> list[int]:
        config = self._config
        return block_bytes(model_class(AutoModel, self._checkpoint), self._checkpoint, config.dtype, config.quant_type)

    def _devices_of_blocks(self, start: int, end: int) -> list[torch.device]:
        if len(self.devices) == 1:
            return self.devices * (end - start)
        free = [free_memory(device) for device in self.devices]
        chosen = split_blocks(self._block_bytes()[start:end], free)
        for number, device in enumerate(self.devices):
            logger.info("%s holds %d of the blocks", device, chosen.count(number))
        return [self.devices[number] for number in chosen]
