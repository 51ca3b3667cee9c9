"""The resolvers of conf/: `${name:…}`."""

from __future__ import annotations

from omegaconf import OmegaConf

from petals_lightning.sample import MODEL_DIR
from petals_lightning.training.run_folder import choose_run_folder


def register_resolvers() -> None:
    """`${run_folder:parent,resume}` (see `choose_run_folder`) and `${bundled_model:}`, the sample model's folder."""
    # Cached, as Hydra resolves it more than once a run and the time goes on.
    OmegaConf.register_new_resolver("run_folder", choose_run_folder, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("bundled_model", lambda: str(MODEL_DIR), replace=True)
