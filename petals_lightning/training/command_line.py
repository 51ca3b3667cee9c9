"""The command line of this process, for a user to type again."""

from __future__ import annotations

import shlex
import sys

INSTALLED = "petals-lightning train"
"""`sys.argv[0]` of the command that needs no train.py."""


def program() -> str:
    """What a user types in front of the settings."""
    return INSTALLED if sys.argv[0] == INSTALLED else shlex.join(["python", sys.argv[0]])


def command() -> str:
    """The whole command line."""
    return shlex.join([*shlex.split(program()), *sys.argv[1:]])
