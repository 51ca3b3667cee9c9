"""Trains a recipe: `python train.py recipe=sst2_deep_ptune`. Without arguments it lists the recipes.

Settings are in conf/ (`python train.py recipe=… --cfg job` shows them all), recipes in recipes/.
"""

from __future__ import annotations

import os

# Servers, guard and client share the cores: spinning OpenMP threads would take them from each other. Set before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from petals_lightning.library_messages import warnings_to_log


def main() -> None:
    warnings_to_log()  # before libraries are imported, which may warn
    from petals_lightning.training.train import main

    main()


if __name__ == "__main__":
    main()
