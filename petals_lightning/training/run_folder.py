"""Where a run's files are, and where an interrupted run continues."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from petals_lightning.errors import ConfigurationError

LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"
BEST_CHECKPOINT = Path("checkpoints") / "best.ckpt"


def choose_run_folder(parent: str, resume: bool) -> str:
    """The folder for a run below `parent`; conf/config.yaml calls this as `${run_folder:…}`.

    It is a new one named after the time, or with `resume` the newest one with a checkpoint to continue from.
    """
    if resume:
        checkpoints = sorted(Path(parent).glob(f"*/{LAST_CHECKPOINT}"), key=lambda path: path.stat().st_mtime)
        if checkpoints:
            return str(checkpoints[-1].parent.parent)
    return str(Path(parent) / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))


def checkpoint_to_continue(folder: str | Path, resume: bool, ckpt_path: str | None) -> Path | None:
    """The checkpoint that a run starts from, if any.

    Raises:
        ConfigurationError: there is none where one was asked for.
    """
    if ckpt_path is not None:
        if resume:
            raise ConfigurationError("resume=true and ckpt_path=… exclude each other; give one of them")
        if not Path(ckpt_path).is_file():
            raise ConfigurationError(f"ckpt_path={ckpt_path}: no such file")
        return Path(ckpt_path)
    if not resume:
        return None
    last = Path(folder) / LAST_CHECKPOINT
    if not last.is_file():
        raise ConfigurationError(f"resume=true: no earlier run to continue ({last} is missing); leave resume out")
    return last
