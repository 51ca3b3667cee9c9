"""The command line of this process, for a user to type again."""

from __future__ import annotations

import shlex
import sys

INSTALLED = "petals-lightning train"
"""`sys.argv[0]` of the command that needs no train.py."""


def program() -> str:
    """What a user types in front of the settings."""
    return INSTALLED if sys.argv[0] == INSTALLED else shlex.join(["python", sys.argv[0]])


def command(*settings: str) -> str:
    """The whole command line, with further settings instead of those that they replace.

    A group (`tuning=lora`) replaces its own settings (`tuning.r=8`), too. Another run has another folder.
    """
    replaced = [setting.partition("=")[0] for setting in settings] + ["hydra.run.dir"] * bool(settings)

    def is_kept(argument: str) -> bool:
        key = argument.partition("=")[0].lstrip("+~")
        return not any(key == name or key.startswith(f"{name}.") for name in replaced)

    return shlex.join([*shlex.split(program()), *filter(is_kept, sys.argv[1:]), *settings])
