"""`petals-lightning train`: what train.py does, where the package is installed without the repository."""

from __future__ import annotations

import sys

import typer

HYDRAS_OWN = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": ["-h"]}
"""How typer must read the command, so that all arguments reach Hydra."""


def train(context: typer.Context) -> None:
    """Train a recipe: `petals-lightning train recipe=sst2_deep_ptune`. Without arguments: list the recipes."""
    from petals_lightning.training.command_line import INSTALLED
    from petals_lightning.training.train import main

    sys.argv = [INSTALLED, *context.args]
    main()
