"""Calls recorded between a Petals client and a Petals server."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hivemind.proto.runtime_pb2 import ExpertInfo, ExpertRequest, ExpertResponse, ExpertUID

CALLS = Path(__file__).resolve().parents[3] / "shared" / "data" / "petals-wire" / "calls.json"


@dataclass
class Call:
    """One call: `method` without the servicer's name, protobufs of its requests and responses in order."""

    case: str
    kind: str
    method: str
    requests: list[Any]
    responses: list[Any]

    @property
    def name(self) -> str:
        return f"{self.case}-{self.method}"


def recorded_calls() -> list[Call]:
    """Skips where the recording is missing."""
    if not CALLS.is_file():
        pytest.skip(f"needs the recorded calls of {CALLS}, which are not part of the project")
    calls = []
    for entry in json.loads(CALLS.read_text())["calls"]:
        method = entry["method"].removeprefix("TransformerConnectionHandler.")
        asked, told = (ExpertUID, ExpertInfo) if method == "rpc_info" else (ExpertRequest, ExpertResponse)
        requests = [asked.FromString(base64.b64decode(item)) for item in entry["requests"]]
        responses = [told.FromString(base64.b64decode(item)) for item in entry["responses"]]
        calls.append(Call(entry["case"], entry["kind"], method, requests, responses))
    return calls
