"""A user's error is one line that names the fix; a fault of ours is a traceback."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from petals_lightning.errors import PetalsLightningError
from petals_lightning.training.settings import in_words_of_settings

INTERRUPTED = 130  # exit code after Ctrl-C, as shells expect it
_DISK_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EFBIG}
_TRACEBACKS_WANTED = os.environ.get("HYDRA_FULL_ERROR") == "1"


@contextmanager
def one_line_errors(cfg: DictConfig | None = None) -> Iterator[None]:
    """Turns errors that a user can mend into one line on stderr and exit code 1.

    With HYDRA_FULL_ERROR=1 in the environment they keep their tracebacks. With `cfg`, a run's settings, the line names
    these where the error names arguments of classes.
    """
    # Unless this is set, Hydra itself prints errors, over several lines, and exits.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except (PetalsLightningError, HydraException, OmegaConfBaseException, OSError) as error:
        message = explain(error, cfg)
        if _TRACEBACKS_WANTED or message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted before training; nothing to save", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def explain(error: BaseException, cfg: DictConfig | None = None) -> str | None:
    """One line on a user's error; None if its cause is no error of the user's. `cfg` as of `one_line_errors`."""
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
    else:
        if isinstance(error, MissingConfigException) and error.options is not None:
            return _unknown_option(error)
        source = next((e for e in (error, cause) if isinstance(e, (ConfigKeyError, ConfigAttributeError))), None)
        message = _unknown_setting(source, str(error)) if source is not None else _with_cause(error)
    return " ".join(message.split())


def _unknown_option(error: MissingConfigException) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    options = list(error.options or ())
    close = difflib.get_close_matches(name, options, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"no {group} is called {name!r}; {hint}there are: {', '.join(options)}"


def _with_cause(error: BaseException) -> str:
    reason = str(error.__cause__).splitlines()[0] if isinstance(error.__cause__, OmegaConfBaseException) else ""
    return f"{error}: {reason}" if reason else str(error)


def _unknown_setting(error: OmegaConfBaseException, message: str) -> str:
    """Names the misspelt setting and what it may have been meant to be."""
    key, full_key = str(error.key), error.full_key or str(error.key)
    if not dataclasses.is_dataclass(error.object_type):
        return message
    known = [field.name for field in dataclasses.fields(error.object_type) if not field.name.startswith("_")]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    hint = f"did you mean {full_key.removesuffix(key)}{close[0]}?" if close else f"there are: {', '.join(known)}"
    where = message.split(":")[0] + ": " if message.startswith("In '") else ""
    return f"{where}unknown setting {full_key}; {hint}"
