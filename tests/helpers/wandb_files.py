"""What an offline W&B run has written."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any


def read_wandb_history(path: Path) -> list[dict]:
    """The logged rows of an offline run."""
    items = [record.history.item for record in read_wandb(path) if record.HasField("history")]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in items]


def read_wandb(path: Path) -> list[Any]:
    """The records of an offline run. (W&B 0.31 has no reader in Python; the file is a LevelDB log of protobufs.)"""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2
    file, at, record, records = path.read_bytes(), 7, b"", []  # 7 bytes of header
    while at + 7 <= len(file):
        if (rest := 2**15 - at % 2**15) < 7:  # blocks of 32 KiB; a chunk's header is not cut in two
            at += rest
            continue
        _, length, kind = struct.unpack("<IHB", file[at : at + 7])
        record += file[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last chunk
            records.append(messages.Record.FromString(record))
            record = b""
    return records


def read_wandb_summary(path: Path) -> dict[str, Any]:
    """The last summary of an offline run."""
    found: dict[str, Any] = {}
    for record in read_wandb(path):
        if record.HasField("summary"):
            for item in record.summary.update:
                found[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return found
