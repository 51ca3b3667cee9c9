"""Settings of LoRA, with PEFT's names and meanings; PEFT itself is not needed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from petals_lightning.errors import ConfigurationError

ALL_LINEAR = "all-linear"
HEADS = {"score", "classifier"}  # a classification head is trained here anyway
_WITHOUT_EFFECT = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "fan_in_fan_out", "runtime_config", "megatron_core", "qalora_group_size", "layers_pattern",
}  # fmt: skip
"""Settings of PEFT that say what an adapter is for, or that have no meaning without others."""
_USUAL = {"bias": "none", "init_lora_weights": True, "layers_to_transform": None}
"""Settings of PEFT for which an empty value would be another one than the default."""


@dataclass(frozen=True)
class LoraConfig:
    """Which linear modules get LoRA, with the names of `peft.LoraConfig`.

    Args:
        r: the rank.
        lora_alpha: the product of the factors is scaled by lora_alpha / r.
        target_modules: names of linear modules, or ends of their paths; or one regular expression for whole paths; or
            "all-linear": those of all blocks.
        use_rslora: scale by lora_alpha / √r.

    Raises:
        ConfigurationError: a value is out of range.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: tuple[str, ...] | str = ()
    use_rslora: bool = False

    def __post_init__(self) -> None:
        targets = self.target_modules
        object.__setattr__(self, "target_modules", targets if isinstance(targets, str) else tuple(sorted(targets)))
        if type(self.r) is not int or self.r < 1:
            raise ConfigurationError(f"LoRA: r is {self.r!r}, the rank is a whole number above 0, e.g. 8")
        if not self.target_modules:
            raise ConfigurationError(
                "LoRA: target_modules is empty; name linear modules of the blocks, e.g. ['q_proj', 'v_proj'], or take "
                f"{ALL_LINEAR!r}"
            )

    @classmethod
    def of(cls, given: Any) -> LoraConfig:
        """The settings in a `peft.LoraConfig`, a mapping with its names, or one of these.

        Raises:
            ConfigurationError: a setting is not supported here. The message names it.
        """
        if isinstance(given, cls):
            return given
        if dataclasses.is_dataclass(given) and not isinstance(given, type):
            settings = {each.name: getattr(given, each.name) for each in dataclasses.fields(given)}
        elif isinstance(given, Mapping):
            settings = dict(given)
        else:
            raise ConfigurationError(f"lora is {given!r:.60}: give a peft.LoraConfig, or a mapping with its names")
        own = {name: settings.pop(name) for name in cls.__dataclass_fields__ if name in settings}
        if settings.get("lora_dropout"):
            raise ConfigurationError(
                f"LoRA: lora_dropout is {settings['lora_dropout']}, and must be 0: servers and a local run would drop "
                "other values"
            )
        if (kind := getattr(settings.get("peft_type"), "value", settings.get("peft_type"))) not in (None, "LORA"):
            raise ConfigurationError(f"LoRA: peft_type is {kind!r}, only LORA is supported")
        for name, value in settings.items():
            if name in _USUAL:
                is_usual = value == _USUAL[name]
            else:
                is_head = name == "modules_to_save" and set(value or ()) <= HEADS
                is_usual = not value or name in _WITHOUT_EFFECT or is_head
            if not is_usual:
                raise ConfigurationError(
                    f"LoRA: {name} is {value!r:.60}, which is not supported: set only "
                    f"{', '.join(cls.__dataclass_fields__)}"
                )
        if own.get("target_modules") is None:
            own["target_modules"] = ()
        return cls(**own)

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
