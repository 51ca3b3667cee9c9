"""Where texts come from: the bundled sample, a dataset of the Hugging Face hub, a local file or folder."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from petals_lightning.errors import DataError
from petals_lightning.sample import REVIEWS_DIR

BUNDLED = "bundled"
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
"""The names by which each split is known, the preferred one first."""

_SUFFIXES = (".jsonl", ".json", ".tsv", ".csv", ".parquet", ".txt")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_SHARD = re.compile(r"-\d+-of-\d+$")


def load_splits(
    source: str,
    name: str | None = None,
    *,
    split_names: dict[str, str] | None = None,
    bundled: Path = REVIEWS_DIR,
) -> dict[str, datasets.Dataset]:
    """Reads a source's splits under the keys `train`, `validation` and `test`; those that it lacks are left out.

    Args:
        source: `bundled`, a file (.jsonl, .tsv, .csv, .parquet, .txt), a folder of such files named after their split,
            or the id of a dataset on the hub.
        name: the configuration of a hub dataset, e.g. `sst2` of `nyu-mll/glue`.
        split_names: what a split is called where it has an unusual name, e.g. `{"validation": "validation_matched"}`.
        bundled: the folder that `bundled` stands for.

    Raises:
        DataError: nothing is there, it cannot be read, or it has no train split.
    """
    split_names = split_names or {}
    if source == BUNDLED:
        return _load_folder(bundled, split_names)
    path = Path(source).expanduser()
    if path.is_dir():
        return _load_folder(path, split_names)
    if path.is_file():
        return {"train": read_file(path)}
    if path.suffix in _SUFFIXES or not _HUB_ID.fullmatch(source):
        raise DataError(
            f"data.source={source}: no such file or folder (looked in {Path.cwd()}); give 'bundled', a path to "
            f"{'/'.join(_SUFFIXES)} data, or a hub dataset id such as nyu-mll/glue"
        )
    return _load_hub(source, name, split_names)


def read_file(path: Path) -> datasets.Dataset:
    """Reads one file into memory; its suffix tells the format. TSV has no quoting, as in GLUE; CSV has.

    Raises:
        DataError: the suffix is unknown, the file does not parse, or it has no rows.
    """
    try:
        table = _read_table(path)
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from error
    if table.num_rows == 0:
        raise DataError(f"{path}: holds no rows")
    return datasets.Dataset(table)


def _read_table(path: Path) -> pa.Table:
    match path.suffix:
        case ".jsonl" | ".json":
            return pa.json.read_json(path, read_options=pa.json.ReadOptions(block_size=64 << 20))
        case ".csv":
            return pa.csv.read_csv(path, parse_options=pa.csv.ParseOptions(newlines_in_values=True))
        case ".tsv":
            return pa.csv.read_csv(path, parse_options=pa.csv.ParseOptions(delimiter="\t", quote_char=False))
        case ".parquet":
            return pa.parquet.read_table(path)
        case ".txt":  # one text, line breaks and all
            return pa.table({"text": [path.read_text(encoding="utf-8")]})
    raise DataError(f"{path}: unknown format; use one of {', '.join(_SUFFIXES)}")


def _load_folder(folder: Path, split_names: dict[str, str]) -> dict[str, datasets.Dataset]:
    files = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES)
    splits = {}
    for split in SPLIT_NAMES:
        for wanted in _candidates(split, split_names):
            # Shards are numbered; `train_phrases.jsonl` beside `train.jsonl` is another set, not a part of it.
            parts = [file for file in files if _SHARD.sub("", file.stem).lower() == wanted.lower()]
            if parts:
                splits[split] = datasets.concatenate_datasets([read_file(part) for part in parts])
                break
    found = ", ".join(file.name for file in files) or "no data files"
    return _checked(splits, split_names, f"{folder} (has {found})")


def _load_hub(source: str, name: str | None, split_names: dict[str, str]) -> dict[str, datasets.Dataset]:
    import httpx

    try:
        available = datasets.load_dataset(source, name)
    except (OSError, ValueError, RuntimeError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"data.source={source}{f' data.name={name}' if name else ''}: cannot be loaded from the hub ({reason}); "
            "check the id and the network, or give a local file or folder"
        ) from error
    splits = {}
    for split in SPLIT_NAMES:
        for wanted in _candidates(split, split_names):
            if wanted in available:
                splits[split] = available[wanted]
                break
    return _checked(splits, split_names, f"{source} (has {', '.join(available)})")


def _candidates(split: str, split_names: dict[str, str]) -> tuple[str, ...]:
    return (split_names[split],) if split in split_names else SPLIT_NAMES[split]


def _checked(
    splits: dict[str, datasets.Dataset], split_names: dict[str, str], where: str
) -> dict[str, datasets.Dataset]:
    for split, wanted in split_names.items():
        if split not in splits:
            raise DataError(f"data.{split}_split={wanted}: not in {where}")
    if "train" not in splits:
        raise DataError(f"no train split in {where}; name a file train.jsonl, or set data.train_split")
    return splits
