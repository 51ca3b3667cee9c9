"""`AutoDistributed*`: Hugging Face models with embeddings, norms and head here, and their blocks in a swarm."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from petals_lightning.client import ClientConfig, RemoteSequential
from petals_lightning.errors import ConfigurationError, UnsupportedInputError
from petals_lightning.hf import Checkpoint, ModelSlice, load_pruned, rotary_limit, sliding_window
from petals_lightning.hf.decoder import model_class
from petals_lightning.hf.loading import outline_blocks
from petals_lightning.hf.past_shapes import past_shapes
from petals_lightning.hf.pruning import num_blocks
from petals_lightning.models.adapter_files import (
    adapter_settings,
    base_model_of,
    find_active_adapter,
    load_adapter,
    save_adapter,
)
from petals_lightning.models.arguments import config_overrides
from petals_lightning.models.bridge import DecoderBridge
from petals_lightning.models.generation import RemoteGeneration
from petals_lightning.models.judge import LocalJudge
from petals_lightning.models.lora import find_targets, lora_settings
from petals_lightning.models.prompt_files import (
    PromptCard,
    check_base_model,
    find_card,
    load_prompts,
    load_tuned,
    save_tuned,
    tuning_of,
)
from petals_lightning.models.prompts import TuningMode
from petals_lightning.models.reading import reading
from petals_lightning.models.self_check import check_ends
from petals_lightning.models.starts import PromptInit, PromptStart, check_start
from petals_lightning.models.trainable import (
    FrozenBackbone,
    attach_trainable,
    has_head_of_its_own,
    lora_of,
    parameters_to_draw,
    prompts_of,
)
from petals_lightning.options import make, options_of
from petals_lightning.protocol.adapters import Adapter
from petals_lightning.protocol.uids import check_dht_prefix, derive_dht_prefix
from petals_lightning.swarm import SwarmNode
from petals_lightning.swarm.public import PUBLIC_INITIAL_PEERS, PUBLIC_NOTICE

if TYPE_CHECKING:
    import hivemind

logger = logging.getLogger(__name__)


class DistributedModel(FrozenBackbone):
    """Mixin for the family's own class, for a model with remote blocks."""

    bridge: DecoderBridge
    checkpoint: Checkpoint

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        family = next((base for base in cls.__mro__[1:] if issubclass(base, PreTrainedModel)), None)
        for name in ("forward", "prepare_inputs_for_generation"):
            own, replaced = getattr(cls, name, None), getattr(family, name, None)
            if own is not None and replaced is not None and own is not replaced:
                setattr(cls, name, _with_signature_of(replaced, own))
        if family is not None:  # torch.compile skips it: around remote blocks there is nothing to gain
            cls.forward = torch.compiler.disable(cls.forward)  # type: ignore[attr-defined]

    def close(self) -> None:
        """Leaves the swarm: ends the streams to servers, and this process's peer if it was created for this model."""
        self.bridge.layers.close()

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Saves what was trained (kilobytes); `from_pretrained(save_directory)` loads the base model with it.

        LoRA is saved as PEFT does, see `adapter_files`.

        Args:
            save_directory: created if missing.
            options: of Hugging Face's method; those for large weights have no effect here.

        Raises:
            ConfigurationError: nothing was trained, or prompts beside LoRA, for which there is no common format.
        """
        if options.pop("push_to_hub", False):
            raise ConfigurationError("save_pretrained(push_to_hub=True): call push_to_hub(repo_id) instead")
        model: Any = self
        if lora_of(model) is None:
            save_tuned(model, save_directory)
        elif prompts_of(model) is None:
            save_adapter(model, save_directory)
        else:
            raise ConfigurationError(
                "this model has prompts beside LoRA, which have no common format: save_prompts(model, FOLDER) and "
                "save_adapter(model, FOLDER) save one each"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A model with its own weights and the same connections, as weight averaging makes."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedInputError(
            f"{type(self).__name__} cannot be pickled: its connections belong to this process. Save what was trained "
            "(save_pretrained, or state_dict) and load the model where it is needed"
        )


class DistributedCausalLM(RemoteGeneration, DistributedModel):
    """Generates."""


class DistributedClassifier(DistributedModel):
    """Fetches one position per sample: the last real token, by Hugging Face's rule."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(self.forward).bind_partial(*args, **kwargs).arguments
        rows, length = self._last_tokens(
            given.get("input_ids"), given.get("inputs_embeds"), given.get("attention_mask")
        )
        with reading(self, self.score, rows, shape=(len(rows), length)):  # type: ignore[attr-defined]
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def _last_tokens(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, int]:
        """Indices [B] into B·S of the rightmost token that is not padding, and S.

        Raises:
            UnsupportedInputError: the mask declares that token padding, though it is not `pad_token_id`, by which
                Hugging Face finds it; or a batch has no `pad_token_id`.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None:
            raise ConfigurationError("give input_ids or inputs_embeds")
        batch, length = tokens.shape[:2]
        pad = self.config.get_text_config().pad_token_id  # type: ignore[attr-defined]
        if pad is None and batch > 1:
            raise UnsupportedInputError(
                f"{batch} samples at once, and the config has no pad_token_id that marks where each ends: set it, e.g. "
                "from_pretrained(…, pad_token_id=tokenizer.pad_token_id)"
            )
        if input_ids is None or pad is None:
            last = torch.full((batch,), length - 1, device=tokens.device)
        else:
            positions = torch.arange(length, device=tokens.device)
            last = (positions * (input_ids != pad)).argmax(-1)
        if attention_mask is not None and attention_mask.ndim == 2:
            padded = attention_mask.to(last.device).gather(1, last[:, None])[:, 0] == 0
            if padded.any():
                raise UnsupportedInputError(
                    f"attention_mask: sample {int(padded.nonzero()[0, 0])} would be classified at a position that is "
                    f"masked out. Pad with config.pad_token_id, which is {pad}, and give input_ids"
                )
        return torch.arange(batch, device=tokens.device) * length + last, length


class AutoDistributedConfig:
    """`from_pretrained` returns the model's own config, with `dht_prefix` added."""

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | Path,
        *,
        dht_prefix: str | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
    ) -> PreTrainedConfig:
        """Raises CheckpointError, UnsupportedModelError, or ConfigurationError (a local folder without dht_prefix)."""
        checkpoint = Checkpoint(str(pretrained_model_name_or_path), token=token, revision=revision)
        return _config_with_prefix(checkpoint, dht_prefix)


class _AutoDistributed:
    auto_class: Any
    mixin: type[DistributedModel] = DistributedModel

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        initial_peers: str | Sequence[str] | None = None,
        dht: hivemind.DHT | None = None,
        node: SwarmNode | None = None,
        dht_prefix: str | None = None,
        tuning_mode: TuningMode | None = None,
        pre_seq_len: int | None = None,
        prompt_init: PromptInit = "random",
        prompt_init_text: str | None = None,
        lora: Any = None,
        prompts: str | Path | None = None,
        adapter: str | Path | None = None,
        active_adapter: str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
        client_config: ClientConfig | None = None,
        **options: Any,
    ) -> Any:
        """Loads embeddings, norms and head, and connects to servers of the blocks.

        Args:
            pretrained_model_name_or_path: folder or hub id of a model, or of a tuned model that `save_pretrained`
                wrote. Only tensors outside of the blocks are read.
            initial_peers: multiaddresses of the swarm; or `dht`: a running hivemind.DHT in it; or `node`: a started
                SwarmNode, which the caller closes. None of the three means the public Petals network.
            dht_prefix: the model's name in the swarm; derived for hub ids, needed for folders.
            tuning_mode, pre_seq_len: None, "ptune", "deep_ptune" or "prefix" (keys and values for every block), and the
                number of virtual tokens; or "lora".
            prompt_init, prompt_init_text: the start of prompts: "random", "vocabulary" (the embeddings of tokens that
                are drawn), or "text" (those of this text, cut or repeated to P tokens); of a prefix also "zero".
            lora: a `peft.LoraConfig`, or a mapping with its names, for LoRA alone ("lora") or beside prompts.
            prompts: folder (`save_prompts`) or hub id of tuned prompts, which determine mode and number.
            adapter: folder or hub id of LoRA in PEFT's format, which determines `lora`.
            active_adapter: LoRA that acts without being trained: the name of one that servers hold, or a folder in
                PEFT's format, whose values are sent to servers that do not hold it.
            dtype (or torch_dtype): of the part loaded here; "auto", the default, is the checkpoint's dtype.
            token, revision, cache_dir, local_files_only, subfolder: as in transformers.
            client_config: how to find and treat servers.
            options: fields of `ClientConfig` by name, e.g. `audit_rate=0.05`, which override those of `client_config`
                (None keeps the default); and values to set on the model's config, e.g. `num_labels`, `pad_token_id`.

        Returns:
            An instance of the family's own class and of `DistributedModel`: a context manager. `close`, or the
            garbage collector, ends its connections. Only prompts, LoRA and a classification head require
            gradients.

        Raises:
            ConfigurationError: more than one way into a swarm, an unknown argument, or a value out of range.
            CheckpointError, UnsupportedModelError: the model cannot be read, or is not a decoder.
            SwarmConnectionError: no initial peer answers.
            NoServersError, IncompatibleServerError: blocks are missing, or another model is served under this name.
            AccessDeniedError: every server that holds some block refuses this peer.
        """
        name = str(pretrained_model_name_or_path)
        hub: dict[str, Any] = {"cache_dir": cache_dir, "local_files_only": local_files_only}
        card = find_card(name, revision=revision, token=token, subfolder=subfolder, **hub)
        if card is not None:
            tuning_mode, pre_seq_len, revision = card.tuning_mode, card.pre_seq_len, card.revision
            name, dht_prefix, subfolder = card.base_model, dht_prefix or card.dht_prefix, ""
            if card.id2label is not None:
                options.setdefault("id2label", {int(number): label for number, label in card.id2label.items()})
        elif (base := base_model_of(name, revision=revision, token=token, subfolder=subfolder, **hub)) is not None:
            name, adapter, revision, subfolder = base, adapter or name, None, ""
        tuning_mode, pre_seq_len = tuning_of(prompts, tuning_mode, pre_seq_len, token=token)
        if adapter is not None:
            tuning_mode, lora = tuning_mode or "lora", adapter_settings(adapter, lora, token=token)
        loads_prompts = card is not None or prompts is not None
        check_start(prompt_init, prompt_init_text, tuning_mode, loads_prompts=loads_prompts)
        lora_config = lora_settings(tuning_mode, lora)
        of_client = {each.name for each in options_of(ClientConfig)}
        given = {key: options.pop(key) for key in of_client & options.keys()}
        client_config = make(ClientConfig, given, client_config)
        checkpoint = Checkpoint(name, token=token, revision=revision, subfolder=subfolder, **hub)
        overrides = config_overrides(
            checkpoint.decoder_config, options, {*inspect.signature(cls.from_pretrained).parameters, *of_client}
        )
        model_config = _config_with_prefix(checkpoint, dht_prefix)
        if prompts is not None:
            check_base_model(PromptCard.read(prompts, token=token), checkpoint, prompts)  # before anything is loaded
        start = PromptStart.read(prompt_init, prompt_init_text, pre_seq_len, checkpoint)
        family = model_class(cls.auto_class, checkpoint)
        with torch.random.fork_rng(devices=[]):  # loading must not advance the generator that draws initial values
            model, layout, fresh = load_pruned(
                family,
                checkpoint,
                ModelSlice(0, 0, with_embeddings_and_head=True),
                dtype=dtype or torch_dtype or "auto",
                config_overrides={**overrides, "dht_prefix": model_config.dht_prefix},
                mixin=cls.mixin,
                may_miss=has_head_of_its_own(family),
            )
        if model.can_generate() and checkpoint.generation_config is not None:
            model.generation_config = checkpoint.generation_config
        beyond_petals = shapes = None
        if tuning_mode == "prefix":
            shapes, beyond_petals = past_shapes(model, layout, outline_blocks(family, checkpoint)[0]), "trained prefix"
        if lora_config is not None:
            find_targets(lora_config, layout)  # a wrong name shows before servers are sought
            beyond_petals = "LoRA"
        active = None
        if active_adapter is not None:
            active = find_active_adapter(active_adapter, layout, num_blocks(model.config), needs_copy=False)
        swarm: dict[str, Any] = {"node": node, "dht": dht, "initial_peers": initial_peers}
        layers = _connect(model, checkpoint, client_config, beyond_petals=beyond_petals, active_adapter=active, **swarm)
        try:
            drawn = parameters_to_draw(model, checkpoint, fresh)
            tokens = attach_trainable(model, layout, tuning_mode, pre_seq_len, lora_config, drawn, start, shapes)
            bridge = DecoderBridge(model, layout, layers, active)
            _assemble(model, family, checkpoint, bridge)
            if tokens is not None:
                bridge.past_after(tokens)
        except BaseException:
            layers.close()
            raise
        if prompts is not None:
            load_prompts(model, prompts, token=token)
        if adapter is not None:
            load_adapter(model, adapter, token=token)
        elif card is not None:
            load_tuned(model, pretrained_model_name_or_path, token=token)
        return model


class AutoDistributedModel(_AutoDistributed):
    """The bare decoder, as `transformers.AutoModel`."""

    auto_class = AutoModel


class AutoDistributedModelForCausalLM(_AutoDistributed):
    """With a language-model head, as `transformers.AutoModelForCausalLM`."""

    auto_class = AutoModelForCausalLM
    mixin = DistributedCausalLM


class AutoDistributedModelForSequenceClassification(_AutoDistributed):
    """With a fresh, trainable classification head, as `transformers.AutoModelForSequenceClassification`."""

    auto_class = AutoModelForSequenceClassification
    mixin = DistributedClassifier


def remote_blocks(model: torch.nn.Module) -> RemoteSequential | Any:
    """The remote blocks of a model, or None if the model is local."""
    return next((module for module in model.modules() if isinstance(module, RemoteSequential)), None)


def _config_with_prefix(checkpoint: Checkpoint, dht_prefix: str | None) -> PreTrainedConfig:
    config = checkpoint.config
    prefix = dht_prefix or getattr(config, "dht_prefix", None)
    if prefix is None:
        prefix = derive_dht_prefix(checkpoint.name_or_path, config.model_type, is_local=checkpoint.is_local)
    config.dht_prefix = check_dht_prefix(prefix)
    return config


def _connect(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    config: ClientConfig,
    *,
    beyond_petals: str | None,
    active_adapter: Adapter | None,
    node: SwarmNode | None,
    dht: hivemind.DHT | None,
    initial_peers: str | Sequence[str] | None,
) -> RemoteSequential:
    if sum(given is not None for given in (node, dht, initial_peers)) > 1 or initial_peers == []:
        raise ConfigurationError(
            "give one way into the swarm: initial_peers=[address that `petals-lightning serve` or `bootstrap` prints], "
            "or dht=hivemind.DHT(…), or node=SwarmNode(…), or none of them for the public Petals network"
        )
    if node is not None and config.identity_path is not None:
        raise ConfigurationError(
            "identity_path: the given node already has its identity; give SwarmNode(identity_path=…)"
        )
    owns_node = node is None
    gc.collect()  # models no longer in use may hold streams, and a server grants each client only a few
    if node is None and dht is None and initial_peers is None:
        initial_peers = PUBLIC_INITIAL_PEERS
        logger.warning("no initial_peers given, so this is %s (initial_peers=[…])", PUBLIC_NOTICE)
    if node is None:
        # A new peer joins through the caller's DHT process, because its daemon's handlers belong to that process.
        peers = [str(maddr) for maddr in dht.get_visible_maddrs()] if dht is not None else initial_peers or ""
        node = SwarmNode(
            peers,
            host_maddrs=(),
            identity_path=config.identity_path,
            client_mode=True,
            connect_timeout=max(config.connect_timeout, 5.0),
        ).start()
    limit = rotary_limit(model.config)
    knows_all = active_adapter is None or active_adapter.fingerprint is not None  # else only servers can compute it
    try:
        return RemoteSequential.connect(
            node,
            dht_prefix=model.config.dht_prefix,
            num_blocks=num_blocks(model.config),
            hidden_size=model.config.get_text_config().hidden_size,
            fingerprint=checkpoint.fingerprint,
            config=config,
            owns_node=owns_node,
            rotary_switch=limit.positions if limit is not None and limit.has_one_long_form else None,
            sliding_window=sliding_window(model.config),
            beyond_petals=beyond_petals,
            active_adapter=active_adapter,
            judge=LocalJudge(checkpoint) if knows_all else None,
        )
    except BaseException:
        if owns_node:
            node.close()
        raise


def _assemble(model: Any, family: type[PreTrainedModel], checkpoint: Checkpoint, bridge: DecoderBridge) -> None:
    model.checkpoint, model.bridge, model.max_positions = checkpoint, bridge, bridge.max_positions
    check_ends(model, bridge, family)


def _with_signature_of(replaced: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """`own` with the signature of the family's method that it replaces, because transformers inspects it."""

    @functools.wraps(replaced)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    return method
