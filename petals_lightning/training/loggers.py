"""Loggers whose files are all in the run's folder."""

from __future__ import annotations

import logging
import netrc
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import ParseResult, urlparse

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from petals_lightning.errors import ConfigurationError

log = logging.getLogger(__name__)

WANDB_RUN_ID = Path("wandb") / "run_id"
_MODES = ("online", "offline", "disabled")


def wandb_logger(
    folder: str | Path,
    settings: dict[str, Any],
    resume: bool,
    project: str,
    name: str | None = None,
    entity: str | None = None,
    mode: str | None = None,
    tags: list[str] | None = None,
) -> WandbLogger:
    """Logs to Weights & Biases; without a login or a network, to files that `wandb sync` uploads later. Never asks.

    In a sweep (`wandb agent`), the agent has chosen the project, the entity and the run's id.

    Args:
        folder: the run's folder; W&B's files are in `folder/wandb`.
        settings: the resolved settings of the run.
        resume: whether to go on with the W&B run that the folder's run has been so far.
        project, name, entity, tags: as of `wandb.init`.
        mode: `online`, `offline` or `disabled`; None takes WANDB_MODE, or finds out.

    Raises:
        ConfigurationError: another mode, or `online` without a login.
    """
    mode = mode or os.environ.get("WANDB_MODE")
    if mode is not None and mode not in _MODES:
        raise ConfigurationError(f"logger.mode={mode}: must be one of {', '.join(_MODES)}, or null to find out")
    if mode == "online" and not _has_wandb_login():
        raise ConfigurationError(
            "logger.mode=online: this machine is not logged in to W&B; run `wandb login`, or set logger.mode=offline "
            "and upload later with `wandb sync`"
        )
    mode = mode or ("online" if _wandb_is_reachable() else "offline")
    import wandb

    quiet = wandb.Settings(console="off", silent=mode != "online")
    run_id = _run_id(Path(folder) / WANDB_RUN_ID, resume)
    of_sweep = "WANDB_SWEEP_ID" in os.environ  # W&B would warn of what it ignores
    logger = WandbLogger(
        save_dir=str(folder),
        config=settings,
        project=None if of_sweep else project,
        name=name,
        id=None if of_sweep else run_id,
        resume=None if of_sweep else "allow",
        entity=None if of_sweep else entity,
        mode=mode,
        tags=tags,
        settings=quiet,
        log_model=False,
    )
    # Lightning passes this argument on even when it is unset, and W&B warns of it on every run.
    logger._wandb_init.pop("anonymous", None)
    return logger


def csv_logger(folder: str | Path, settings: dict[str, Any], resume: bool) -> CSVLogger:
    """Logs to `folder/csv/version_0`, metrics.csv and hparams.yaml; when the run is continued, to version_1."""
    logger = CSVLogger(save_dir=str(folder), name="csv")
    logger.log_hyperparams(settings)
    return logger


def tensorboard_logger(folder: str | Path, settings: dict[str, Any], resume: bool) -> TensorBoardLogger:
    """Logs to `folder/tensorboard`.

    Raises:
        ConfigurationError: tensorboard is not installed.
    """
    try:
        logger = TensorBoardLogger(save_dir=str(folder), name="", version="tensorboard", default_hp_metric=False)
    except ModuleNotFoundError as error:
        raise ConfigurationError("logger=tensorboard: not installed; pip install tensorboard") from error
    logger.log_hyperparams(settings)
    return logger


def log_results(logger: Logger, folder: Path, name: str, summary: Mapping[str, Any]) -> None:
    """Gives a logger what came out of a run. W&B: the summary, and what was tuned as artifacts with cards.

    TensorBoard gets the cards, as text.

    Args:
        logger: of the run; for others than these two, the run's folder is the place.
        folder: of the run, with `prompts` or `adapter` or both.
        name: of the recipe; the artifacts are `NAME-prompts` and `NAME-adapter`.
        summary: of the run: numbers and words by name. In W&B they take the place of the last values that were logged:
            sweeps choose by `val/…` of the best epoch.
    """
    facts = {key: value for key, value in summary.items() if isinstance(value, str | int | float)}
    if isinstance(logger, WandbLogger):
        logger.experiment.summary.update(facts)
    for kind in ("prompts", "adapter"):
        if not (folder / kind).is_dir():
            continue
        card = folder / kind / "README.md"
        if isinstance(logger, WandbLogger):
            import wandb

            about = card.read_text(encoding="utf-8") if card.is_file() else None
            artifact = wandb.Artifact(f"{name}-{kind}", type=kind, description=about, metadata=facts)
            artifact.add_dir(str(folder / kind))
            logger.experiment.log_artifact(artifact, aliases=["best"])
        elif isinstance(logger, TensorBoardLogger) and card.is_file():
            logger.experiment.add_text(kind, card.read_text(encoding="utf-8"))


def _run_id(path: Path, resume: bool) -> str:
    """The id of the folder's W&B run, kept in a file: that of the run so far, WANDB_RUN_ID, or a new one."""
    if resume and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    run_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(run_id + "\n", encoding="utf-8")
    return run_id


def _wandb_url() -> ParseResult:
    return urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))


def _has_wandb_login() -> bool:
    return bool(os.environ.get("WANDB_API_KEY")) or _has_netrc_login(_wandb_url().hostname or "")


def _wandb_is_reachable(timeout: float = 3.0) -> bool:
    """Whether this machine has a W&B key and can open a connection to W&B within `timeout` seconds."""
    if not _has_wandb_login():
        return False
    url = _wandb_url()
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
