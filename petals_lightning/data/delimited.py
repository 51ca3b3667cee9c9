"""Files of cells between delimiters. A cell is always a string; none is converted to a number or a date."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute

from petals_lightning.data.opening import Malformed, TextFormat, open_text
from petals_lightning.data.tables import BATCH_ROWS

_DELIMITERS = ",;\t|"
_HEAD_LENGTH = 1 << 16
"""Characters that may be the delimiter."""


def read_csv(path: Path, form: TextFormat) -> pa.Table:
    """A table of strings; quoted cells may hold delimiters and line breaks.

    Raises:
        Malformed: a row has more or fewer cells than the header, or a quote is not closed.
    """
    return _table(path, form, delimiter=form.delimiter or _find_delimiter(path, form, ","))


def read_tsv(path: Path, form: TextFormat) -> pa.Table:
    """As `read_csv`, but quotes are part of the text, as in GLUE, unless the file is well-formed CSV (pandas)."""
    delimiter = form.delimiter or _find_delimiter(path, form, "\t")
    try:
        plain = _table(path, form, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    except Malformed as error:
        try:
            return _table(path, form, delimiter=delimiter, strict=True)
        except Malformed:
            raise error from None
    if not any(pa.compute.any(pa.compute.starts_with(column, '"')).as_py() for column in plain.columns):
        return plain
    try:
        quoted = _table(path, form, delimiter=delimiter, strict=True)
    except Malformed:
        return plain
    # If each line is a whole row, quotes that would join lines are there by chance.
    return quoted if quoted.num_rows == plain.num_rows else plain


def _find_delimiter(path: Path, form: TextFormat, usual: str) -> str:
    """The delimiter that splits the first rows into as many cells as the header: the usual one, or another."""
    with open_text(path, form, newline="") as text:
        head = text.read(_HEAD_LENGTH)
    ragged = None
    for delimiter in dict.fromkeys(usual + _DELIMITERS):
        widths = [len(row) for row in csv.reader(io.StringIO(head, newline=""), delimiter=delimiter) if row]
        whole = widths if len(head) < _HEAD_LENGTH else widths[:-1] or widths
        if widths and widths[0] > 1:
            if set(whole) == {widths[0]}:
                return delimiter
            ragged = ragged or delimiter
    return ragged or usual


def _table(path: Path, form: TextFormat, **dialect: Any) -> pa.Table:
    with open_text(path, form, newline="") as text:
        records = _records(text, **dialect)
        _, header = next(records, (0, []))
        names = [name.strip() or f"Unnamed: {number}" for number, name in enumerate(header)]  # as pandas names them
        tables = []
        while batch := list(islice(records, BATCH_ROWS)):
            for line, cells in batch:
                if len(cells) != len(names):
                    raise Malformed(
                        f"line {line} has {len(cells)} cells, the header {len(names)}: {cells!r:.80}; quote cells that "
                        f"hold {dialect['delimiter']!r}, or set delimiter=…"
                    )
            columns = zip(*(cells for _, cells in batch), strict=True)
            tables.append(pa.Table.from_arrays([pa.array(column, pa.string()) for column in columns], names))
    return pa.concat_tables(tables) if tables else pa.table({})


def _records(text: IO[str], **dialect: Any) -> Iterator[tuple[int, list[str]]]:
    """The number of the line in which each row starts, and the row's cells. Blank lines are skipped.

    A row of several lines must be well-formed: a stray quote would silently join many rows.
    """
    csv.field_size_limit(2**31 - 1)  # for the whole process; the default is 131,072 characters
    lines: list[str] = []

    def noted() -> Iterator[str]:
        for line in text:
            lines.append(line)
            yield line

    reader = csv.reader(noted(), **dialect)
    try:
        for cells in reader:
            if len(lines) > 1:
                list(csv.reader(lines, **{**dialect, "strict": True}))
            if cells:
                yield reader.line_num - len(lines) + 1, cells
            lines.clear()
    except csv.Error as error:
        start = reader.line_num - len(lines) + 1
        raise Malformed(f"line {start} opens a quote that is not closed, or not at the end of a cell") from error
