"""LoRA in PEFT's format: folders that `peft.PeftModel.from_pretrained(local_model, folder)` loads, or that PEFT wrote.

`hf.adapter_files` says what is in them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from petals_lightning.errors import CheckpointError, ConfigurationError
from petals_lightning.hf import Checkpoint
from petals_lightning.hf.adapter_files import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    adapter_name,
    find_adapter_file,
    read_adapter,
    read_config,
    read_settings,
)
from petals_lightning.hf.compat import find_file
from petals_lightning.hf.lora import LoraConfig
from petals_lightning.hf.pruning import BlockLayout
from petals_lightning.models.lora import Lora
from petals_lightning.models.prompt_files import README, THIS_FOLDER, model_card
from petals_lightning.models.trainable import head_parameters, lora_of
from petals_lightning.protocol.adapters import Adapter


def save_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    metrics: Mapping[str, float] | None = None,
    command: str | None = None,
) -> None:
    """Writes a model's LoRA, its head if it has one, and a card into `folder`, which is created if missing.

    Args:
        model: local or distributed, loaded with `lora`.
        metrics: of the adapter, for the card.
        command: that trained it, for the card.

    Raises:
        ConfigurationError: the model has no LoRA, or PEFT would load it into another class.
    """
    lora, checkpoint = lora_of(model), getattr(model, "checkpoint", None)
    if lora is None:
        raise ConfigurationError(f"{type(model).__name__} has no LoRA: load it with tuning_mode='lora' to train one")
    assert isinstance(checkpoint, Checkpoint), "set by from_pretrained of local and distributed models"
    if checkpoint.is_wrapper:
        raise ConfigurationError(
            f"{checkpoint.name_or_path!r} is multimodal, and only its text decoder is trained here: in the "
            "whole model, which PEFT would load, its modules have other names"
        )
    heads = head_parameters(model)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if heads else "CAUSAL_LM",
        "base_model_name_or_path": checkpoint.name_or_path,
        "revision": checkpoint.revision,
        "inference_mode": True,
        "r": lora.config.r,
        "lora_alpha": lora.config.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": lora.target_modules,
        "use_rslora": lora.config.use_rslora,
        "bias": "none",
        "modules_to_save": sorted({name.partition(".")[0] for name in heads}) or None,
    }
    tensors = {PREFIX + name: parameter for name, parameter in heads.items()}
    tensors |= {f"{PREFIX}{lora.list_path}.{name}.weight": factor for name, factor in lora.named_parameters()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    readme = _readme(lora, checkpoint, metrics, command, has_head=bool(heads))
    (folder / README).write_text(readme, encoding="utf-8")


def _readme(
    lora: Lora, checkpoint: Checkpoint, metrics: Mapping[str, float] | None, command: str | None, *, has_head: bool
) -> str:
    kind = "SequenceClassification" if has_head else "CausalLM"
    use = ["Load it:", "", f'    AutoDistributedModelFor{kind}.from_pretrained("{THIS_FOLDER}")']
    use += ["", f'    PeftModel.from_pretrained(AutoModelFor{kind}.from_pretrained(…), "{THIS_FOLDER}")']
    if not has_head:
        chat = f"petals-lightning chat {checkpoint.name_or_path} --adapter {THIS_FOLDER} --initial-peers …"
        use += ["", "Talk to the model with it:", "", f"    {chat}"]
    names = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    what = f"LoRA of rank {lora.config.r} ({names}){' and a classification head' if has_head else ''}"
    metadata = {"library_name": "peft", "tags": ["lora"]}
    return model_card("Adapter", what, use, metadata, checkpoint, metrics=metrics, command=command)


def adapter_settings(source: str | Path, given: Any = None, **hub: Any) -> LoraConfig:
    """The settings of an adapter, in a folder or a hub repository.

    Args:
        source: folder or hub id.
        given: other settings of the caller, of which there may be none.
        hub: as in transformers.

    Raises:
        CheckpointError: there is no adapter.
        ConfigurationError: a setting is not supported here, or settings are given twice.
    """
    if given is not None:
        raise ConfigurationError(f"lora and adapter={str(source)!r} are both given: leave lora off")
    return read_settings(source, **hub)


def base_model_of(source: str | Path, **hub: Any) -> str | None:
    """The model of an adapter's folder or hub repository; None if `source` is a plain model."""
    try:
        is_model = find_file(str(source), "config.json", **hub) is not None
        if is_model or find_file(str(source), CONFIG, **hub) is None:
            return None
    except (OSError, ValueError):
        return None  # loading reports what is wrong
    return read_config(source, **hub).get("base_model_name_or_path")


def load_adapter(model: PreTrainedModel, source: str | Path, **hub: Any) -> None:
    """Loads the factors of a folder or a hub repository, and its head, into a model with the same settings.

    Raises:
        CheckpointError: they are for another model or class, or there are more than these.
    """
    lora, path = lora_of(model), find_adapter_file(source, WEIGHTS, **hub)
    assert isinstance(lora, Lora), "the model was loaded with the adapter's settings"
    own: dict[str, torch.Tensor] = {f"{lora.list_path}.{name}.weight": each for name, each in lora.named_parameters()}
    own |= head_parameters(model)
    try:
        saved = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
    except SafetensorError as e:
        raise CheckpointError(f"{path} cannot be read: {str(e).splitlines()[0]}") from e
    for names, what in (
        (own.keys() - saved.keys(), "lacks"),
        (saved.keys() - own.keys(), "has, besides LoRA of the blocks,"),
        ({name for name in own.keys() & saved.keys() if own[name].shape != saved[name].shape}, "has other shapes of"),
    ):
        if names:
            raise CheckpointError(
                f"adapter {str(source)!r} does not fit this {type(model).__name__}: it {what} "
                f"{', '.join(sorted(names)[:3])}{' …' if len(names) > 3 else ''}"
            )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])


def find_active_adapter(
    source: str | Path, layout: BlockLayout, count: int, *, needs_copy: bool, **hub: Any
) -> Adapter:
    """An adapter that acts in a model without being trained there, and that servers may hold.

    Args:
        source: a name that servers announce, or a folder, whose values are then known here and can be sent.
        layout: of the whole model.
        count: its number of blocks.
        needs_copy: whether the values must be known here; a name is then looked up on the hub.
        hub: as in transformers.

    Raises:
        CheckpointError: the folder has no adapter, or one for another model.
        ConfigurationError: a setting of it is not supported here.
    """
    if not needs_copy and not Path(source).is_dir():
        return Adapter(0, count, name=adapter_name(source))
    adapter = read_adapter(source, layout, count, 0, count, **hub)
    for factors in adapter.lora:
        for block in factors.blocks:
            path = f"{layout.list_path}.{block}.{factors.target}"
            given, own = (factors.a.shape[2], factors.b.shape[1]), layout.linears.get(path)
            if given != own:
                raise CheckpointError(
                    f"adapter {str(source)!r} does not fit this model: {path} has inputs and outputs {given} there, "
                    f"{own} here"
                )
    return adapter
