"""One run, from its settings to its results."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, ModelSummary, ProgressBar, RichModelSummary
from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from transformers import PreTrainedModel

from petals_lightning.callbacks import (
    LastCheckpoint,
    ProgressLines,
    RouteTable,
    RunSummary,
    StepCost,
    SwarmMetrics,
    progress_bar,
)
from petals_lightning.data import TextDataModule
from petals_lightning.errors import ConfigurationError, SwarmError
from petals_lightning.library_messages import libraries_to_root_log
from petals_lightning.models import lora_of, prompts_of, save_adapter, save_prompts
from petals_lightning.models.prompts import PROMPT_MODES
from petals_lightning.modules import TuningModule
from petals_lightning.strategies import (
    RemoteBlockStrategy,
    SwarmProvider,
    load_trained_weights,
    no_code_from,
    precision_plugin,
)
from petals_lightning.training.callbacks import build_callbacks
from petals_lightning.training.cli_errors import INTERRUPTED
from petals_lightning.training.command_line import command
from petals_lightning.training.console import announce, print_failed, print_interrupted, print_next_steps, print_results
from petals_lightning.training.loggers import log_results
from petals_lightning.training.run_folder import BEST_CHECKPOINT, LAST_CHECKPOINT, checkpoint_to_continue
from petals_lightning.training.schema import refuse_unread
from petals_lightning.training.settings import OF_DATA, OF_MODULES
from petals_lightning.training.targets import find_target

log = logging.getLogger(__name__)


def run(cfg: DictConfig, recipe: str = "run") -> float | None:
    """Trains, validates and tests according to `cfg` (a `RunConfig`). Writes its files to `cfg.output_dir`.

    Args:
        cfg: the settings.
        recipe: the name of the run.

    Returns:
        The best validation score (accuracy, or perplexity of a language model) for sweepers; None if there is none.

    Raises:
        PetalsLightningError: a setting is wrong, or the swarm fails. No process is left running.
    """
    _quieten_libraries()
    if cfg.dry_run:
        cfg = _of_dry_run(cfg)
    folder = Path(cfg.output_dir)
    checkpoint = checkpoint_to_continue(folder, cfg.resume, cfg.ckpt_path)
    pl.seed_everything(cfg.seed, verbose=False)
    # Cheap checks first: wrong settings and data are reported before any server is started.
    refuse_unread(cfg)
    callbacks = build_callbacks(cfg.callbacks) if not cfg.dry_run else []
    swarm: SwarmProvider | None = instantiate(cfg.swarm, _convert_="all") if "_target_" in cfg.swarm else None
    data = _build_data(cfg)
    module = build_module(cfg, data)
    announce(cfg, recipe, data)
    is_trial = cfg.dry_run or cfg.trainer.fast_dev_run  # leaves nothing
    logger = _build_logger(cfg, folder) if not is_trial else None
    facts = {
        "seed": cfg.seed, "recipe": recipe, "model": cfg.model.name, "data": cfg.data.source,
        "tuning/mode": cfg.tuning.mode,
    }  # fmt: skip
    if cfg.tuning.mode is not None:
        facts |= {"tuning/init": cfg.tuning.init, "tuning/init_text": cfg.tuning.init_text}
    summary = RunSummary(folder, _title(cfg, recipe), facts, score=module.monitor)
    monitor = (module.monitor, module.monitor_mode)
    trainer = build_trainer(
        cfg, folder, swarm, logger, None if cfg.dry_run else summary, monitor=monitor, callbacks=callbacks
    )
    try:
        with swarm.keep_alive(module.served_model, folder / "servers") if swarm else nullcontext():
            _fit(trainer, module, data, checkpoint)
            if cfg.test and not cfg.dry_run and data.has_labelled_test and trainer.global_step:
                best = _best(folder)
                with no_code_from(best):
                    trainer.test(module, datamodule=data, ckpt_path=best, verbose=False, weights_only=True)
        has_results = trainer.global_step and not is_trial
        if has_results:
            _save_best(module, folder, summary.summary)
            if logger is not None:
                log_results(logger, folder, recipe, summary.summary)
    finally:
        _finish(logger)
    if cfg.dry_run:
        return None
    print_results(summary.summary, folder)
    if has_results:
        print_next_steps(cfg, module.served_model, folder)
    return summary.summary.get(module.monitor)


def _of_dry_run(cfg: DictConfig) -> DictConfig:
    """The settings of a run that measures its first steps and leaves nothing."""
    cfg = cfg.copy()
    cfg.trainer.enable_checkpointing, cfg.trainer.limit_val_batches, cfg.trainer.num_sanity_val_steps = False, 0, 0
    cfg.trainer.min_epochs = cfg.trainer.min_steps = None
    return cfg


def _build_logger(cfg: DictConfig, folder: Path) -> Logger | None:
    if "_target_" not in cfg.logger:
        return None
    settings = OmegaConf.to_container(cfg, resolve=True)
    logger: Logger = _partial(cfg.logger)(folder=folder, settings=settings, resume=cfg.resume)
    return logger


def _build_data(cfg: DictConfig) -> TextDataModule:
    data: TextDataModule = _partial(cfg.data)(**{name: OmegaConf.select(cfg, key) for name, key in OF_DATA.items()})
    data.setup()
    return data


def build_module(cfg: DictConfig, data: Any) -> TuningModule:
    """The module of a run's task. Reads nothing yet.

    Args:
        cfg: the settings.
        data: has the attributes that the module's `from_data` names.

    Raises:
        ConfigurationError: a setting is wrong, or the data are made for another task.
    """
    unmade = find_target(
        "task",
        cfg.task,
        TuningModule,
        "not a petals_lightning.modules.TuningModule, such as petals_lightning.modules.CausalLMModule",
        hint="task._target_=petals_lightning.modules.CausalLMModule; those of conf/task go by name: task=causal_lm",
    )
    name = unmade.func.__name__
    facts = {}
    for argument in unmade.func.from_data:  # type: ignore[attr-defined]
        value = getattr(data, argument, None)
        if value is None:
            raise ConfigurationError(
                f"task: {name} needs the {argument} of its data, and {type(data).__name__} has none; choose another "
                "task (task=causal_lm) or data (data=sst2)"
            )
        facts[argument] = list(value) if isinstance(value, tuple) else value
    settings = {argument: OmegaConf.select(cfg, key) for argument, key in OF_MODULES.items()}
    if isinstance(names := settings["target_modules"], ListConfig):
        settings["target_modules"] = list(names)
    module: TuningModule = unmade(**settings, **facts)
    return module


def build_trainer(
    cfg: DictConfig,
    folder: Path,
    swarm: SwarmProvider | None,
    logger: Logger | None,
    summary: RunSummary | None,
    monitor: tuple[str, str] = ("val/accuracy", "max"),
    callbacks: Sequence[Callback] = (),
) -> pl.Trainer:
    """The Trainer of a run, which keeps the checkpoint with the best `monitor` (name and mode). Starts nothing yet.

    Raises:
        ConfigurationError: it would run on several devices.
    """
    if cfg.trainer.enable_progress_bar:
        bar = next((each for each in callbacks if isinstance(each, ProgressBar)), None) or progress_bar()
    else:
        bar = None
    # Lightning's own choice would go to the log.
    wants_summary = cfg.trainer.enable_model_summary and not any(isinstance(each, ModelSummary) for each in callbacks)
    checkpoints: list[Callback] = [LastCheckpoint(folder / LAST_CHECKPOINT, cfg.checkpoint_period)]
    if cfg.trainer.limit_val_batches != 0:
        best = folder / BEST_CHECKPOINT
        checkpoints.append(BestCheckpoint(dirpath=best.parent, filename=best.stem, monitor=monitor[0], mode=monitor[1]))
    trainer: pl.Trainer = _partial(cfg.trainer)(
        default_root_dir=str(folder),
        strategy=RemoteBlockStrategy(swarm) if swarm else "auto",
        plugins=[precision_plugin(cfg.amp.precision, _device_type(cfg.trainer.accelerator))],
        callbacks=[
            RouteTable(),
            SwarmMetrics(),
            StepCost(stops=cfg.dry_run),
            ProgressLines(score=monitor[0]),
            *(checkpoints if cfg.trainer.enable_checkpointing else ()),
            *filter(None, [summary, bar]),
            *(each for each in callbacks if each is not bar),
            *([RichModelSummary()] if wants_summary else ()),
        ],
        logger=logger or False,
        profiler=_profiler(cfg.trainer.profiler, folder),
        enable_progress_bar=bar is not None,
        use_distributed_sampler=False,
    )
    if len(getattr(trainer.strategy, "parallel_devices", ())) > 1:
        raise ConfigurationError(
            f"trainer.devices={cfg.trainer.devices}: a run trains on 1 device here; set trainer.devices=1"
        )
    return trainer


def _profiler(name: str | None, folder: Path) -> Profiler | str | None:
    """Lightning's profilers write to the log unless they are given a file."""
    kinds: dict[str | None, Any] = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
    return kinds[name](dirpath=folder, filename="profile") if name in kinds else name


class BestCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint with a state key of its own, beside a user's ModelCheckpoint of the same metric."""

    def __init__(self, **options: Any):
        super().__init__(enable_version_counter=False, **options)


def _fit(
    trainer: pl.Trainer,
    module: TuningModule,
    data: TextDataModule,
    checkpoint: Path | None,
) -> None:
    try:
        with no_code_from(checkpoint):
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:
        # Lightning has saved, torn everything down and leaves with exit code 1 after Ctrl-C.
        if trainer.interrupted:
            print_interrupted(Path(trainer.default_root_dir) / LAST_CHECKPOINT)
            raise SystemExit(INTERRUPTED) from None
        raise
    except SwarmError:
        print_failed(Path(trainer.default_root_dir) / LAST_CHECKPOINT)
        raise


def _best(folder: Path) -> Path | None:
    """Returns the best checkpoint, or None if nothing was validated: then the last weights are the best known."""
    path = folder / BEST_CHECKPOINT
    return path if path.is_file() else None


def _save_best(module: TuningModule, folder: Path, summary: dict[str, Any]) -> None:
    """Saves the best prompts in `folder`/prompts, and LoRA in `folder`/adapter, for chat and for sharing."""
    has_lora = lora_of(module.model) is not None
    has_prompts = module.saves_prompts and prompts_of(module.model) is not None
    if not (has_lora or has_prompts):
        return
    best = _best(folder)
    if best is not None:
        with no_code_from(best):
            weights = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
        load_trained_weights(module, weights)
    metrics = {
        name: value
        for name, value in summary.items()
        if name.startswith(("val/", "test/")) and name != "val/epoch" and value is not None
    }
    if has_lora:
        _save_adapter(module.model, folder / "adapter", metrics)
    if has_prompts:
        save_prompts(module.model, folder / "prompts", metrics=metrics, command=command())


def _save_adapter(model: PreTrainedModel, folder: Path, metrics: dict[str, float]) -> None:
    checkpoint: Any = model.checkpoint
    if checkpoint.is_wrapper:
        log.warning(
            "LoRA of %r is in checkpoints/ only: PEFT would load it into the whole multimodal model, where modules "
            "have other names",
            checkpoint.name_or_path,
        )
        return
    save_adapter(model, folder, metrics=metrics, command=command())


def _partial(node: DictConfig) -> Callable[..., Any]:
    """Returns the target of a config node with its settings filled in. Call it with objects, which Hydra would copy."""
    return instantiate(node, _partial_=True, _convert_="all")


def _device_type(accelerator: str) -> str:
    """Returns the type of the client's device, which precision plugins need before the Trainer has chosen it."""
    if accelerator == "cpu" or not torch.accelerator.is_available():
        return "cpu"
    device = torch.accelerator.current_accelerator()
    assert device is not None
    return device.type


def _title(cfg: DictConfig, recipe: str) -> str:
    tuning = [cfg.tuning.mode or "head only"]
    tuning += [f"P={cfg.tuning.pre_seq_len}"] if cfg.tuning.mode in PROMPT_MODES else []
    if cfg.tuning.adapter is not None:
        tuning += [f"from {cfg.tuning.adapter}"]
    elif cfg.tuning.r is not None:
        tuning += [f"r={cfg.tuning.r}"]
    tuning += [f"beside {cfg.tuning.active_adapter}"] if cfg.tuning.active_adapter is not None else []
    return f"{recipe}: {Path(cfg.model.name).name}, {', '.join(tuning)}, lr {cfg.optim.lr:g}, seed {cfg.seed}"


def _finish(logger: Logger | None) -> None:
    # A sweep's next run in this process must start a new one.
    if isinstance(logger, WandbLogger) and logger._experiment is not None:
        logger.experiment.finish()


def _quieten_libraries() -> None:
    libraries_to_root_log()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A run that continues in a new folder keeps its best checkpoint there, on purpose.
    warnings.filterwarnings("ignore", "The dirpath has changed from")
    # Our folder holds one run and its older checkpoints on purpose.
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
