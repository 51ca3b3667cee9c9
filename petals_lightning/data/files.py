"""Readers of data files, chosen by suffix.

Data are read into memory as an Arrow table, about as large as the text. Arrow's and pandas' own readers of CSV and JSON
are not used: they convert texts to numbers, dates or missing values, and do not report the line of an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from petals_lightning.data.delimited import read_csv, read_tsv
from petals_lightning.data.json_rows import read_json, read_json_lines, read_json_lists
from petals_lightning.data.opening import (
    COMPRESSIONS,
    UNREADABLE,
    TextFormat,
    open_bytes,
    open_text,
    suffixes,
    why_undecodable,
)
from petals_lightning.data.tables import joined
from petals_lightning.errors import DataError


def _read_parquet(path: Path, form: TextFormat) -> pa.Table:
    with open_bytes(path) as file:
        table = pa.parquet.ParquetFile(pa.BufferReader(file.read()) if suffixes(path)[1] else path).read()
    for number, field in enumerate(table.schema):
        if field.type == pa.string_view():  # `datasets` does not know it
            table = table.set_column(number, field.name, table[field.name].cast(pa.string()))
    return table


def _read_arrow(path: Path, form: TextFormat) -> pa.Table:
    """Arrow's stream format, in which `datasets` writes, or its file format."""
    with open_bytes(path) as file:
        data = file.read()
    is_file = data.startswith(b"ARROW1")
    return (pa.ipc.open_file(data) if is_file else pa.ipc.open_stream(data)).read_all()


def _read_text(path: Path, form: TextFormat) -> pa.Table:
    """The file as one text, including line breaks."""
    with open_text(path, form) as text:
        return pa.table({"text": [text.read()]})


_READERS: dict[str, Callable[[Path, TextFormat], pa.Table]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".tsv": read_tsv,
    ".csv": read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_text,
}
SUFFIXES = tuple(_READERS)


def is_data_file(path: Path) -> bool:
    """Whether a file of this name can be read."""
    return suffixes(path)[0] in _READERS


def is_text(path: Path) -> bool:
    """Whether a file is one text."""
    return suffixes(path)[0] == ".txt"


def stem_of(path: Path) -> str:
    """A data file's name without the suffixes of its format and its compression; any other name unchanged."""
    return path.name[: -len("".join(suffixes(path)))] if is_data_file(path) else path.name


def read_file(path: Path, form: TextFormat | None = None) -> datasets.Dataset:
    """Reads one file into memory; its suffix determines the format. All columns of csv and tsv files are strings.

    Raises:
        DataError: the suffix is unknown, the file does not parse, or it has no rows.
    """
    return datasets.Dataset(_read_table(path, form or TextFormat()))


def read_files(paths: Sequence[Path], form: TextFormat | None = None) -> tuple[datasets.Dataset, list[int]]:
    """Reads the parts of one split. Returns its rows, and the number of rows of each part."""
    tables = [_read_table(path, form or TextFormat()) for path in paths]
    return datasets.Dataset(joined(tables)), [table.num_rows for table in tables]


def read_lists(path: Path, form: TextFormat | None = None) -> dict[str, datasets.Dataset]:
    """The named lists of rows in a .json file with one list per split; empty if there are not several.

    Raises:
        DataError: the file does not parse.
    """
    if suffixes(path)[0] != ".json":
        return {}
    form = form or TextFormat()
    with _naming(path, form):
        tables = read_json_lists(path, form)
    return {name: datasets.Dataset(table) for name, table in tables.items()}


def _read_table(path: Path, form: TextFormat) -> pa.Table:
    suffix = suffixes(path)[0]
    if suffix not in _READERS:
        raise DataError(
            f"{path}: unknown format; use one of {', '.join(SUFFIXES)}, or packed as {', '.join(COMPRESSIONS)}"
        )
    with _naming(path, form):
        table = _READERS[suffix](path, form)
    if table.num_rows == 0:
        raise DataError(f"{path}: holds no rows")
    for name in table.column_names:
        if table.column_names.count(name) > 1:
            raise DataError(f"{path}: two columns are called {name!r}; rename one of them")
    return table


@contextmanager
def _naming(path: Path, form: TextFormat) -> Iterator[None]:
    """Context for a reader: turns its errors into DataErrors that name the file."""
    suffix = suffixes(path)[0]
    try:
        yield
    except UnicodeError as error:
        raise DataError(f"{path}: cannot be read as {suffix[1:]}: {why_undecodable(path, form)}") from error
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{path}: cannot be read as {suffix[1:]}: {reason}") from error
