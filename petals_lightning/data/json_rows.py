"""The rows of JSON files in their various forms."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from petals_lightning.data.opening import Malformed, TextFormat, open_text
from petals_lightning.data.tables import table_of

_BETWEEN = re.compile(r"[\s,]*")
_TURN_KEYS = {"role", "from", "candidates"}
"""Fields of a dialogue's turns: a list of such objects is a value of one row, not a list of rows."""


def read_json_lines(path: Path, form: TextFormat) -> pa.Table:
    """Reads objects, one per line or one after another, each a row; or an array of objects.

    Raises:
        Malformed: the file is not JSON, or its values are not objects.
    """
    with open_text(path, form) as text:
        return table_of(_values(text))


def read_json(path: Path, form: TextFormat) -> pa.Table:
    """As `read_json_lines`; a single object may hold the rows: `{"data": […]}`, or any of pandas' forms."""
    with open_text(path, form) as text:
        values = _values(text)
        first = list(islice(values, 2))
        if len(first) == 1 and isinstance(first[0], dict):
            return table_of(_rows_within(first[0]))
        return table_of(chain(first, values))


def read_json_lists(path: Path, form: TextFormat) -> dict[str, pa.Table]:
    """The named lists of rows in a file's single object; empty if there are not several."""
    with open_text(path, form) as text:
        first = list(islice(_values(text), 2))
    if len(first) != 1 or not isinstance(first[0], dict):
        return {}
    lists = {key: rows for key, rows in first[0].items() if _are_rows(rows)}
    return {key: table_of(rows) for key, rows in lists.items()} if len(lists) > 1 and "data" not in lists else {}


def _values(text: IO[str]) -> Iterator[Any]:
    """The values of a file: one per line, which needs little memory, or one after another, or an array's."""
    number, line = next(((number, line) for number, line in enumerate(text, 1) if line.strip()), (1, ""))
    try:
        first = json.loads(line)
    except json.JSONDecodeError:
        first = None
    if not isinstance(first, dict):
        yield from _values_over_lines(line + text.read(), number)
        return
    yield first
    for later, line in enumerate(text, number + 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise _broken(error, later) from error


def _values_over_lines(text: str, first_line: int) -> Iterator[Any]:
    is_array = text.lstrip().startswith("[")
    at = text.index("[") + 1 if is_array else 0
    decoder = json.JSONDecoder()
    while (at := _BETWEEN.match(text, at).end()) < len(text) and text[at] != "]":  # type: ignore[union-attr]
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _broken(error, first_line) from error
        yield value
    if text[at:].strip() != ("]" if is_array else ""):
        raise Malformed("its array is not closed, or something follows it")


def _broken(error: json.JSONDecodeError, first_line: int) -> Malformed:
    return Malformed(f"line {first_line + error.lineno - 1}, character {error.colno}: {error.msg}")


def _rows_within(value: dict[str, Any]) -> Iterable[Any]:
    """The rows in a file's only object, or the object itself if it is a row."""
    match value:
        case {"columns": list(names), "data": [list(), *_] as rows}:  # pandas' orient="split"
            return [dict(zip(names, cells, strict=True)) for cells in rows]
    lists = {key: rows for key, rows in value.items() if _are_rows(rows)}
    if "data" in lists or len(lists) == 1:
        return lists.get("data") or next(iter(lists.values()))
    if lists:
        raise Malformed(f"it holds several lists ({', '.join(lists)}): put each into its own file")
    columns = list(value.values())
    if len(value) > 1 and all(isinstance(column, dict) and column for column in columns):
        if not all(key.isdigit() for key in columns[0]):  # rows by their ids; pandas' orient="index"
            return columns
        if all(column.keys() == columns[0].keys() for column in columns):  # pandas' default
            return [{name: cells[key] for name, cells in value.items()} for key in columns[0]]
    if len(value) > 1 and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return [value]


def _are_rows(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(row, dict) and not _TURN_KEYS & row.keys() for row in value)
    )
