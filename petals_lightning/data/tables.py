"""Rows as Arrow tables, even if the types of a column differ between rows or files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from itertools import islice
from typing import Any

import pyarrow as pa

from petals_lightning.data.opening import Malformed

BATCH_ROWS = 10_000
"""Rows that are Python objects at the same time."""


def table_of(rows: Iterable[Any]) -> pa.Table:
    """The table of rows {column: value}; missing values are null.

    Raises:
        Malformed: a row is not a dict, or contains half of a surrogate pair.
    """
    rows, tables, done = iter(rows), [], 0
    while batch := list(islice(rows, BATCH_ROWS)):
        for number, row in enumerate(batch, done):
            if not isinstance(row, dict):
                raise Malformed(f"row {number} is {row!r:.60}, not an object whose keys are the columns")
        columns = dict.fromkeys(name for row in batch for name in row)
        tables.append(pa.table({name: _array([row.get(name) for row in batch], name, done) for name in columns}))
        done += len(batch)
    return joined(tables) if tables else pa.table({})


def joined(tables: list[pa.Table]) -> pa.Table:
    """The rows of all tables. Different types of a column become the wider type, or else strings, or else JSON."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException:
        alike = [_with_common_types(table, tables) for table in tables]
        return pa.concat_tables(alike, promote_options="permissive")


def _with_common_types(table: pa.Table, tables: list[pa.Table]) -> pa.Table:
    for number, name in enumerate(table.column_names):
        types = {other.schema.field(name).type for other in tables if name in other.column_names}
        try:
            pa.unify_schemas([pa.schema([(name, type_)]) for type_ in types], promote_options="permissive")
        except pa.ArrowException:
            if table.schema.field(name).type != pa.json_():
                values = table[name].to_pylist()
                simple = not any(pa.types.is_nested(type_) or type_ == pa.json_() for type_ in types)
                table = table.set_column(number, name, _as_strings(values) if simple else _as_json(values))
    return table.replace_schema_metadata(None)  # it may describe the old types


def _array(values: list[Any], column: str, first_row: int) -> pa.Array:
    # Arrow would give all objects of a column the same keys: calls of tools would get additional arguments.
    if any(isinstance(value, (dict, list)) for value in values):
        return _as_json(values)
    try:
        return pa.array(values)
    except UnicodeEncodeError as error:
        row = next(row for row, value in enumerate(values, first_row) if not _is_unicode(value))
        raise Malformed(f"row {row} has half of a surrogate pair in column {column!r}") from error
    except (pa.ArrowException, OverflowError):
        return _as_strings(values)


def _as_strings(values: list[Any]) -> pa.Array:
    return pa.array([_written(value) for value in values], pa.string())


def _written(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):  # pandas' missing value
        return None
    return str(value)


def _as_json(values: list[Any]) -> pa.Array:
    """Values of any type, which `datasets` returns unchanged (its feature `Json`)."""
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array([json.dumps(value) for value in values], pa.string()))


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
