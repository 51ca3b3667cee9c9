"""Shows a user's error as one line that names the fix, and a bug as a traceback."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from petals_lightning.errors import PetalsLightningError
from petals_lightning.training.schema import unknown_setting
from petals_lightning.training.settings import in_words_of_settings

INTERRUPTED = 130  # exit code after Ctrl-C, as shells expect it
_DISK_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EFBIG}
_LIBRARIES = {"pytorch_lightning", "lightning_fabric", "hydra", "wandb"}
_TRACEBACKS_WANTED = os.environ.get("HYDRA_FULL_ERROR") == "1"


@contextmanager
def one_line_errors(cfg: DictConfig | None = None) -> Iterator[None]:
    """Turns errors that a user can fix into one line on stderr and exit code 1.

    With HYDRA_FULL_ERROR=1 in the environment they keep their tracebacks. With `cfg`, the settings of a run, the line
    names settings instead of arguments of classes.
    """
    # Unless this is set, Hydra itself prints errors, over several lines, and exits.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except Exception as error:
        message = explain(error, cfg)
        if _TRACEBACKS_WANTED or message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted before training; nothing to save", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def explain(error: BaseException, cfg: DictConfig | None = None) -> str | None:
    """Returns one line about a user's error, or None for any other. `cfg` is explained in `one_line_errors`."""
    cause = error.__cause__
    if isinstance(error, OSError) and not isinstance(error, HydraException):  # Hydra's missing configs are both
        if error.errno not in _DISK_ERRORS:
            return None
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; free the disk or set hydra.run.dir=… to a folder that can be written"
    # Hydra wraps what is raised in a constructor that it calls.
    ours = next((each for each in (error, cause) if isinstance(each, PetalsLightningError)), None)
    if ours is not None:
        message = str(ours) if cfg is None else in_words_of_settings(str(ours), cfg)
    elif isinstance(error, InstantiationException):
        return None
    elif not isinstance(error, (HydraException, OmegaConfBaseException)):
        if not _is_refusal(error):
            return None
        message = str(error).replace("Config group override", "The value of a group, such as logger=none,")
    else:
        if isinstance(error, MissingConfigException) and error.options is not None:
            return _unknown_option(error)
        source = next((e for e in (error, cause) if isinstance(e, (ConfigKeyError, ConfigAttributeError))), None)
        message = _unknown_setting(source, str(error)) if source is not None else _with_cause(error)
    return " ".join(message.split())


def _is_refusal(error: BaseException) -> bool:
    """Whether Lightning, Hydra or W&B raised it on purpose.

    For example: a metric that is not logged, a missing device, an invalid key.
    """
    frames = traceback.extract_tb(error.__traceback__)[-1:]
    return any(
        _LIBRARIES.intersection(Path(frame.filename).parts) and (frame.line or "").startswith("raise ")
        for frame in frames
    )


def _unknown_option(error: MissingConfigException) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    options = list(error.options or ())
    close = difflib.get_close_matches(name, options, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    if (group, name) == ("hydra/sweeper", "optuna"):
        hint = "pip install 'petals-lightning[optuna]'; "
    return f"no {group} is called {name!r}; {hint}there are: {', '.join(options)}"


def _with_cause(error: BaseException) -> str:
    reason = str(error.__cause__).splitlines()[0] if isinstance(error.__cause__, OmegaConfBaseException) else ""
    return f"{error}: {reason}" if reason else str(error)


def _unknown_setting(error: OmegaConfBaseException, message: str) -> str:
    """Names the misspelt setting, and the nearest one that exists."""
    full_key = error.full_key or str(error.key)
    if not dataclasses.is_dataclass(error.object_type):
        known = [str(key) for key in error.parent_node or ()]
        return f"{unknown_setting(full_key, known)} (A new one is added with +{full_key}=…)"
    where = message.split(":")[0] + ": " if message.startswith("In '") else ""
    return where + unknown_setting(full_key, [field.name for field in dataclasses.fields(error.object_type)])
