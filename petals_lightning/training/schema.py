"""The settings of a run: their names and types. With them Hydra refuses a misspelt key and names it.

Values are in conf/; a default here means "let the class decide". `MISSING` must come from a config file or the user.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from petals_lightning.client import ClientConfig
from petals_lightning.errors import ConfigurationError
from petals_lightning.options import options_of

T = TypeVar("T")


@dataclass
class ModelConfig:
    name: str = MISSING
    """Hub id or folder."""
    dtype: str = "auto"
    """Of the frozen weights: float32, bfloat16, float16, or auto for the checkpoint's own."""
    revision: str | None = None
    dht_prefix: str | None = None
    """The name of its blocks in the swarm; null derives it from the hub id."""


@dataclass
class SwarmConfig:
    pass


def with_options_of(config: type) -> Callable[[type[T]], type[T]]:
    """Decorator, below `@dataclass`: adds a dataclass's options as settings. null leaves their default.

    Where null is a value itself, the setting has the option's own default. Secrets are left out: settings are logged.
    """

    def extend(cls: type[T]) -> type[T]:
        for each in options_of(config):
            if not each.secret:
                cls.__annotations__[each.name] = (list[str] if each.is_list else each.kind) | None
                setattr(cls, each.name, each.default if each.takes_none else None)
        return cls

    return extend


@dataclass
@with_options_of(ClientConfig)
class ConnectedSwarmConfig(SwarmConfig):
    """The options of `ClientConfig`."""


@dataclass
class LocalSwarmConfig(ConnectedSwarmConfig):
    _target_: str = "petals_lightning.strategies.LocalSwarm"
    num_servers: int = MISSING
    block_ranges: list[str] | None = None
    """Blocks of each server, e.g. ["0:1","1:4"], instead of an even split."""
    threads_per_server: int | None = None
    device: str | None = None
    quant_type: str = "none"
    """How servers keep weights: none, int8 or nf4."""
    start_timeout: float = MISSING
    """Seconds for all servers to load and announce their blocks."""


@dataclass
class PrivateSwarmConfig(ConnectedSwarmConfig):
    _target_: str = "petals_lightning.strategies.PrivateSwarm"
    initial_peers: list[str] = field(default_factory=list)
    """Multiaddresses of one or more peers: /ip4/HOST/tcp/PORT/p2p/ID."""


@dataclass
class PublicSwarmConfig(ConnectedSwarmConfig):
    _target_: str = "petals_lightning.strategies.PublicSwarm"
    initial_peers: list[str] | None = None


@dataclass
class TuningConfig:
    mode: str | None = MISSING
    """ptune, deep_ptune, prefix, lora, or null to train only the head."""
    pre_seq_len: int = 16
    """Virtual tokens, P, of ptune, deep_ptune and prefix."""
    init: str = "random"
    """The start of the prompts: random, vocabulary (the embeddings of tokens that are drawn) or text; of a prefix also
    zero."""
    init_text: str | None = None
    """With init=text: that text, whose tokens are cut or repeated to P."""
    keep_first: bool = False
    """With mode=prefix and init=vocabulary or text: do not train the first position."""
    r: int | None = None
    """Rank of LoRA; beside ptune or deep_ptune it adds LoRA to them."""
    alpha: float = 16.0
    """LoRA is scaled by alpha / r."""
    target_modules: Any = "all-linear"
    """Linear modules that get LoRA: names, a regular expression for whole paths, or all-linear."""
    use_rslora: bool = False
    """Scale by alpha / √r."""
    adapter: str | None = None
    """With mode=lora: folder or hub id of LoRA in PEFT's format to start from; it has r, alpha and target_modules."""
    active_adapter: str | None = None
    """LoRA that acts without being trained: the name of one that servers hold, or a folder in PEFT's format."""


@dataclass
class AmpConfig:
    precision: str = MISSING
    """32-true, 16-mixed or bf16-mixed."""


@dataclass
class DataConfig:
    _target_: str = MISSING
    source: str = MISSING
    """`bundled`, a hub dataset id, or a file or folder in jsonl, json, csv, tsv, txt or parquet."""
    name: str | None = None
    """The configuration of a hub dataset."""
    encoding: str | None = None
    """Encoding of text files; null: UTF-8, or that of a byte order mark."""
    delimiter: str | None = None
    """Between the cells of csv and tsv files; null finds it. One character, or tab, comma, semicolon, pipe."""
    train_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    validation_fraction: float = 0.1
    max_length: int = 128
    """Tokens a sample at most."""
    batch_size: int = 32
    """Samples a batch."""
    eval_batch_size: int | None = None
    """Samples a batch of validation, test and prediction; null: four times batch_size."""


@dataclass
class LabelledDataConfig(DataConfig):
    _target_: str = "petals_lightning.data.TextClassificationDataModule"
    text_column: str | None = None
    text_pair_column: str | None = None
    template: str | None = None
    """Words around each text, for a model that names the class after them: "{text} It was"."""
    label_column: str | None = None
    num_labels: int | None = None
    """Classes; null counts them."""
    label_map: Any = None  # a mapping: OmegaConf lets no override replace a typed one
    """Labels that are read as others: {-1:0}, {Pos:pos}."""
    drop_unlabelled: bool = False
    """Leave out rows whose label is empty or -1."""


@dataclass
class NumberDataConfig(LabelledDataConfig):
    _target_: str = "petals_lightning.data.TextNumberDataModule"


@dataclass
class LabelSetDataConfig(LabelledDataConfig):
    _target_: str = "petals_lightning.data.TextLabelSetDataModule"


@dataclass
class DialogueColumns:
    """Columns of dialogues that are called otherwise: data.columns={prompt: question, completion: reply}."""

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    system: str | None = None


@dataclass
class DialogueDataConfig(DataConfig):
    _target_: str = "petals_lightning.data.DialogueDataModule"
    limit: int | None = None
    """Dialogues a split at most."""
    max_length: int = 256
    """Tokens a sample at most; longer dialogues become several samples."""
    columns: DialogueColumns = field(default_factory=DialogueColumns)
    use_chat_template: bool = True
    """False takes the simple form even if the tokenizer has a chat template."""
    merge_system: bool = False
    """True puts the system text before the first user turn, for templates without a system turn."""
    batch_size: int = 16


@dataclass
class PreferenceColumns:
    """Columns of preferences that are called otherwise: data.columns={chosen: better, rejected: worse}."""

    prompt: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    system: str | None = None


@dataclass
class PreferenceDataConfig(DataConfig):
    _target_: str = "petals_lightning.data.PreferenceDataModule"
    limit: int | None = None
    """Pairs a split at most."""
    max_length: int = 256
    """Tokens a sample at most; a longer answer is cut off."""
    columns: PreferenceColumns = field(default_factory=PreferenceColumns)
    use_chat_template: bool = True
    """False takes the simple form even if the tokenizer has a chat template."""
    merge_system: bool = False
    """True puts the system text before the first user turn, for templates without a system turn."""
    batch_size: int = 16
    """Pairs a batch."""


@dataclass
class PlainTextDataConfig(DataConfig):
    _target_: str = "petals_lightning.data.PlainTextDataModule"
    text_column: str | None = None
    max_length: int = 256
    """Tokens a sample."""
    batch_size: int = 16


@dataclass
class OptimConfig:
    lr: float = MISSING
    head_lr: float | None = None
    """Of the classification head; null: lr."""
    deep_lr: float | None = None
    """Of the prompts of every block; null: lr."""
    weight_decay: float = MISSING
    warmup_ratio: float = MISSING
    """Share of all steps."""


@dataclass
class TrainerConfig:
    """As of Lightning's Trainer."""

    _target_: str = "pytorch_lightning.Trainer"
    max_epochs: int | None = MISSING
    min_epochs: int | None = None
    max_steps: int = -1
    min_steps: int | None = None
    max_time: Any = None
    """DD:HH:MM:SS, or a mapping such as {minutes:30}."""
    accelerator: str = "auto"
    devices: Any = 1
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str | None = None
    log_every_n_steps: int = 10
    val_check_interval: float | int | str | None = None
    check_val_every_n_epoch: int | None = 1
    fast_dev_run: bool | int = False
    overfit_batches: float | int = 0.0
    limit_train_batches: float | int | None = None
    limit_val_batches: float | int | None = None
    limit_test_batches: float | int | None = None
    num_sanity_val_steps: int = 1
    reload_dataloaders_every_n_epochs: int = 0
    enable_checkpointing: bool = True
    enable_progress_bar: bool = True
    enable_model_summary: bool = False
    deterministic: bool | str | None = None
    benchmark: bool | None = None
    inference_mode: bool = True
    detect_anomaly: bool = False
    profiler: str | None = None


ELSEWHERE = {
    "trainer.logger": "logger=wandb, csv, tensorboard or none",
    "trainer.callbacks": "callbacks=early_stopping or others of conf/callbacks",
    "trainer.strategy": "swarm=local, private, public or none",
    "trainer.precision": "amp=fp32, fp16 or bf16",
    "trainer.default_root_dir": "hydra.run.dir=…",
}
"""Settings that people look for in the wrong section, and the right ones."""


@dataclass
class LoggerConfig:
    pass


@dataclass
class WandbConfig(LoggerConfig):
    _target_: str = "petals_lightning.training.loggers.wandb_logger"
    project: str = MISSING
    name: str | None = None
    entity: str | None = None
    mode: str | None = None
    """online, offline or disabled; null: online where this machine is logged in and reaches W&B."""
    tags: list[str] = field(default_factory=list)


@dataclass
class CsvConfig(LoggerConfig):
    _target_: str = "petals_lightning.training.loggers.csv_logger"


@dataclass
class TensorBoardConfig(LoggerConfig):
    _target_: str = "petals_lightning.training.loggers.tensorboard_logger"


@dataclass
class RunConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    swarm: SwarmConfig = field(default_factory=SwarmConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    amp: AmpConfig = field(default_factory=AmpConfig)
    task: dict[str, Any] = field(default_factory=dict)
    """A `TuningModule`, by `_target_`, and its own arguments."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Lightning's or your own, by any name: a `_target_`, and its arguments."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    seed: int = MISSING
    test: bool = MISSING
    """Test the best checkpoint after training, where there is labelled test data."""
    resume: bool = MISSING
    """Continue this recipe's newest run, in its folder, from its last checkpoint."""
    ckpt_path: str | None = None
    """Continue from this checkpoint, in a new folder."""
    dry_run: bool = MISSING
    """Measure what a step costs, print it, and save nothing; `--dry-run` sets it."""
    checkpoint_period: float = MISSING
    """Seconds between two saves of checkpoints/last.ckpt within an epoch."""
    output_dir: str | None = MISSING
    """The run's folder."""


_OPTIONS: dict[str, type] = {
    "model": ModelConfig,
    "local_swarm": LocalSwarmConfig,
    "private_swarm": PrivateSwarmConfig,
    "public_swarm": PublicSwarmConfig,
    "no_swarm": SwarmConfig,
    "tuning": TuningConfig,
    "amp": AmpConfig,
    "data": LabelledDataConfig,
    "dialogue_data": DialogueDataConfig,
    "preference_data": PreferenceDataConfig,
    "number_data": NumberDataConfig,
    "label_set_data": LabelSetDataConfig,
    "plain_text_data": PlainTextDataConfig,
    "optim": OptimConfig,
    "trainer": TrainerConfig,
    "wandb": WandbConfig,
    "csv": CsvConfig,
    "tensorboard": TensorBoardConfig,
    "no_logger": LoggerConfig,
}


def register_schema() -> None:
    """Puts the schema where conf/ finds it: `run_schema` for the root, and in group `schema` one for each option."""
    store = ConfigStore.instance().store
    store("run_schema", RunConfig)
    for name, node in _OPTIONS.items():
        store(name, node, group="schema")


def refuse_unread(cfg: DictConfig, section: str = "") -> None:
    """Refuses settings that were added with `+` and that nothing reads. Without `+` Hydra refuses them itself.

    Raises:
        ConfigurationError: names the first one, and the nearest setting that exists.
    """
    schema: Any = OmegaConf.get_type(cfg)
    known = [each.name for each in fields(schema)]
    for key in map(str, cfg):
        if key not in known:
            raise ConfigurationError(unknown_setting(section + key, known))
        if not OmegaConf.is_missing(cfg, key) and is_dataclass(OmegaConf.get_type(cfg, key)):
            refuse_unread(cfg[key], f"{section}{key}.")


def unknown_setting(full_key: str, known: Iterable[str]) -> str:
    """Returns one line about a setting that does not exist, and the nearest one that does.

    Args:
        full_key: the setting with its sections, e.g. `trainer.fast_run`.
        known: names of the settings of that section.
    """
    if full_key in ELSEWHERE:
        return f"unknown setting {full_key}; use {ELSEWHERE[full_key]}"
    section, _, key = full_key.rpartition(".")
    known = [name for name in known if not name.startswith("_")]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    guesses = [f"{section}.{close[0]}" if section else close[0]] if close else _settings_called(key, but=full_key)
    if guesses:
        return f"unknown setting {full_key}; did you mean {' or '.join(guesses)}?"
    return f"unknown setting {full_key}; there are: {', '.join(known) or 'none here'}"


def _settings_called(key: str, *, but: str) -> list[str]:
    """Returns the settings of all sections that have this name, except `but`."""
    sections = {each.name: each.default_factory for each in fields(RunConfig) if isinstance(each.default_factory, type)}
    options = {
        (section, each.name)
        for section, base in sections.items()
        for option in _OPTIONS.values()
        if is_dataclass(base) and issubclass(option, base)
        for each in fields(option)
    }
    return sorted({f"{section}.{name}" for section, name in options if name == key} - {but})
