"""Loggers whose files are all in the run's folder."""

from __future__ import annotations

import logging
import netrc
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from petals_lightning.errors import ConfigurationError

log = logging.getLogger(__name__)

_MODES = ("online", "offline", "disabled")


def wandb_logger(
    folder: str | Path,
    settings: dict[str, Any],
    project: str,
    name: str | None = None,
    entity: str | None = None,
    mode: str | None = None,
    tags: list[str] | None = None,
) -> WandbLogger:
    """Logs to Weights & Biases; without a login or a network, to files that `wandb sync` uploads later. Never asks.

    Args:
        folder: the run's folder; W&B's files are in `folder/wandb`.
        settings: the resolved settings of the run.
        project, name, entity, tags: as of `wandb.init`.
        mode: `online`, `offline` or `disabled`; None takes WANDB_MODE, or finds out.

    Raises:
        ConfigurationError: another mode.
    """
    mode = mode or os.environ.get("WANDB_MODE")
    if mode is not None and mode not in _MODES:
        raise ConfigurationError(f"logger.mode={mode}: must be one of {', '.join(_MODES)}, or null to find out")
    mode = mode or ("online" if _wandb_is_reachable() else "offline")
    import wandb

    quiet = wandb.Settings(console="off", silent=mode != "online")
    logger = WandbLogger(
        save_dir=str(folder),
        config=settings,
        project=project,
        name=name,
        entity=entity,
        mode=mode,
        tags=tags,
        settings=quiet,
        log_model=False,
    )
    # Lightning passes this argument on even when it is unset, and W&B warns of it on every run.
    logger._wandb_init.pop("anonymous", None)
    return logger


def csv_logger(folder: str | Path, settings: dict[str, Any]) -> CSVLogger:
    """Logs to `folder/csv/version_0/metrics.csv`; when the run is continued, to version_1, and so on."""
    return CSVLogger(save_dir=str(folder), name="csv")


def tensorboard_logger(folder: str | Path, settings: dict[str, Any]) -> TensorBoardLogger:
    """Logs to `folder/tensorboard`.

    Raises:
        ConfigurationError: tensorboard is not installed.
    """
    try:
        return TensorBoardLogger(save_dir=str(folder), name="", version="tensorboard")
    except ModuleNotFoundError as error:
        raise ConfigurationError("logger=tensorboard: not installed; pip install tensorboard") from error


def _wandb_is_reachable(timeout: float = 3.0) -> bool:
    """Whether this machine has a W&B key and can open a connection to W&B within `timeout` seconds."""
    url = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    if not os.environ.get("WANDB_API_KEY") and not _has_netrc_login(url.hostname or ""):
        return False
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout).close()
    except OSError:
        log.warning("W&B cannot be reached at %s: logging offline; upload later with `wandb sync`", url.hostname)
        return False
    return True


def _has_netrc_login(host: str) -> bool:
    # Where `wandb login` keeps its key.
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
