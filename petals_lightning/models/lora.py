"""LoRA: low-rank matrices that are trained beside the frozen linear modules of the blocks.

Settings, initial values and the order in which they are drawn are PEFT's, so that one seed gives PEFT's start; PEFT
itself is not needed.

Shapes: r rank, K inputs and O outputs of a linear.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from petals_lightning.errors import ConfigurationError
from petals_lightning.hf.compat import is_bypassed
from petals_lightning.hf.linears import add_low_rank
from petals_lightning.hf.lora import ALL_LINEAR, LoraConfig
from petals_lightning.hf.pruning import BlockLayout
from petals_lightning.protocol.adapters import LoraFactors


def lora_settings(tuning_mode: str | None, given: Any) -> LoraConfig | None:
    """The LoRA of a model that is loaded with this mode; None if it has none.

    Raises:
        ConfigurationError: mode and settings contradict each other, or a setting is not supported.
    """
    if tuning_mode == "lora" and given is None:
        raise ConfigurationError(
            "tuning_mode is 'lora', and no lora is given: e.g. lora=peft.LoraConfig(r=8, lora_alpha=16, "
            "target_modules=['q_proj', 'v_proj'])"
        )
    if tuning_mode is None and given is not None:
        raise ConfigurationError("lora is given, and tuning_mode is None: set tuning_mode='lora' to train it")
    return LoraConfig.of(given) if given is not None else None


@dataclass(frozen=True)
class LoraTarget:
    """A linear module of a block: the block's number, its path in the block, inputs K and outputs O."""

    block: int
    path: str
    inputs: int
    outputs: int


def find_targets(config: LoraConfig, layout: BlockLayout) -> list[LoraTarget]:
    """The linear modules that get LoRA, in the model's order.

    Args:
        config: the settings.
        layout: of the whole model.

    Raises:
        ConfigurationError: a name fits no linear module, or one outside of the blocks; or the rank is too large.
    """
    wanted, inside = config.target_modules, re.compile(rf"{re.escape(layout.list_path)}\.(\d+)\.(.+)")
    is_all = isinstance(wanted, str) and wanted.lower() == ALL_LINEAR
    owner = f"{layout.owner_path}." if layout.owner_path else ""
    found, targets = set(), []
    mixtures = tuple(f"{path.rpartition('.')[0]}." for path in layout.experts)  # the experts' router and shared experts
    of_blocks = dict.fromkeys(
        match[2] for path in layout.linears if (match := inside.fullmatch(path)) and not path.startswith(mixtures)
    )
    for path, (inputs, outputs) in layout.linears.items():
        match = inside.fullmatch(path)
        if is_all:
            fits = {ALL_LINEAR} if path.startswith(owner) else set()  # heads are outside of the blocks' owner
        elif isinstance(wanted, str):
            fits = {wanted} if re.fullmatch(wanted, path) else set()
        else:
            fits = {name for name in wanted if path == name or path.endswith(f".{name}")}
        found |= fits
        if not fits:
            continue
        if match is None:
            raise ConfigurationError(
                f"LoRA: {path!r} is outside of the blocks; name linear modules inside: {_shortest(of_blocks)}"
            )
        if path.startswith(mixtures) or (is_all and mixtures):
            what = ALL_LINEAR if is_all else path
            raise ConfigurationError(
                f"LoRA: {what!r} includes experts, or what is beside them; their weights are one tensor, of which LoRA "
                f"is not supported. Name others: {_shortest(of_blocks)}"
            )
        if is_bypassed(layout.model_type, path):
            others = _shortest(other for other in of_blocks if not is_bypassed(layout.model_type, other))
            raise ConfigurationError(
                f"LoRA: {path!r} of {layout.model_type} cannot have it, because kernels read its weight and skip the "
                f"module; name others: {others}"
            )
        targets.append(LoraTarget(int(match[1]), match[2], inputs, outputs))
    missing = sorted({ALL_LINEAR if is_all else wanted} - found if isinstance(wanted, str) else set(wanted) - found)
    if missing:
        raise ConfigurationError(
            f"LoRA: no linear module is called {', '.join(map(repr, missing))}; the blocks of this model have "
            f"{_shortest(of_blocks)}"
        )
    largest = max(min(target.inputs, target.outputs) for target in targets)
    if config.r > largest:  # smaller ones, such as a gate with one output, get as much as PEFT gives them
        raise ConfigurationError(
            f"LoRA: r is {config.r}, and the largest of the chosen linear modules has {largest} inputs or outputs: the "
            f"rank is at most {largest}"
        )
    return targets


def _in_names(config: LoraConfig, targets: list[LoraTarget], layout: BlockLayout) -> list[str] | str:
    """`target_modules` without "all-linear": last parts of paths, or whole paths if these mean other modules too."""
    if not isinstance(config.target_modules, str):
        return list(config.target_modules)
    if config.target_modules.lower() != ALL_LINEAR:
        return config.target_modules
    whole = {f"{layout.list_path}.{target.block}.{target.path}" for target in targets}
    names = {path.rpartition(".")[2] for path in whole}
    is_unique = {path for path in layout.linears if path.rpartition(".")[2] in names} == whole
    return sorted(names if is_unique else whole)


def _shortest(paths: Iterable[str]) -> str:
    """The last parts of paths, each once."""
    return ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths)) or "none"


class LoraLinear(nn.Module):
    """The factors of one linear: A [r, K] and B [O, r], float32, drawn as PEFT does (B is 0).

    Attributes:
        is_off: as of `Lora`.
    """

    def __init__(self, config: LoraConfig, target: LoraTarget):
        super().__init__()
        self.is_off = False
        # PEFT makes two linears, whose values it draws, before it draws A again.
        a, b = nn.Linear(target.inputs, config.r, bias=False), nn.Linear(config.r, target.outputs, bias=False)
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
        nn.init.zeros_(b.weight)
        self.lora_A, self.lora_B, self.scale = a.weight, b.weight, config.scale

    def adapt(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> Any:
        """A forward hook of a linear in this process."""
        if self.is_off:
            return None
        return add_low_rank(args[0] if args else kwargs["input"], output, self.lora_A, self.lora_B * self.scale)


class Lora(nn.Module):
    """LoRA of a model. Parameters are named by block and path: `3.self_attn.q_proj.lora_A`.

    Args:
        config: the settings.
        layout: of the whole model.

    Attributes:
        list_path: of the blocks in the whole model.
        target_modules: the setting in names, which mean the same to every program.
        is_off: passes are made without it; see `without_tuning`.

    Raises:
        ConfigurationError: see `find_targets`.
    """

    def __init__(self, config: LoraConfig, layout: BlockLayout):
        super().__init__()
        self.config, self.list_path, self.is_off = config, layout.list_path, False
        targets = find_targets(config, layout)  # in the model's order, in which PEFT draws, too
        self.target_modules = _in_names(config, targets, layout)
        for target in targets:
            module: nn.Module = self
            *parents, name = [str(target.block), *target.path.split(".")]
            for parent in parents:
                if parent not in module._modules:
                    module.add_module(parent, nn.Module())
                module = module.get_submodule(parent)
            module.add_module(name, LoraLinear(config, target))

    def linears(self) -> Iterator[tuple[int, str, LoraLinear]]:
        """Block, path in the block, and factors of each linear."""
        for path, module in self.named_modules():
            if isinstance(module, LoraLinear):
                block, _, inside = path.partition(".")
                yield int(block), inside, module

    def factors(self) -> tuple[LoraFactors, ...]:
        """The current values as servers take them, with gradients: blocks in which a linear has one shape together."""
        groups: dict[Any, list[tuple[int, LoraLinear]]] = {}
        for block, path, own in self.linears():
            groups.setdefault((path, own.lora_A.shape, own.lora_B.shape), []).append((block, own))
        return tuple(
            LoraFactors(
                path,
                tuple(block for block, _ in group),
                torch.stack([own.lora_A for _, own in group]),
                torch.stack([own.lora_B for _, own in group]) * self.config.scale,
            )
            for (path, *_), group in groups.items()
        )

    def adapt(self, blocks: Any) -> None:
        """Adds hooks to the linears of a model's blocks in this process."""
        for block, path, own in self.linears():
            blocks[block].get_submodule(path).register_forward_hook(own.adapt, with_kwargs=True)

    def extra_repr(self) -> str:
        return repr(self.config)


def add_frozen(lora: Iterable[LoraFactors], blocks: Any) -> None:
    """Adds frozen factors to the linears of a model's blocks in this process, by hooks and buffers."""
    for factors in lora:
        for block, a, b in zip(factors.blocks, factors.a, factors.b, strict=True):
            linear = blocks[block].get_submodule(factors.target)
            for name, factor in (("active_lora_A", a), ("active_lora_B", b)):
                linear.register_buffer(name, factor, persistent=False)
            linear.register_forward_hook(_add_active, with_kwargs=True)


def _add_active(linear: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> Any:
    return add_low_rank(args[0] if args else kwargs["input"], output, linear.active_lora_A, linear.active_lora_B)
