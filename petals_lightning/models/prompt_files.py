"""Saved tuned weights: a folder with their values, and a card that says which model they are for.

    prompts.safetensors   `input` [P, E], with deep_ptune also `deep` [L, P, H]; with prefix instead `past.0.keys` and
                          `past.0.values` [m, h, P, D] of m blocks with h heads, `past.1…` of blocks of another shape
    prompts.json          the card, for programs
    README.md             the card, for people and the hub
    model.safetensors     by `save_tuned` only: everything that was trained, including a head, by parameter name

Prompts of ptune and prefix are also written and read in PEFT's format:

    adapter_config.json         the settings, with the names of PEFT's `PromptTuningConfig` or `PrefixTuningConfig`
    adapter_model.safetensors   `prompt_embeddings`: [P, E], or [P, L·2·h·D], keys before values of each block

Shapes: P virtual tokens, E embedding width, L blocks, H hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from petals_lightning import __version__
from petals_lightning.errors import CheckpointError, ConfigurationError
from petals_lightning.hf import Checkpoint
from petals_lightning.hf.checkpoint import find_saved
from petals_lightning.hf.compat import find_file
from petals_lightning.models.prompts import Prompts, TuningMode, check_tuning
from petals_lightning.models.trainable import prompts_of, trainable_state_dict

PEFT_CONFIG, PEFT_WEIGHTS, PEFT_TENSOR = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
_PEFT_TYPES: dict[str, TuningMode] = {"PROMPT_TUNING": "ptune", "PREFIX_TUNING": "prefix"}
WEIGHTS, CARD, README, TRAINED = "prompts.safetensors", "prompts.json", "README.md", "model.safetensors"
THIS_FOLDER = "THIS_FOLDER"  # in the README, until it has a repository on the hub


@dataclass(frozen=True)
class PromptCard:
    """The description of saved prompts.

    Attributes:
        base_model, revision: hub id or folder of the model for which they were trained.
        fingerprint: digest of that model's config and tensor names; prompts fit no other model. None: PEFT has written
            them, which notes none.
        tuning_mode, pre_seq_len: "ptune", "deep_ptune" or "prefix", and P; None if only a head was tuned.
        dht_prefix: the name of that model's blocks in the swarm; None: derived from `base_model`.
        id2label: names of a head's classes by number, as in Hugging Face's configs; None without a head.
        metrics: metrics reached, by name, e.g. {"val/perplexity": 21.3}.
        command: the command that trained them.
        version: of this package.
    """

    base_model: str
    revision: str | None
    fingerprint: str | None
    tuning_mode: TuningMode | None
    pre_seq_len: int | None
    dht_prefix: str | None = None
    id2label: dict[str, str] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    command: str | None = None
    version: str = __version__

    @classmethod
    def read(cls, source: str | Path, *, token: str | bool | None = None) -> PromptCard:
        """The card of a folder, or of a repository on the hub; of PEFT's prompts, what their config says.

        Raises:
            CheckpointError: there is no card, or this version cannot read it.
            ConfigurationError: PEFT's prompts are of a kind that is not supported here.
        """
        if (config := _peft_config(source, token)) is not None:
            return cls(
                base_model=str(config.get("base_model_name_or_path")),
                revision=config.get("revision"),
                fingerprint=None,
                tuning_mode=_PEFT_TYPES[config["peft_type"]],
                pre_seq_len=config.get("num_virtual_tokens"),
            )
        path = _find(source, CARD, token)
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            card = cls(**{name: known[name] for name in cls.__dataclass_fields__ if name in known})
            check_tuning(card.tuning_mode, card.pre_seq_len)
        except (ValueError, TypeError) as e:
            raise CheckpointError(f"{path} is not a card of prompts ({e}): it must be written by save_prompts") from e
        return card


def save_prompts(
    model: nn.Module, folder: str | Path, *, metrics: Mapping[str, float] | None = None, command: str | None = None
) -> PromptCard:
    """Writes a tuned model's prompts and their card into `folder`, which is created if missing.

    Args:
        model: local or distributed, loaded with `tuning_mode`.
        metrics: metrics of the prompts, for the card.
        command: the command that trained them, for the card.

    Raises:
        ConfigurationError: the model has no prompts.
    """
    prompts = _prompts(model)
    rounded = {name: round(float(value), 6) for name, value in (metrics or {}).items()}
    card = _write_card(model, prompts, Path(folder), metrics=rounded, command=command)
    _save(prompts.state_dict(), Path(folder) / WEIGHTS)
    return card


def save_tuned(model: nn.Module, folder: str | Path) -> PromptCard:
    """Writes a model's trained weights (prompts and head) and their card into `folder`, created if missing.

    `from_pretrained(folder)` loads the base model with them; `prompts=folder` takes the prompts only.

    Raises:
        ConfigurationError: the model has no trained weights.
    """
    trained, prompts = trainable_state_dict(model), prompts_of(model)
    if not trained:
        raise ConfigurationError(
            f"{type(model).__name__} has nothing of its own to save: its weights are those of "
            f"{_checkpoint(model).name_or_path!r}; load it with tuning_mode='ptune', 'deep_ptune' or 'prefix' to train "
            "prompts"
        )
    card = _write_card(model, prompts, Path(folder), id2label=_class_names(model, trained))
    _save(trained, Path(folder) / TRAINED)
    if prompts is not None:
        _save(prompts.state_dict(), Path(folder) / WEIGHTS)
    return card


def load_tuned(model: nn.Module, folder: str | Path, *, token: str | bool | None = None) -> None:
    """Loads what `save_tuned` wrote, from a folder or the hub, into its base model with the card's settings.

    Raises:
        CheckpointError: the weights are for another model, or other settings.
    """
    card, path = PromptCard.read(folder, token=token), _find(folder, TRAINED, token)
    check_base_model(card, _checkpoint(model), folder)
    saved, expected = load_file(path), trainable_state_dict(model)
    if {name: value.shape for name, value in saved.items()} != {name: value.shape for name, value in expected.items()}:
        wrong = sorted(set(saved) ^ set(expected)) or sorted(expected)
        raise CheckpointError(
            f"{path} does not hold what this model trains: {', '.join(wrong[:5])} differ; load it by the class and "
            "with the settings that it was saved from"
        )
    model.load_state_dict(saved, strict=False)


def find_card(source: str | Path, **hub: Any) -> PromptCard | None:
    """The card of a folder or hub repository that `save_tuned` wrote; None if `source` is a plain model."""
    try:
        has_config = (find_file(str(source), "config.json", **hub)) is not None
        card = None if has_config else find_file(str(source), TRAINED, **hub) and find_file(str(source), CARD, **hub)
    except (OSError, ValueError):
        return None  # loading reports what is wrong
    return PromptCard.read(source, token=hub.get("token")) if card else None


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)


def _class_names(model: nn.Module, trained: Mapping[str, torch.Tensor]) -> dict[str, str] | None:
    """The names of a head's classes, if a head was trained."""
    if all(".prompts." in f".{name}" for name in trained):
        return None
    id2label: dict[int, str] = model.config.id2label  # type: ignore[union-attr, assignment]
    return {str(number): name for number, name in id2label.items()}


def _write_card(model: nn.Module, prompts: Prompts | None, folder: Path, **known: Any) -> PromptCard:
    checkpoint = _checkpoint(model)
    card = PromptCard(
        base_model=checkpoint.name_or_path,
        revision=checkpoint.revision,
        fingerprint=checkpoint.fingerprint,
        tuning_mode=prompts.tuning_mode if prompts is not None else None,
        pre_seq_len=prompts.pre_seq_len if prompts is not None else None,
        dht_prefix=getattr(model.config, "dht_prefix", None) if checkpoint.is_local else None,
        **known,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).write_text(json.dumps(asdict(card), indent=2) + "\n", encoding="utf-8")
    (folder / README).write_text(_readme(card, checkpoint), encoding="utf-8")
    return card


def load_prompts(model: nn.Module, source: str | Path, *, token: str | bool | None = None) -> PromptCard:
    """Loads prompts from a folder, or a repository on the hub, into a model that has prompts of the same kind.

    Args:
        model: loaded with prompts of the same mode and length.
        source: folder or hub id.
        token: for private repositories on the hub; None uses the login of this machine.

    Raises:
        CheckpointError: there are no prompts, or they are for another model.
        ConfigurationError: the model's prompts have another mode or length.
    """
    prompts, checkpoint, card = _prompts(model, source), _checkpoint(model), PromptCard.read(source, token=token)
    check_base_model(card, checkpoint, source)
    if (card.tuning_mode, card.pre_seq_len) != (prompts.tuning_mode, prompts.pre_seq_len):
        raise ConfigurationError(
            f"prompts {str(source)!r} are {card.tuning_mode} with pre_seq_len={card.pre_seq_len}, the model has "
            f"{prompts.tuning_mode} with pre_seq_len={prompts.pre_seq_len}: load the model with prompts={str(source)!r}"
        )
    is_peft = card.fingerprint is None
    path = _find(source, PEFT_WEIGHTS if is_peft else WEIGHTS, token)
    try:
        tensors = load_file(path)
        if not is_peft:
            prompts.load_state_dict(tensors)
        elif prompts.past is None:
            prompts.load_state_dict({"input": tensors[PEFT_TENSOR]})
        else:
            prompts.set_flat_past(tensors[PEFT_TENSOR])
    except (SafetensorError, RuntimeError, KeyError) as e:
        raise CheckpointError(f"{path} does not hold what its card says: {str(e).splitlines()[0]}") from e
    return card


def tuning_of(
    source: str | Path | None,
    tuning_mode: TuningMode | None,
    pre_seq_len: int | None,
    *,
    token: str | bool | None = None,
) -> tuple[TuningMode | None, int | None]:
    """Mode and P to load a model with: those of saved prompts, if any. Given values must not contradict them.

    Raises:
        ConfigurationError: unknown mode, `pre_seq_len` below 1, or a contradiction.
        CheckpointError: there are no prompts at `source`.
    """
    if source is None:
        check_tuning(tuning_mode, pre_seq_len)
        return tuning_mode, pre_seq_len
    card = PromptCard.read(source, token=token)
    if card.tuning_mode is None:
        raise ConfigurationError(
            f"{str(source)!r} holds a classification head and no prompts: pass it instead of the model's name"
        )
    if tuning_mode not in (None, card.tuning_mode) or pre_seq_len not in (None, card.pre_seq_len):
        raise ConfigurationError(
            f"prompts {str(source)!r} are {card.tuning_mode} with pre_seq_len={card.pre_seq_len}, but "
            f"tuning_mode={tuning_mode}, pre_seq_len={pre_seq_len} were given: leave both off"
        )
    return card.tuning_mode, card.pre_seq_len


def check_base_model(card: PromptCard, checkpoint: Checkpoint, source: str | Path) -> None:
    """Raises CheckpointError if prompts are for another model than `checkpoint`."""
    if card.fingerprint not in (None, checkpoint.fingerprint):
        raise CheckpointError(
            f"prompts {str(source)!r} were trained for {card.base_model!r}, not for {checkpoint.name_or_path!r}: their "
            "config or tensor names differ. Load that model, or train prompts for this one"
        )


def export_peft(model: nn.Module, folder: str | Path) -> None:
    """Writes ptune or prefix prompts as an adapter that PEFT loads: `PeftModel.from_pretrained(local_model, folder)`.

    Raises:
        ConfigurationError: the model has no prompts, is not a causal language model, or was tuned with deep_ptune, for
            which PEFT has no format (its prefix tuning has keys and values, and adds nothing to hidden states); or a
            prefix's keys and values differ in shape, among themselves or from block to block.
    """
    prompts, checkpoint = _prompts(model), _checkpoint(model)
    if prompts.tuning_mode == "deep_ptune":
        raise ConfigurationError("tuning_mode is 'deep_ptune': PEFT has a format for ptune and prefix prompts only")
    if not getattr(model, "can_generate", lambda: False)():
        raise ConfigurationError(f"{type(model).__name__} is not a causal language model: PEFT has no format for it")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text_config = checkpoint.config.get_text_config()
    config = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": checkpoint.name_or_path,
        "revision": checkpoint.revision,
        "inference_mode": True,
        "num_virtual_tokens": prompts.pre_seq_len,
        "num_transformer_submodules": 1,
        "num_layers": text_config.num_hidden_layers,
    }
    if prompts.input is not None:
        tensor, heads = prompts.input.detach(), text_config.num_attention_heads
        config |= {"peft_type": "PROMPT_TUNING", "token_dim": tensor.shape[1], "prompt_tuning_init": "RANDOM"}
    else:
        shapes = {tensor.shape for pair in prompts.past_by_block() for tensor in pair}
        if len(shapes) > 1:
            raise ConfigurationError(
                f"keys and values are {', '.join(str(tuple(shape)) for shape in sorted(shapes))}: PEFT's format needs "
                "one shape for all"
            )
        tensor, (heads, _, size) = prompts.flat_past(), shapes.pop()
        config |= {"peft_type": "PREFIX_TUNING", "token_dim": heads * size, "prefix_projection": False}
    config["num_attention_heads"] = heads
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _save({PEFT_TENSOR: tensor}, folder / PEFT_WEIGHTS)


def _prompts(model: nn.Module, source: str | Path = "DIR") -> Prompts:
    prompts = prompts_of(model)
    if prompts is None:
        raise ConfigurationError(
            f"{type(model).__name__} has no prompts: load it with tuning_mode='ptune', 'deep_ptune' or 'prefix' to "
            f"train some, or with prompts={str(source)!r} to use saved ones"
        )
    return prompts


def _checkpoint(model: nn.Module) -> Checkpoint:
    checkpoint = getattr(model, "checkpoint", None)
    assert isinstance(checkpoint, Checkpoint), "set by from_pretrained of local and distributed models"
    return checkpoint


def _peft_config(source: str | Path, token: str | bool | None) -> dict[str, Any] | None:
    """The config of prompts in PEFT's format, if `source` has these and no card of ours.

    Raises:
        ConfigurationError: it is an adapter of another kind.
    """
    try:
        path = find_file(str(source), PEFT_CONFIG, token=token)
        if path is None or find_file(str(source), CARD, token=token) is not None:
            return None
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # reading the card reports what is wrong
    kind = config.get("peft_type")
    if kind not in _PEFT_TYPES or config.get("prefix_projection"):
        what = "PREFIX_TUNING with prefix_projection" if config.get("prefix_projection") else kind
        raise ConfigurationError(
            f"{str(source)!r} is PEFT's {what}: prompts are {', '.join(_PEFT_TYPES)} without a projection"
            + ("; give adapter= for LoRA" if kind == "LORA" else "")
        )
    return config


def _find(source: str | Path, name: str, token: str | bool | None) -> Path:
    return find_saved(source, name, what="prompts", writers="save_prompts", token=token)


def _readme(card: PromptCard, checkpoint: Checkpoint) -> str:
    prompts = f"{card.tuning_mode} prompts, {card.pre_seq_len} virtual tokens" if card.tuning_mode else ""
    head = f"a classification head ({', '.join(card.id2label.values())})" if card.id2label else ""
    what = " and ".join(filter(None, [prompts, head]))
    if card.id2label:
        use = [
            "Classify with it:",
            "",
            f'    AutoDistributedModelForSequenceClassification.from_pretrained("{THIS_FOLDER}")',
        ]
    else:
        chat = f"petals-lightning chat {card.base_model} --prompts {THIS_FOLDER} --initial-peers …"
        use = ["Talk to the model with them:", "", f"    {chat}"]
    metadata = {"library_name": "petals-lightning", "tags": ["prompt-tuning"]}
    return model_card("Prompts", what, use, metadata, checkpoint, metrics=card.metrics, command=card.command)


def model_card(
    title: str,
    what: str,
    use: Sequence[str],
    metadata: Mapping[str, Any],
    checkpoint: Checkpoint,
    *,
    metrics: Mapping[str, float] | None,
    command: str | None,
) -> str:
    """The README.md of something that was trained for a model, as the hub shows it.

    Args:
        title, what: what it is.
        use: lines that say how to use it.
        metadata: the hub's; the model is added to it.
        checkpoint: the model.
        metrics, command: how good it is, and what trained it, if known.
    """
    if not checkpoint.is_local:  # the hub refuses cards whose base model is not on the hub
        metadata = {**metadata, "base_model": checkpoint.name_or_path}
    rows = [f"| {name} | {value:g} |" for name, value in (metrics or {}).items()]
    revision = f" at revision `{checkpoint.revision}`" if checkpoint.revision else ""
    lines = ["---", *(f"{name}: {json.dumps(value)}" for name, value in metadata.items()), "---", f"# {title}", ""]
    lines += [f"{what}, for `{checkpoint.name_or_path}`{revision}."]
    lines += ["", "| metric | value |", "|---|---|", *rows] if rows else []
    lines += ["", "Made by", "", f"    {command}"] if command else []
    return "\n".join([*lines, "", *use, ""])
