"""Figures of servers in a run's log."""

from __future__ import annotations

import csv
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback

from petals_lightning.callbacks import ServerMonitor
from petals_lightning.errors import ConfigurationError
from petals_lightning.training.run import run
from tests.helpers.lightning import make_module, make_trainer
from tools.testing.proxy import free_port
from tools.testing.servers import start_server
from tools.testing.swarms import PREFIX


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_loggers_get_the_figures_of_servers(
    logger: str, compose_run: Callable[..., DictConfig], text_model: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    port = free_port()
    server = start_server(text_model, None, [], "--metrics-port", str(port)).wait_until_ready()
    silent = f"http://127.0.0.1:{free_port()}/metrics"
    try:
        run(
            compose_run(
                f"logger={logger}", "test=false", "swarm=private", f"swarm.initial_peers=[{server.maddr}]",
                f"model.dht_prefix={PREFIX}", "trainer.max_epochs=8", "callbacks=server_monitor",
                f"callbacks.server_monitor.urls={{attic: 'http://127.0.0.1:{port}/metrics', cellar: '{silent}'}}",
                "callbacks.server_monitor.period=0.2",
            )
        )  # fmt: skip
    finally:
        server.stop()
    logged = {"csv": read_csv, "tensorboard": read_tensorboard}[logger](tmp_path)
    assert logged["servers/attic/requests/forward"][-1] > 1
    assert logged["servers/attic/compute_seconds/backward"][-1] > 0
    assert logged["servers/attic/process_resident_memory_bytes"][-1] > 1 << 20
    assert logged["servers/attic/graph_bytes_limit"][-1] > 0
    assert not [name for name in logged if "cellar" in name or "created" in name]
    (warning,) = [record.getMessage() for record in caplog.records if "no figures" in record.getMessage()]
    assert f"no figures of server cellar from {silent}: " in warning


class Failing(Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        raise RuntimeError("as any callback may")


@pytest.mark.parametrize("fails", [True, False])
def test_reading_ends_with_the_run(fails: bool, text_model: Path, data: Any, tmp_path: Path) -> None:
    monitor = ServerMonitor({"cellar": f"http://127.0.0.1:{free_port()}/metrics"}, period=0.1)
    others = [Failing()] if fails else []
    with pytest.raises(RuntimeError, match="as any") if fails else nullcontext():
        make_trainer(tmp_path, monitor, *others, max_steps=1).fit(make_module(text_model), datamodule=data)
    threads = [each for each in threading.enumerate() if each.name == "server monitor"]
    for each in threads:
        each.join(10)
    assert not any(each.is_alive() for each in threads)


def read_csv(folder: Path) -> dict[str, list[float]]:
    with open(folder / "csv" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return {name: values for name in rows[0] if (values := [float(row[name]) for row in rows if row[name]])}


def read_tensorboard(folder: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"urls": {}}, "urls: none"),
        ({"urls": {"a": "file:///etc/passwd"}}, r"urls\.a=file:///etc/passwd: must begin with http"),
        ({"urls": {"a": "http://h:1/metrics"}, "period": 0}, "period=0: must be a positive number"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ServerMonitor(**arguments)
