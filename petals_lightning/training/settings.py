"""Maps settings of a run to arguments of classes, and translates errors from arguments to settings."""

from __future__ import annotations

import re

from omegaconf import DictConfig

OF_MODULES = {
    "model_name": "model.name",
    "dtype": "model.dtype",
    "revision": "model.revision",
    "dht_prefix": "model.dht_prefix",
    "tuning_mode": "tuning.mode",
    "pre_seq_len": "tuning.pre_seq_len",
    "prompt_init": "tuning.init",
    "prompt_init_text": "tuning.init_text",
    "keep_first": "tuning.keep_first",
    "r": "tuning.r",
    "alpha": "tuning.alpha",
    "target_modules": "tuning.target_modules",
    "use_rslora": "tuning.use_rslora",
    "adapter": "tuning.adapter",
    "active_adapter": "tuning.active_adapter",
    "lr": "optim.lr",
    "head_lr": "optim.head_lr",
    "deep_lr": "optim.deep_lr",
    "weight_decay": "optim.weight_decay",
    "warmup_ratio": "optim.warmup_ratio",
}
"""Arguments of every module, and the settings that they take."""
OF_DATA = {"tokenizer": "model.name", "tokenizer_revision": "model.revision", "seed": "seed"}
"""Arguments of every DataModule besides its own group of settings."""
_OF_TASKS = ("verbalizer", "beta", "teacher", "teacher_dht_prefix", "temperature", "top_k", "share")
_OTHERS = {name: f"task.{name}" for name in _OF_TASKS} | {"precision": "amp.precision", "path": "hydra.run.dir"}
_GROUPS = ("trainer", "swarm", "data")
"""Their settings become arguments of the same names."""

_ARGUMENT = re.compile(
    r"(?<![\w.'\"/-])([a-z_]+)"  # not within a path, an option, or what is quoted of a user's data
    r"(?:(=)((?:None|True|False)\b|\{[^{}]*\})?|(?![\w'\"/]|\.\w))"
)
_NONE = re.compile(r"(?<![\w'\"])None(?![\w'\"])")


def in_words_of_settings(message: str, cfg: DictConfig) -> str:
    """Translates an error that names arguments and Python values to settings of `cfg` and YAML values.

    Arguments are recognised by an underscore in their name, or by a value: `lr=0`.
    """
    keys = {name: f"{group}.{name}" for group in _GROUPS for name in cfg.get(group) or () if name[0] != "_"}
    keys |= _OTHERS | OF_DATA | OF_MODULES

    def written(found: re.Match[str]) -> str:
        name, equals, value = found[1], found[2] or "", found[3] or ""
        if name not in keys or ("_" not in name and not equals):
            return found[0]
        if value.startswith("{"):  # in quotes for the shell
            return f'"{keys[name]}={value.replace(chr(39), "").replace(": ", ":")}"'
        return keys[name] + equals + {"None": "null", "True": "true", "False": "false"}.get(value, value)

    translated = _ARGUMENT.sub(written, message)
    return _NONE.sub("null", translated) if translated != message else message
