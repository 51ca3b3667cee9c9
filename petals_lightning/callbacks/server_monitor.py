"""Figures of the machines that serve a run, for its loggers."""

from __future__ import annotations

import http.client
import logging
import threading
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlparse

import pytorch_lightning as pl
from prometheus_client.parser import text_string_to_metric_families
from pytorch_lightning.callbacks import Callback

from petals_lightning.errors import ConfigurationError

log = logging.getLogger(__name__)

_PREFIX = "petals_lightning_server_"
_OF_PROCESS = ("process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds")
_MAX_BYTES = 2**20  # of an answer: a server's figures are some kilobytes
_TIMEOUT = 5.0  # seconds for a server to answer


class ServerMonitor(Callback):
    """Logs the figures of servers that were started with `--metrics-port`, in every logger, as `servers/NAME/FIGURE`.

    A thread of its own reads them, so that a server that does not answer costs the run no time. Its figures are then
    left out, and a warning says so once. docs/running-servers.md names the figures; memory, processor time and open
    files of the server's process are among them.

    Args:
        urls: where the figures are, by names of your choice: `{"attic": "http://10.0.0.2:9100/metrics"}`.
        period: seconds between two readings.

    Raises:
        ConfigurationError: no URLs, one that is not HTTP, or a period that is not positive.
    """

    def __init__(self, urls: Mapping[str, str], period: float = 10.0):
        if not urls:
            raise ConfigurationError("urls: none; give each server a name: {attic: http://10.0.0.2:9100/metrics}")
        for name, url in urls.items():
            if urlparse(url).scheme not in ("http", "https"):
                raise ConfigurationError(f"urls.{name}={url}: must begin with http:// or https://")
        if not period > 0:
            raise ConfigurationError(f"period={period}: must be a positive number of seconds")
        self._urls, self._period = dict(urls), period
        self._figures: dict[str, float] = {}
        self._silent: set[str] = set()
        self._stop = threading.Event()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop = threading.Event()  # a thread that still waits for a server's answer ends by its own
        threading.Thread(target=self._read_until, args=(self._stop,), name="server monitor", daemon=True).start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (batch_idx + 1) % every == 0:
            for name, value in self._figures.items():
                pl_module.log(name, value, batch_size=1)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop.set()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop.set()

    def _read_until(self, stop: threading.Event) -> None:
        while not stop.is_set():
            figures: dict[str, float] = {}
            for name, url in self._urls.items():
                figures |= {f"servers/{name}/{figure}": value for figure, value in self._read(name, url).items()}
            self._figures = figures
            stop.wait(self._period)

    def _read(self, name: str, url: str) -> dict[str, float]:
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
                figures = _parse(answer.read(_MAX_BYTES).decode())
        except (OSError, http.client.HTTPException, ValueError) as error:
            if name not in self._silent:
                log.warning("no figures of server %s from %s: %s", name, url, error)
            self._silent.add(name)
            return {}
        self._silent.discard(name)
        return figures


def _parse(text: str) -> dict[str, float]:
    """Returns our servers' figures and their processes', the values of labels behind a slash: `requests/forward`.

    Raises:
        ValueError: this is not Prometheus' format.
    """
    figures = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            ours = family.name.startswith(_PREFIX) and family.type in ("gauge", "counter")
            # A counter's `_created` is a time.
            if (ours and not sample.name.endswith("_created")) or sample.name in _OF_PROCESS:
                name = "/".join([sample.name.removeprefix(_PREFIX).removesuffix("_total"), *sample.labels.values()])
                figures[name] = sample.value
    return figures
