"""Warnings and log lines of other libraries: kept in a program's log, off its screen.

Only `train.py` and `petals-lightning` use this: importing the package, or calling it from Python, changes no warnings
or loggers.
"""

from __future__ import annotations

import logging
import sys
import warnings
from typing import TextIO

_warnings_log = logging.getLogger("py.warnings")  # the logger of logging.captureWarnings
_early: list[str] = []  # warnings from before the program set up its log


def warnings_to_log() -> None:
    """Sends Python's warnings, including deprecations, to the logger `py.warnings` at level INFO.

    Call this first: libraries warn while they are imported. `python -W …` and PYTHONWARNINGS still select warnings.
    """
    if not sys.warnoptions:
        warnings.simplefilter("default")
    warnings.showwarning = _log_warning


def libraries_to_root_log() -> None:
    """Removes the handlers with which imported libraries print, so that the root's handlers decide."""
    for logger in list(logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            for handler in [each for each in logger.handlers if _prints(each)]:
                logger.removeHandler(handler)
                logger.propagate = True
    _log_early_warnings()


class OursOrErrors(logging.Filter):
    """A filter for handlers that write to a screen: passes this package's records, and errors of others."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or record.name.partition(".")[0] == __package__


def _prints(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _early.append(f"{category.__name__}: {message} ({filename}:{lineno})")
    if logging.root.handlers:
        _log_early_warnings()


def _log_early_warnings() -> None:
    while _early:
        _warnings_log.info("%s", _early.pop(0))
