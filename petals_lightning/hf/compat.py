"""All uses of transformers' inner names; no other module may use one (tests/hf/test_boundary.py).

transformers renames them every few weeks. So signatures are inspected, not version numbers, and every model is tested
when it is loaded (`models/self_check.py`, `server/blocks/self_checks.py`). docs/dependencies.md lists tested versions.
"""

from __future__ import annotations

import inspect
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download, scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache as TheirCache
from transformers.cache_utils import CacheLayerMixin, DynamicCache
from transformers.conversion_mapping import (
    extract_weight_conversions_for_model,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import logging as hf_logging
from transformers.utils.hub import cached_file

from petals_lightning.errors import UnsupportedModelError

__all__ = ["Conv1D", "GenericForSequenceClassification", "GradientCheckpointingLayer"]

_MAMBAS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_CACHE_NAMES = ("cache", "past_key_values", "cache_params")


def versions() -> str:
    """The library versions, for refusals that a user may report."""
    return f"transformers {transformers.__version__}"


def cache_name(model: nn.Module) -> str:
    """The keyword of a model's argument for keys and values.

    It is `cache` since 5.24, `past_key_values` before (`cache_params` in Mamba).

    Raises:
        UnsupportedModelError: the model has none of these arguments.
    """
    parameters = inspect.signature(model.forward).parameters
    for name in _CACHE_NAMES:
        if name in parameters:
            return name
    raise UnsupportedModelError(
        f"{type(model).__name__} of {versions()} takes no cache under a name that is known here "
        f"({', '.join(_CACHE_NAMES)}): the family keeps another kind of state, or transformers has renamed it"
    )


def pop_cache(kwargs: dict[str, Any]) -> Any:
    """Removes the cache from the arguments of a model, whichever name the caller used. None if there is none.

    Both names are removed: from 5.24 on, the new one wins if both are given, even if it is None.
    """
    found = [kwargs.pop(name) for name in _CACHE_NAMES if name in kwargs]
    return next((cache for cache in found if cache is not None), None)


def set_cache(output: Any, cache: Cache | None) -> None:
    """Puts `cache` into a model's output, if the family has a field for it: `cache` or `past_key_values`, as above.

    The dataclass's fields are inspected, because from 5.24 on `past_key_values` is a deprecated property. `ModelOutput`
    keeps an item whose attribute becomes None, so the item is removed too.
    """
    for name in _CACHE_NAMES:
        if name in getattr(output, "__dataclass_fields__", ()):
            if cache is None:
                OrderedDict.pop(output, name, None)
            setattr(output, name, cache)
            return


def positions_of_logits(kwargs: dict[str, Any]) -> int:
    """From a causal model's arguments: for how many of the last positions it computes logits; 0 for all.

    `logits_to_keep` since 4.50; a tensor of positions counts as all.
    """
    count = kwargs.get("logits_to_keep")
    return count if isinstance(count, int) else 0


class Cache(TheirCache):
    """Base class of our caches.

    Decoders with linear attention call `has_previous_state`; those of 5.10 do so outside of their blocks too.
    transformers' own method raises an error if no layer is of that kind.
    """

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        """Whether a recurrent state is kept: never in our caches."""
        return False


class CacheLayer(CacheLayerMixin):
    """Base class of our cache layers.

    Its maximum length is `get_max_length` since 5.13, and `get_max_cache_shape` before; both are abstract methods.
    """

    is_sliding = False
    is_croppable = True  # since 5.17: whether assisted generation may go back

    def get_max_length(self) -> int:
        """The maximum number of positions; -1: unlimited."""
        return -1

    def get_max_cache_shape(self) -> int:
        return self.get_max_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the attention mask, and the position of the first: all positions are visible."""
        return self.get_seq_length() + query_length, 0

    def crop(self, length: int) -> None:
        """Drops the last `-length` positions. Up to 5.13 `generate` passed the positive number that remains."""
        length = int(length)  # assisted generation of 5.15, among others, passes a tensor
        remaining = self.get_seq_length() + length if length <= 0 else min(length, self.get_seq_length())
        self.keep_first(max(remaining, 0))

    def keep_first(self, length: int) -> None:
        """Drops all positions after the first `length`."""
        raise NotImplementedError


def cache_of(past: Iterable[tuple[torch.Tensor, torch.Tensor]] = ()) -> DynamicCache:
    """A cache of transformers' own, with keys [B, h, P, D] and values [B, h, P, E] of each block; by default empty.

    It is not told the model's config, and so keeps all positions; masks apply sliding windows. This is what PEFT passes
    on, too. Its first argument takes pairs since 4.56.
    """
    return DynamicCache(list(past) or None)


def past_of(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values that a cache holds, by block."""
    layers: list[Any] = list(cache.layers)  # of several classes, by their types
    return [(layer.keys, layer.values) for layer in layers]


class OwnDraws(TorchFunctionMode):
    """Within it, this thread's `generate` draws its tokens from a seed of its own, whatever other threads draw.

    `generate` takes no generator. It draws by `torch.multinomial`, in all modes.
    """

    def __init__(self, seed: int):
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.multinomial:
            kwargs = {**kwargs, "generator": self._generator}
        return func(*args, **kwargs)


class CacheFromOutside:
    """Mixin before a family's class: `generate` takes its cache from `make_cache`.

    transformers creates the cache in `_prepare_cache_for_generation(generation_config, model_kwargs, …)`, once the
    length is known. This private name has been the same since 4.42.
    """

    def make_cache(self, generation_config: GenerationConfig, max_length: int) -> Cache:
        """The cache for a `generate` with these settings and up to `max_length` positions."""
        raise NotImplementedError

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        name = cache_name(self)  # type: ignore[arg-type]
        if model_kwargs.get(name) is not None or generation_config.use_cache is False:  # the user's own
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
            return
        theirs = super()._prepare_cache_for_generation  # type: ignore[misc]
        given = inspect.signature(theirs).bind(generation_config, model_kwargs, *args, **kwargs).arguments
        # One more than they request: the last token is never read. Only here are given embeddings counted.
        model_kwargs[name] = self.make_cache(generation_config, given["max_cache_length"] + 1)


def class_for(auto_class: Any, config_class: type) -> type[PreTrainedModel] | None:
    """The class that `auto_class` (`AutoModel`, …) picks for a config's class; None if the family has none.

    `_model_mapping`, whose values may be tuples of classes, exists since 4.6.
    """
    try:
        found = auto_class._model_mapping[config_class]
    except KeyError:
        return None
    return found[0] if isinstance(found, (list, tuple)) else found


def renamed_keys(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """For names of tensors in a checkpoint of `model`, the approximate paths to which loading maps them.

    Old checkpoints and those of multimodal wrappers have other names than the classes. Conversions that merge tensors
    (a mixture's experts) are left out: they change only the end of a name.

    `get_model_conversion_mapping` and `rename_source_key`, which `from_pretrained` itself uses, exist since 5.0.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    own = model.state_dict()
    return {name: rename_source_key(name, renamings, [], model.base_model_prefix, own)[0] for name in names}


def share_conversions(wrapper: PreTrainedModel, text: PreTrainedModel) -> None:
    """Lets a wrapper's text part be loaded by itself: its merging of experts may be registered for the wrapper only.

    `register_checkpoint_conversion_mapping` exists since 5.0.
    """
    if extract_weight_conversions_for_model(text) is None:
        shared = get_model_conversion_mapping(wrapper, add_legacy=False)
        own = [each for each in shared if isinstance(each, WeightConverter) and not each.scope_prefix]
        register_checkpoint_conversion_mapping(text.config.model_type, [*own], overwrite=True)


def find_file(name_or_path: str, file_name: str, **hub: Any) -> Path | None:
    """A file of a local folder or of a hub repository, downloaded if needed; None if there is none.

    `cached_file(…, _raise_exceptions_for_missing_entries=False)` exists since 4.41.

    Args:
        hub: `revision`, `token`, `cache_dir`; those that are None are not passed on.

    Raises:
        OSError: the file cannot be fetched.
    """
    given = {name: value for name, value in hub.items() if value is not None}
    path = cached_file(name_or_path, file_name, _raise_exceptions_for_missing_entries=False, **given)
    return Path(path) if path is not None else None


def bytes_to_download(repository: str, file_name: str, **hub: Any) -> int:
    """How many bytes `find_file` would download: 0 for a file that is here.

    Raises:
        OSError: the hub cannot be asked.
    """
    found = hf_hub_download(repository, file_name, dry_run=True, **hub)
    return (found.file_size or 0) if found.will_download else 0


def bytes_in_cache(cache_dir: str | None) -> int:
    """Bytes of all that was downloaded from the hub to this cache, or to the default one."""
    try:
        return scan_cache_dir(cache_dir).size_on_disk
    except CacheNotFound:
        return 0


def dequantizing(quantization: dict[str, Any]) -> dict[str, Any] | None:
    """The quantisation of a checkpoint's config, so changed that loading dequantises the weights; None: it cannot.

    Settings of methods that can have a field `dequantize` (`FineGrainedFP8Config` since 4.56).
    """
    try:
        settings = AutoQuantizationConfig.from_dict(dict(quantization))
    except (ValueError, TypeError, ImportError, AttributeError):  # an unknown method, or one whose library is missing
        return None
    return {**quantization, "dequantize": True} if hasattr(settings, "dequantize") else None


@contextmanager
def one_tensor_at_a_time() -> Iterator[None]:
    """Has transformers read and convert a tensor only when it is placed; threads would read ahead the whole checkpoint.

    It reads the variable for each model, since 5.0.
    """
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides transformers' loading report and progress bar: this package checks for missing tensors itself."""
    verbosity, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bar:
            hf_logging.enable_progress_bar()


def is_bypassed(model_type: str, path: str) -> bool:
    """Whether a family's kernels read the weight of a linear and skip the module, so that its hooks do not run.

    Mamba's fused kernels do so with `out_proj` (as of 5.24). PEFT refuses LoRA there, too.
    """
    return model_type in _MAMBAS and path.rpartition(".")[2] == "out_proj"
