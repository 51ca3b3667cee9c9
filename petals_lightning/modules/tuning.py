"""The base of all tuning modules: the model in its swarm, the optimizer, checkpoints of trained weights only."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from petals_lightning.data import TextDataModule, load_tokenizer
from petals_lightning.errors import ConfigurationError, NoModelError
from petals_lightning.hf.lora import LoraConfig
from petals_lightning.hf.pruning import vocabulary_size
from petals_lightning.models import prompts_of, trainable_state_dict
from petals_lightning.models.lora import lora_settings
from petals_lightning.models.prompts import PROMPT_MODES, TUNING_MODES
from petals_lightning.models.starts import check_start
from petals_lightning.models.trainable import parameters_by_kind
from petals_lightning.strategies import (
    RemoteBlockStrategy,
    ServedModel,
    load_trained_weights,
    no_code_from,
    planned_steps,
)

log = logging.getLogger(__name__)

RATES = {"input": "lr", "deep": "deep_lr", "head": "head_lr"}
"""The argument with the learning rate of each kind of trained parameters; it also names their optimizer group."""


class TuningModule(pl.LightningModule):
    """Trains prompts or LoRA (and a head) of a frozen model. Subclasses define the task: steps and the model's class.

    Under `RemoteBlockStrategy` the blocks are in its swarm; under any other strategy the whole model is in this
    process.
    The model is loaded when a Trainer runs the module: `load_from_checkpoint` reads trained weights, and no model.

    Args:
        model_name: hub id or folder of a causal language model.
        tuning_mode: None (only a head), `ptune` (`pre_seq_len` virtual tokens before the text), `deep_ptune` (as many
            more for every block), `prefix` (keys and values of as many positions for every block) or `lora`.
        pre_seq_len: number of virtual tokens, P, of ptune, deep_ptune and prefix.
        prompt_init: the start of the prompts: `random`, `vocabulary` (the embeddings of tokens that are drawn), or
            `text`; of a prefix also `zero`.
        prompt_init_text: with `text`: that text, whose tokens are cut or repeated to P.
        keep_first: do not train the first position of a prefix that starts from tokens (see `Prompts.keep_first`).
        r: rank of LoRA, in mode `lora` or beside prompts; None: no LoRA.
        alpha, target_modules, use_rslora: of LoRA, as in PEFT.
        adapter: in mode `lora`, folder or hub id of LoRA in PEFT's format to start from, with its own r, alpha and
            target_modules.
        active_adapter: LoRA that acts without being trained: the name of one that servers hold, or a folder.
        lr: AdamW's peak learning rate.
        head_lr: that of the head; None takes `lr`.
        deep_lr: that of the prompts of every block; None takes `lr`.
        weight_decay: AdamW's weight decay.
        warmup_ratio: share of all steps in which rates rise from 0 to their peak; they then fall linearly to 0. (If the
            number of steps is not known before training, as with `max_epochs=-1`, they stay at their peak.)
        dtype: of the frozen weights: `float32`, `bfloat16`, `float16`, or `auto` for the checkpoint's own.
        revision: the model's revision on the hub.
        dht_prefix: the name of the model's blocks in the swarm; None derives it from `model_name`.
        token: for private models on the hub; None uses the login of this machine. Never saved.

    Raises:
        ConfigurationError: a value out of range; the message names the argument.
    """

    model: PreTrainedModel
    monitor: str
    """The metric that selects the best checkpoint."""
    monitor_mode: str
    """"max" or "min": whether a higher or a lower metric is better."""
    from_data: tuple[str, ...] = ()
    """Arguments that a run takes from attributes of the same names of its DataModule."""
    has_head = True
    """Whether the task's model has a head to train without prompts."""
    saves_prompts = False
    """Whether a run saves its best prompts in a folder, for `chat` and for sharing."""

    def __init__(
        self,
        model_name: str,
        *,
        tuning_mode: str | None = "deep_ptune",
        pre_seq_len: int = 16,
        prompt_init: str = "random",
        prompt_init_text: str | None = None,
        keep_first: bool = False,
        r: int | None = None,
        alpha: float = 16.0,
        target_modules: list[str] | str = "all-linear",
        use_rslora: bool = False,
        adapter: str | None = None,
        active_adapter: str | None = None,
        lr: float = 1e-2,
        head_lr: float | None = None,
        deep_lr: float | None = None,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.06,
        dtype: str = "auto",
        revision: str | None = None,
        dht_prefix: str | None = None,
        token: str | None = None,
    ):
        super().__init__()
        if tuning_mode is not None and tuning_mode not in TUNING_MODES:
            *modes, last = TUNING_MODES
            raise ConfigurationError(f"tuning_mode={tuning_mode}: must be None, {', '.join(modes)} or {last}")
        if tuning_mode is None and not self.has_head:
            raise ConfigurationError(
                "tuning_mode=None: a language model has no head to train; set ptune, deep_ptune, prefix or lora"
            )
        if tuning_mode in PROMPT_MODES and pre_seq_len < 1:
            raise ConfigurationError(
                f"pre_seq_len={pre_seq_len}: must be at least 1 virtual token, e.g. 16; "
                "to train the head alone set tuning_mode=None"
            )
        if adapter is not None and tuning_mode != "lora":
            raise ConfigurationError(f"adapter={adapter}: it is trained on in tuning_mode=lora, here is {tuning_mode}")
        check_start(prompt_init, prompt_init_text, tuning_mode)
        if keep_first and (tuning_mode != "prefix" or prompt_init not in ("vocabulary", "text")):
            raise ConfigurationError(
                "keep_first=True: needs a prefix that starts from tokens; set tuning_mode=prefix, and "
                "prompt_init=vocabulary or text"
            )
        if keep_first and weight_decay > 0:
            raise ConfigurationError(
                f"keep_first=True: weight_decay={weight_decay} would change it; set weight_decay=0"
            )
        for name, rate in {"lr": lr, "head_lr": head_lr, "deep_lr": deep_lr}.items():
            if rate is not None and rate <= 0:
                raise ConfigurationError(f"{name}={rate}: must be above 0")
        if weight_decay < 0:
            raise ConfigurationError(f"weight_decay={weight_decay}: must be 0 or more")
        if not 0 <= warmup_ratio <= 1:
            raise ConfigurationError(f"warmup_ratio={warmup_ratio}: must be between 0 and 1")
        self.save_hyperparameters(ignore=["token"])  # with a subclass's own arguments
        self._lora()
        self.served_model = ServedModel(model_name, dtype, revision, dht_prefix)
        self._token = token
        self._connection_id: int | None = None
        self._loaded: dict[str, Tensor] | None = None  # trained weights, kept until the model is loaded
        self._rng_state: Tensor | None = None
        self._plan: tuple[dict[str, float], int | None] | None = None  # peak rates and steps of our schedule
        self.register_load_state_dict_post_hook(_frozen_weights_are_not_missing)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **options: Any) -> Self:
        """As Lightning's, but reads only tensors and plain values, unless `weights_only=False` is given.

        Raises:
            CheckpointError: the file contains other objects.
        """
        with no_code_from(checkpoint_path):
            return super().load_from_checkpoint(checkpoint_path, *args, **{"weights_only": True, **options})

    # --- the model -------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Builds the model, or connects it again after the Trainer has joined the swarm again.

        Without a Trainer, as in `load_from_checkpoint`, nothing is loaded: the Trainer determines whether the whole
        model or only its ends are needed.

        Raises:
            ConfigurationError: the Trainer runs in several processes.
        """
        if self._trainer is None:
            return
        strategy, processes = self.trainer.strategy, self.trainer.world_size
        if processes > 1:
            raise ConfigurationError(
                f"devices={processes}: the client runs on 1 device; set devices=1 (a swarm "
                "spreads a model over several)"
            )
        connection_id = strategy.connection_id if isinstance(strategy, RemoteBlockStrategy) else 0
        if self._connection_id == connection_id:
            return
        kept = self._loaded if self._connection_id is None else trainable_state_dict(self)
        self.model = self._load(strategy)
        if self.hparams["keep_first"]:
            prompts_of(self.model).keep_first()
        if kept is not None:
            load_trained_weights(self, kept)
        self._connection_id, self._loaded = connection_id, None
        data = getattr(self._trainer, "datamodule", None)
        if isinstance(data, TextDataModule):
            self._check_sizes(data)

    def _check_sizes(self, data: TextDataModule) -> None:
        """Checks before the first step for failures of later steps.

        Raises:
            ConfigurationError: the model has no embedding for a token, or too few positions for a sample.
        """
        name: str = self.hparams["model_name"]
        known, prefix = vocabulary_size(self.model), self._virtual_tokens or 0
        if data.largest_token >= known:
            raise ConfigurationError(
                f"the tokenizer of {data.tokenizer_name!r} gives the token {data.largest_token}, "
                f"{name!r} has embeddings for 0…{known - 1}: use the model's own tokenizer, "
                "without added tokens, and pad with a token that the model knows"
            )
        positions: int | None = self.model.max_positions  # type: ignore[assignment]
        if positions is not None and prefix + data.longest > positions:
            raise ConfigurationError(
                f"pre_seq_len={prefix} and a sample of {data.longest} tokens: {name!r} has {positions} "
                f"positions; set max_length={positions - prefix} or less"
            )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name != "model":
                raise
        raise NoModelError(
            f"this {type(self).__name__} has no model yet: a Trainer loads it, and its trained weights if it is from a "
            "checkpoint; call trainer.validate, .test, .predict or .fit with the module first"
        )

    def auto_classes(self) -> tuple[Any, Any]:
        """The distributed and the local class of the task's model."""
        raise NotImplementedError

    def model_arguments(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` for either class."""
        names = ("dtype", "revision", "tuning_mode")
        arguments = {name: self.hparams[name] for name in names} | {"token": self._token}
        arguments["pad_token_id"] = self.load_tokenizer().pad_token_id
        arguments |= {"pre_seq_len": self._virtual_tokens, "lora": self._lora()}
        arguments |= {name: self.hparams[name] for name in ("adapter", "active_adapter")}
        if self._virtual_tokens is not None:
            arguments |= {name: self.hparams[name] for name in ("prompt_init", "prompt_init_text")}
        return arguments

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return load_tokenizer(self.hparams["model_name"], revision=self.hparams["revision"], token=self._token)

    @property
    def _virtual_tokens(self) -> int | None:
        """P; None without prompts."""
        return self.hparams["pre_seq_len"] if self.hparams["tuning_mode"] in PROMPT_MODES else None

    def _lora(self) -> LoraConfig | None:
        """The settings of LoRA, if any. Raises ConfigurationError if one is wrong."""
        given = self.hparams
        if given["adapter"] is not None:
            return None  # it has its own
        if given["tuning_mode"] == "lora" and given["r"] is None:
            raise ConfigurationError("tuning_mode=lora: set the rank too, e.g. r=8")
        names = {"r": "r", "lora_alpha": "alpha", "target_modules": "target_modules", "use_rslora": "use_rslora"}
        config = {name: given[own] for name, own in names.items()} if given["r"] is not None else None
        return lora_settings(given["tuning_mode"], config)

    def _load(self, strategy: Any) -> PreTrainedModel:
        distributed, local = self.auto_classes()
        name, arguments = self.hparams["model_name"], self.model_arguments()
        if isinstance(strategy, RemoteBlockStrategy):
            return distributed.from_pretrained(name, **arguments, **strategy.client_arguments)
        return local.from_pretrained(name, **arguments)

    def __getstate__(self) -> dict[str, Any]:
        # StochasticWeightAveraging copies the module before Lightning loads the model, and would average nothing.
        if self._trainer is not None:
            self.configure_model()
        return super().__getstate__()

    # --- training and its checkpoints --------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        self._plan = rates, steps = self._peak_rates(), planned_steps(self.trainer)
        groups = [
            {"params": parameters, "lr": rates[RATES[kind]], "name": RATES[kind]}
            for kind, parameters in parameters_by_kind(self.model).items()
        ]
        optimizer = torch.optim.AdamW(groups, lr=rates["lr"], weight_decay=self.hparams["weight_decay"])
        if steps is None:
            log.warning(
                "the number of steps is not known before training: the learning rate stays %g, "
                "without warm-up and decay; set max_steps or max_epochs to have them",
                rates["lr"],
            )
            return optimizer
        schedule = LambdaLR(optimizer, self._rate_factor(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _peak_rates(self) -> dict[str, float]:
        given = {name: self.hparams[name] for name in RATES.values()}
        return {name: given["lr"] if rate is None else rate for name, rate in given.items()}

    def _rate_factor(self, steps: int) -> partial[float]:
        return partial(_warm_up_and_decay, warmup=round(self.hparams["warmup_ratio"] * steps), steps=steps)

    def log_training(self, loss: Tensor, batch_size: int) -> None:
        """Logs `train/loss`, `train/lr` (the rate of the first group), and `train/deep_lr` and `train/head_lr`."""
        self.log("train/loss", loss, prog_bar=True, batch_size=batch_size)
        groups = self.trainer.optimizers[0].param_groups
        if groups[0].get("lr") is not None:  # None with Lightning's mock optimizer
            self.log("train/lr", groups[0]["lr"])
            for group in groups:
                if (name := group.get("name")) in ("deep_lr", "head_lr"):  # an optimizer of one's own has none
                    self.log(f"train/{name}", group["lr"])

    def on_fit_start(self) -> None:
        if not self.automatic_optimization and type(self).training_step.__module__.startswith("petals_lightning."):
            raise ConfigurationError(
                "automatic_optimization=False: training_step has to step the optimizers then, "
                f"and that of {type(self).__name__} does not; override it"
            )
        # The frozen model is in eval mode on purpose: neither servers nor client apply dropout to it.
        warnings.filterwarnings("ignore", r".*module\(s\) in eval mode at the start of training")
        # GradScaler skips the first optimizer steps while it searches for its scale; the schedule continues.
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`")

    def on_train_start(self) -> None:
        if self._rng_state is not None:
            torch.set_rng_state(self._rng_state.cpu())
            self._rng_state = None
        self._follow_finders()

    def _follow_finders(self) -> None:
        """Updates the schedule if LearningRateFinder or BatchSizeFinder changed `lr` or the number of steps."""
        plan = rates, steps = self._peak_rates(), planned_steps(self.trainer)
        schedule = self.lr_schedulers()
        if self._plan in (None, plan) or steps is None or not isinstance(schedule, LambdaLR):
            return
        groups = schedule.optimizer.param_groups
        schedule.base_lrs = [rates[group["name"]] for group in groups]
        schedule.lr_lambdas = [self._rate_factor(steps) for _ in groups]
        for group, peak, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = peak * factor(schedule.last_epoch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["torch_rng_state"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._rng_state = checkpoint.get("torch_rng_state")

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Trained weights only, under every strategy, even inside other modules (averages of weights)."""
        state, own = {} if destination is None else destination, self._loaded
        own = trainable_state_dict(self) if own is None else own
        state.update({prefix + name: weight for name, weight in own.items()})
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads trained weights; see `load_trained_weights`. They are kept until the model is loaded."""
        if self._connection_id is None:
            self._loaded = dict(state_dict)
        else:
            load_trained_weights(self, state_dict)
        return torch.nn.modules.module._IncompatibleKeys([], [])


def _warm_up_and_decay(step: int, *, warmup: int, steps: int) -> float:
    """A linear rise from 0 to 1, then a linear fall to 0 at `steps`."""
    return step / warmup if step < warmup else max(0.0, (steps - step) / max(1, steps - warmup))


def _frozen_weights_are_not_missing(module: torch.nn.Module, keys: Any) -> None:
    """Lets an enclosing module load what its `state_dict` returned."""
    trained = tuple(trainable_state_dict(module))
    keys.missing_keys[:] = [key for key in keys.missing_keys if key.endswith(trained)]
