"""A model's checkpoint, local or on the hub: its config, the names of its tensors, and lazy access to each of them.

Only the shards with wanted tensors are fetched, and only the wanted byte ranges are read.
"""

from __future__ import annotations

import copy
import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from petals_lightning.errors import CheckpointError, PetalsLightningError, UnsupportedModelError, is_out_of_memory
from petals_lightning.hf.compat import bytes_in_cache, bytes_to_download, dequantizing, find_file
from petals_lightning.hf.tokenizer import load_tokenizer

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_BIN_INDEX, _BIN_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"


class Checkpoint:
    """A checkpoint in Hugging Face's layout. Prefers safetensors; reads `.bin` files through a memory map.

    Args:
        name_or_path: folder or hub id.
        revision, token, cache_dir, local_files_only, subfolder: as in `from_pretrained`.
    """

    def __init__(
        self,
        name_or_path: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
    ):
        self.name_or_path = str(name_or_path)
        self.is_local = Path(self.name_or_path).is_dir()
        self.revision, self.token = revision, token
        self._max_disk_bytes: int | None = None
        self._hub: dict[str, Any] = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "subfolder": subfolder,
        }

    def on_disk(self) -> Checkpoint:
        """The same checkpoint without downloads: files that are not on this machine are missing."""
        same = copy.copy(self)
        same._hub = {**self._hub, "local_files_only": True}
        return same

    def within_disk_space(self, num_bytes: int) -> Checkpoint:
        """The same checkpoint, whose files are not downloaded if the hub's cache would take more than this."""
        same = copy.copy(self)
        same._max_disk_bytes = num_bytes
        return same

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; see `load_tokenizer`."""
        return load_tokenizer(self.name_or_path, **self._hub)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The model's config.

        Raises:
            CheckpointError: there is no such folder or repository, or it has no config.
            UnsupportedModelError: transformers does not know the architecture, or cannot dequantise the weights.
        """
        if self.is_local and not (Path(self.name_or_path) / self._hub["subfolder"] / "config.json").is_file():
            raise CheckpointError(
                f"model folder {self.name_or_path!r} has no config.json: give a folder written by save_pretrained, "
                "or a hub id"
            )
        try:
            config = AutoConfig.from_pretrained(self.name_or_path, **self._hub)
        except OSError as e:
            raise CheckpointError(
                f"cannot read model {self.name_or_path!r}: {first_line(e)}. It must be a folder written by "
                "save_pretrained or a hub id; a gated repository needs token=…"
            ) from e
        except ValueError as e:
            raise UnsupportedModelError(
                f"model {self.name_or_path!r} has an architecture that transformers does not know: {first_line(e)}"
            ) from e
        for part in (config, config.get_text_config()):
            if (quantization := getattr(part, "quantization_config", None)) is not None:
                # transformers' own linears for FP8, among others, drop gradients without an error.
                part.quantization_config = dequantizing(quantization)
                if part.quantization_config is None:
                    raise UnsupportedModelError(
                        f"model {self.name_or_path!r} is quantised ({quantization.get('quant_method')}), "
                        "which transformers cannot undo while it loads: give the checkpoint from which it was made; "
                        "`serve --quant-type int8` or nf4 quantises that"
                    )
        return config

    @cached_property
    def decoder_config(self) -> PreTrainedConfig:
        """The config of the text decoder: the model's own, or that of the text part of a multimodal wrapper.

        Raises:
            UnsupportedModelError: the model is an encoder-decoder, whose blocks read an encoder's output.
        """
        config = self.config
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"model {self.name_or_path!r} ({config.model_type}) is an encoder-decoder: only decoders are served "
                "(Llama, BLOOM, Falcon, Mixtral, …)"
            )
        text = config.get_text_config()
        if text is not config:
            text = copy.deepcopy(text)
            # The wrapper's config determines whether head and embedding are tied, since transformers ties them there.
            text.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)
            text.dtype = text.dtype or config.dtype
            if (quantization := getattr(config, "quantization_config", None)) is not None:
                text.quantization_config = quantization
        return text

    @property
    def is_wrapper(self) -> bool:
        """Whether the checkpoint is of a multimodal model, which contains the text decoder and other parts."""
        return self.decoder_config is not self.config

    @cached_property
    def generation_config(self) -> GenerationConfig | None:
        """The model's defaults for `generate`, or None if it has none."""
        path = self._find("generation_config.json")
        return GenerationConfig.from_pretrained(path.parent) if path is not None else None

    @cached_property
    def shard_of(self) -> dict[str, str]:
        """For each tensor, the name of the file that holds it.

        Raises:
            CheckpointError: there are no weights, or their index is damaged.
        """
        for index, single in ((_INDEX, _SINGLE), (_BIN_INDEX, _BIN_SINGLE)):
            if (path := self._find(index)) is not None:
                return self._weight_map(path)
            if (path := self._find(single)) is None:
                continue
            if single == _SINGLE:
                with self._open(path) as file:
                    return dict.fromkeys(file.keys(), _SINGLE)
            return dict.fromkeys(_load_bin(path), _BIN_SINGLE)
        raise CheckpointError(
            f"model {self.name_or_path!r} has no weights: found neither {_INDEX}, {_SINGLE}, {_BIN_INDEX} "
            f"nor {_BIN_SINGLE}"
        )

    def tensors(
        self,
        names: Iterable[str],
        stack: ExitStack,
        on_shard: Callable[[str, int, int], None] | None = None,
        *,
        copied: bool = False,
    ) -> dict[str, Any]:
        """Lazy tensors by name: they are read when transformers materialises them.

        Args:
            names: tensors of this checkpoint.
            stack: closes the files when the caller has finished with them.
            on_shard: called with (file name, number of this file, number of files) before each file is fetched.
            copied: each tensor that is read is a copy, so that no part of a file stays mapped.

        Raises:
            CheckpointError: a file is missing or damaged, cannot be fetched, or does not fit on the disk.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.shard_of[name], []).append(name)
        self._check_disk_space(by_file)
        lazy: dict[str, Any] = {}
        for number, (file_name, wanted) in enumerate(sorted(by_file.items()), start=1):
            if on_shard is not None:
                on_shard(file_name, number, len(by_file))
            path = self._shard(file_name)
            if file_name.endswith(".bin"):
                loaded = _load_bin(path)
                lazy.update({name: loaded[name] for name in wanted})
            else:
                file = stack.enter_context(self._open(path))
                if missing := set(wanted) - set(file.keys()):
                    raise self._damaged(path, f"it lacks {sorted(missing)[0]!r}, which the index says it holds")
                if copied:
                    lazy.update({name: _CopiedTensor(path, name, file.get_slice(name)) for name in wanted})
                else:
                    lazy.update({name: file.get_slice(name) for name in wanted})
        return lazy

    def check_shards(self) -> None:
        """Fetches all files of the weights that are not on this machine.

        Raises:
            CheckpointError: a file of the weights is missing or damaged; the message names it.
        """
        for file_name in sorted(set(self.shard_of.values())):
            path = self._shard(file_name)
            if path.suffix == ".safetensors":
                with self._open(path):
                    pass

    @cached_property
    def fingerprint(self) -> str:
        """Short digest of config and tensor names, which distinguishes models, but not a model and its finetunes.

        Made from config.json as it is in the file, because versions of transformers add other fields.
        """
        written, _ = type(self.config).get_config_dict(
            self.name_or_path, **{k: v for k, v in self._hub.items() if v is not None}
        )
        config = {k: v for k, v in written.items() if k not in _CONFIG_KEYS_THAT_DO_NOT_MATTER}
        content = json.dumps([config, sorted(self.shard_of)], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def _check_disk_space(self, files: Iterable[str]) -> None:
        """Raises CheckpointError if these files are not all here, and would take more than the cache may."""
        if self._max_disk_bytes is None or self.is_local:
            return
        try:
            missing = sum(bytes_to_download(self.name_or_path, file_name, **self._hub) for file_name in files)
            taken = bytes_in_cache(self._hub["cache_dir"])
        except OSError as e:
            raise CheckpointError(f"cannot fetch the weights of {self.name_or_path!r}: {first_line(e)}") from e
        if missing and taken + missing > self._max_disk_bytes:
            raise CheckpointError(
                f"shards of {self.name_or_path!r} would take {missing / 2**30:.3g} GiB more, {taken / 2**30:.3g} of "
                f"the {self._max_disk_bytes / 2**30:.3g} GiB of --max-disk-space are taken: hold fewer blocks, or "
                "delete models with `hf cache rm`"
            )

    def _shard(self, file_name: str) -> Path:
        path = self._find(file_name)
        if path is None:
            raise CheckpointError(f"model {self.name_or_path!r}: the shard {file_name} is missing")
        return path

    def _weight_map(self, path: Path) -> dict[str, str]:
        try:
            weight_map = json.loads(path.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as e:
            raise self._damaged(path, f"no JSON object with a weight_map ({type(e).__name__})") from e
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise self._damaged(path, "its weight_map does not give a file name for each tensor")
        return weight_map

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as e:
            raise self._damaged(path, first_line(e)) from e

    def _damaged(self, path: Path, how: str) -> CheckpointError:
        return CheckpointError(
            f"model {self.name_or_path!r}: {path.name} is damaged or incomplete ({how}): save or download it again"
        )

    def _find(self, file_name: str) -> Path | None:
        try:
            return find_file(self.name_or_path, file_name, **self._hub)
        except OSError as e:
            raise CheckpointError(f"cannot fetch {file_name} of model {self.name_or_path!r}: {first_line(e)}") from e


# Config fields that a user or a fine-tuning run may change without a change of the blocks' results.
_CONFIG_KEYS_THAT_DO_NOT_MATTER = {
    "_name_or_path", "transformers_version", "architectures", "id2label", "label2id", "num_labels", "problem_type",
    "pad_token_id", "bos_token_id", "eos_token_id", "use_cache", "dtype", "torch_dtype", "return_dict",
    "output_hidden_states", "output_attentions", "dht_prefix",
}  # fmt: skip


class _CopiedTensor:
    """A lazy tensor of a file, with the methods of safetensors' slices that transformers calls.

    Args:
        path, name: of the file and the tensor.
        described: the tensor's slice, of a file that need not stay open.
    """

    def __init__(self, path: Path, name: str, described: Any):
        self._path, self._name = path, name
        self._shape, self._dtype = described.get_shape(), described.get_dtype()

    def get_shape(self) -> list[int]:
        return self._shape

    def get_dtype(self) -> str:
        return self._dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        with safe_open(self._path, framework="pt") as file:
            return file.get_slice(self._name)[index].clone()


def _load_bin(path: Path) -> dict[str, torch.Tensor]:
    # The format before torch 1.6 is not a zip archive and cannot be memory-mapped.
    return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)


def find_saved(source: str | Path, name: str, *, what: str, writers: str, **hub: Any) -> Path:
    """A file of a folder, or of a hub repository, that somebody has saved.

    Args:
        source: folder or hub id.
        name: of the file.
        what, writers: of the error: what is sought, and the functions that write it.
        hub: as in transformers.

    Raises:
        CheckpointError: it is not there.
    """
    path = Path(source) / name
    if path.is_file():
        return path
    if Path(source).is_dir():
        raise CheckpointError(f"folder {str(source)!r} has no {name}: give a folder written by {writers}")
    try:
        found = find_file(str(source), name, **hub)
        reason = f"it has no {name}"
    except (OSError, ValueError) as e:
        found, reason = None, str(e).strip().splitlines()[0]
    if found is None:
        raise CheckpointError(
            f"no {what} at {str(source)!r}: neither a folder written by {writers} nor such a repository on the hub "
            f"that can be reached from here ({reason})"
        )
    return found


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Context for a family's own code: turns its errors into refusals.

    Raises:
        UnsupportedModelError: `what`, and the first line of the error. Unreadable files and lack of memory are not
            the family's fault, and their errors pass unchanged.
    """
    try:
        yield
    except (PetalsLightningError, OSError, SafetensorError):
        raise
    except Exception as e:
        if is_out_of_memory(e):
            raise
        raise UnsupportedModelError(f"{what} ({type(e).__name__}: {first_line(e)})") from e


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without a full stop."""
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
