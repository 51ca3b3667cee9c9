"""Sources of texts: the bundled sample, a dataset of the Hugging Face hub, a local file or folder."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

import datasets
import pyarrow as pa

from petals_lightning.data.files import SUFFIXES, is_data_file, is_text, read_file, read_files, read_lists, stem_of
from petals_lightning.data.opening import TextFormat
from petals_lightning.errors import DataError
from petals_lightning.sample import REVIEWS_DIR

log = logging.getLogger(__name__)

__all__ = ["BUNDLED", "SPLIT_NAMES", "LocatedSplits", "load_splits", "read_file"]

BUNDLED = "bundled"
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
"""The possible names of each split, the preferred one first."""

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_SHARD = re.compile(r"-\d+-of-\d+(-[0-9a-f]+)?$")
_INTEGER = datasets.Value("int64")
_LOADING_FAILS = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
_SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")


class LocatedSplits(dict[str, datasets.Dataset]):
    """The splits of a source by name, and the files of their rows."""

    def __init__(self, source: str):
        super().__init__()
        self._source = source
        self._files: dict[str, list[tuple[Path, int]]] = {}

    def read(self, split: str, paths: list[Path], form: TextFormat | None) -> None:
        """Reads a split from its files."""
        self[split], counts = read_files(paths, form)
        self._files[split] = list(zip(paths, counts, strict=True))

    def where(self, split: str, row: int) -> str:
        """Describes a row of a split for messages: its file, and its number in the file, from 0."""
        for path, count in self._files.get(split, []):
            if row < count:
                return f"row {row} of {path}"
            row -= count
        return f"row {row} of {split} of {self._source}"


def load_splits(
    source: str,
    name: str | None = None,
    *,
    split_names: dict[str, str] | None = None,
    bundled: Path = REVIEWS_DIR,
    form: TextFormat | None = None,
) -> LocatedSplits:
    """Reads a source's splits under the keys `train`, `validation` and `test`; missing ones are left out.

    Args:
        source: `bundled`; a file (see `files.SUFFIXES`, also compressed; a .json file may hold one list per split,
            under its name); a folder of such files named after their split, or of .txt files of any name, which are all
            train; the clone of a hub dataset; a folder of `save_to_disk`; or the id of a hub dataset.
        name: the configuration of a hub dataset or of its clone, e.g. `sst2` of `nyu-mll/glue`.
        split_names: names of splits, if they are unusual, e.g. `{"validation": "validation_matched"}`.
        bundled: the folder of the source `bundled`.
        form: the format of text files.

    Raises:
        DataError: there are no data, they cannot be read, or they have no train split.
    """
    split_names = split_names or {}
    path = bundled if source == BUNDLED else Path(source).expanduser()
    if path.is_dir():
        return _load_folder(path, name, split_names, form)
    if path.is_file():
        if lists := read_lists(path, form):
            return _of_dict(lists, source, split_names)
        splits = LocatedSplits(source)
        splits.read("train", [path], form)
        return splits
    if is_data_file(path) or not _HUB_ID.fullmatch(source):
        raise DataError(
            f"source={source}: no such file or folder (looked in {Path.cwd()}); give 'bundled', a path to "
            f"{'/'.join(SUFFIXES)} data, or a hub dataset id such as nyu-mll/glue"
        )
    return _load_hub(source, name, split_names)


def _load_folder(folder: Path, name: str | None, split_names: dict[str, str], form: TextFormat | None) -> LocatedSplits:
    if any((folder / file).is_file() for file in _SAVED_BY_DATASETS):
        return _load_saved(folder, split_names)
    files = sorted(file for file in folder.iterdir() if file.is_file() and is_data_file(file))
    split_names = {split: stem_of(Path(given)) for split, given in split_names.items()}
    # Shards are numbered; `train_phrases.jsonl` beside `train.jsonl` is a different set, not a part of it.
    parts: dict[str, list[Path]] = {}
    for file in files:
        parts.setdefault(_SHARD.sub("", stem_of(file)).lower(), []).append(file)
    if name is not None or ("train" not in _chosen(parts, split_names) and _is_clone(folder)):
        return _load_clone(folder, name, split_names, form)
    splits = LocatedSplits(str(folder))
    if files and not split_names and not _chosen(parts, {}) and all(map(is_text, files)):
        log.info("%s: no file is named after a split, so its %d .txt files are train", folder, len(files))
        splits.read("train", files, form)
        return splits
    for split, wanted in _chosen(parts, split_names).items():
        stems = [stem_of(file).lower() for file in parts[wanted]]
        if len(stems) > len(set(stems)) or (wanted in stems and len(stems) > 1):
            names = ", ".join(file.name for file in parts[wanted])
            raise DataError(f"{folder}: {split} may be any of {names}; keep one, or number them like {split}-0-of-2")
        splits.read(split, parts[wanted], form)
    found = ", ".join(file.name for file in files) or "no data files"
    return _checked(splits, split_names, f"{folder} (has {found})")


def _is_clone(folder: Path) -> bool:
    """Whether a folder has the layout of a hub dataset: its README names the files, or they are in folders."""
    readme = folder / "README.md"
    if readme.is_file() and re.search(r"^configs:", readme.read_text(encoding="utf-8", errors="replace"), re.MULTILINE):
        return True
    return any(is_data_file(file) for file in folder.glob("*/*"))


def _load_clone(folder: Path, name: str | None, split_names: dict[str, str], form: TextFormat | None) -> LocatedSplits:
    """Loads a hub dataset from this disk: `datasets` finds the files of its splits."""
    try:
        builder = datasets.load_dataset_builder(str(folder), name)
    except Exception as error:  # a README may contain anything
        raise DataError(
            f"source={folder}{_named(name)}: cannot be read as the clone of a hub dataset ({_reason(error)}); "
            "set name=… to one of its configurations, or give one of its files"
        ) from error
    parts = {str(split): [Path(file) for file in files] for split, files in builder.config.data_files.items()}
    splits = LocatedSplits(str(folder))
    for split, wanted in _chosen(parts, split_names).items():
        splits.read(split, parts[wanted], form)
        for column, feature in (builder.info.features or {}).items():
            if isinstance(feature, datasets.ClassLabel) and splits[split].features.get(column) == _INTEGER:
                splits[split] = splits[split].cast_column(column, feature)  # the README names the classes
    return _checked(splits, split_names, f"{folder} (has {', '.join(parts)})")


def _load_saved(folder: Path, split_names: dict[str, str]) -> LocatedSplits:
    """Loads a dataset written by `save_to_disk`; it stays on disk, mapped to memory."""
    try:
        saved = datasets.load_from_disk(str(folder))
    except (*_LOADING_FAILS, pa.ArrowException) as error:
        raise DataError(f"{folder}: cannot be read as a dataset of save_to_disk: {_reason(error)}") from error
    return _of_dict(saved if isinstance(saved, dict) else {"train": saved}, str(folder), split_names)


def _load_hub(source: str, name: str | None, split_names: dict[str, str]) -> LocatedSplits:
    import httpx

    try:
        available = datasets.load_dataset(source, name)
    except (*_LOADING_FAILS, httpx.HTTPError) as error:
        raise DataError(
            f"source={source}{_named(name)}: cannot be loaded from the hub ({_reason(error)}); "
            "check the id and the network, or give a local file or folder"
        ) from error
    return _of_dict(available, source, split_names)


def _of_dict(available: dict[str, datasets.Dataset], source: str, split_names: dict[str, str]) -> LocatedSplits:
    splits = LocatedSplits(source)
    for split, wanted in _chosen(available, split_names).items():
        splits[split] = available[wanted].with_format(None)
    return _checked(splits, split_names, f"{source} (has {', '.join(available)})")


def _chosen(available: Iterable[str], split_names: dict[str, str]) -> dict[str, str]:
    """The name of each existing split."""
    by_lower = {name.lower(): name for name in available}
    chosen = {}
    for split, usual in SPLIT_NAMES.items():
        names = (split_names[split],) if split in split_names else usual
        found = next((by_lower[name.lower()] for name in names if name.lower() in by_lower), None)
        if found is not None:
            chosen[split] = found
    return chosen


def _checked(splits: LocatedSplits, split_names: dict[str, str], where: str) -> LocatedSplits:
    for split, wanted in split_names.items():
        if split not in splits:
            raise DataError(f"{split}_split={wanted}: not in {where}")
    if "train" not in splits:
        raise DataError(
            f"no train split in {where}; name a file for it (train.jsonl, train.csv, train.txt, …), or set train_split"
        )
    for split, rows in splits.items():
        if len(rows) == 0:
            raise DataError(f"{split} of {where} holds no rows")
    return splits


def _named(name: str | None) -> str:
    return f" name={name}" if name else ""


def _reason(error: Exception) -> str:
    return " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
