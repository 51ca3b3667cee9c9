"""A real swarm of server processes on this machine, for one run."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoConfig

from petals_lightning.errors import CheckpointError, ConfigurationError
from petals_lightning.options import command_line
from petals_lightning.protocol.quant_types import UNQUANTIZED
from petals_lightning.server.config import ServerConfig, parse_block_indices
from petals_lightning.strategies.server_process import ServerProcess, launch
from petals_lightning.strategies.swarm_provider import ServedModel, SwarmProvider
from petals_lightning.swarm.guard import ProcessGuard

# Servers on the same cores gain nothing from running at the same time, and whole batches give the same bits in every
# run.
_NEVER_CUT = 1 << 30
_STOP_TIMEOUT = 6.0  # seconds; servers promise to leave within 5


class LocalSwarm(SwarmProvider):
    """Starts servers on loopback and stops them, whatever happens: an exception, Ctrl-C, or `kill -9` of this process.

    The servers are the same program as on other machines and the client talks to them in the same way.

    Args:
        num_servers: servers to start; the blocks are split among them as evenly as possible.
        block_ranges: blocks of each server, e.g. `["0:1", "1:4"]`, instead of an even split.
        threads_per_server: CPU threads of each server; None divides the cores among them.
        device: where servers compute, e.g. `cpu` or `cuda:0`; None lets them choose.
        quant_type: how servers keep weights: `none`, `int8` or `nf4`. Fewer bits fit larger models on one machine.
        start_timeout: seconds for all servers to load their blocks and announce them.
        **options: of `SwarmProvider`, and of `ClientConfig`. Batches are cut only if `min_microbatch_tokens` is given.

    Raises:
        ConfigurationError: there is no server, a range is malformed, or a value breaks its option's rule.
    """

    def __init__(
        self,
        num_servers: int = 2,
        block_ranges: Sequence[str] | None = None,
        threads_per_server: int | None = None,
        device: str | None = None,
        quant_type: str = UNQUANTIZED,
        start_timeout: float = 180.0,
        **options: Any,
    ):
        if options.get("min_microbatch_tokens") is None:
            options["min_microbatch_tokens"] = _NEVER_CUT
        super().__init__(**options)
        if num_servers < 1:
            raise ConfigurationError(f"num_servers={num_servers}: a swarm needs at least 1 server")
        for blocks in block_ranges or ():
            if not re.fullmatch(r"\d+:\d+", blocks):
                raise ConfigurationError(f"block_ranges: {blocks!r} is not a range such as 0:2")
        self.num_servers, self.block_ranges = num_servers, list(block_ranges or ())
        self.threads_per_server, self.start_timeout = threads_per_server, start_timeout
        self._server_config = ServerConfig(device=device, quant_type=quant_type)
        self._servers: list[ServerProcess] = []
        self._guard: ProcessGuard | None = None

    def _arguments(self, model: ServedModel) -> dict[str, Any]:
        # One peer suffices to join, but any server may be killed before we are connected.
        peers = [address for server in self._servers for address in server.addresses]
        return {"initial_peers": peers, "dht_prefix": model.dht_prefix}

    def _start(self, model: ServedModel, log_dir: Path) -> None:
        ranges = self.block_ranges or split_evenly(_count_blocks(model), self.num_servers)
        deadline = time.monotonic() + self.start_timeout
        self._guard = ProcessGuard.start()
        try:
            with Console(stderr=True).status(f"starting {len(ranges)} servers on this machine …"):
                first = self._launch(0, ranges[0], ["--new-swarm"], model, log_dir)
                peers = [part for peer in first.wait_for_address(deadline) for part in ("--initial-peers", peer)]
                for number, blocks in enumerate(ranges[1:], 1):
                    self._launch(number, blocks, peers, model, log_dir)
                for server in self._servers:
                    server.wait_until_ready(deadline)
        except BaseException:
            self._stop()
            raise

    def _launch(self, number: int, blocks: str, swarm: list[str], model: ServedModel, log_dir: Path) -> ServerProcess:
        config = replace(
            self._server_config,
            block_indices=parse_block_indices(blocks),
            dht_prefix=model.dht_prefix,
            dtype=model.dtype,
            threads=self.threads_per_server or max(1, (os.cpu_count() or 1) // self.num_servers),
            public_name=f"local-{number}",
        )
        arguments = ["serve", model.name_or_path, *swarm, *command_line(config)]
        arguments += ["--host-maddrs", "/ip4/127.0.0.1/tcp/0", "--verbose"]
        if model.revision is not None:
            arguments += ["--revision", model.revision]
        title, log = f"server {number} (blocks {blocks})", log_dir / f"server_{number}.log"
        server = ServerProcess(launch(arguments), title, log).start()
        assert self._guard is not None
        self._guard.protect(server.pid)
        self._servers.append(server)
        return server

    def _stop(self) -> None:
        deadline = time.monotonic() + _STOP_TIMEOUT
        for server in self._servers:
            server.signal(signal.SIGINT)
        for server in self._servers:
            server.kill_after(deadline - time.monotonic())
        self._servers.clear()
        if self._guard is not None:
            self._guard.release()
            self._guard = None


def split_evenly(num_blocks: int, num_servers: int) -> list[str]:
    """Returns ranges of nearly equal length that cover `num_blocks` blocks, one for each server.

    Raises:
        ConfigurationError: there are more servers than blocks.
    """
    if num_servers > num_blocks:
        raise ConfigurationError(
            f"num_servers={num_servers}, but the model has {num_blocks} blocks; use at most as many servers"
        )
    bounds = [number * num_blocks // num_servers for number in range(num_servers + 1)]
    return [f"{start}:{end}" for start, end in pairwise(bounds)]


def _count_blocks(model: ServedModel) -> int:
    try:
        config = AutoConfig.from_pretrained(model.name_or_path, revision=model.revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"model_name={model.name_or_path}: no model there ({reason})") from error
    return config.get_text_config().num_hidden_layers
