"""The learning curve of a run, for the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from petals_lightning.errors import UnsupportedInputError

_MOST_POINTS = 1000


def read_run(folder: Path | None) -> dict[str, Any]:
    """The newest run in a folder or below it, as docs/api.md describes it. `folder` is None where none was named."""
    from petals_lightning.callbacks.learning_curve import CURVE_FILE  # imports Lightning, which no other page needs

    curves = sorted(folder.rglob(CURVE_FILE), key=lambda path: path.stat().st_mtime) if folder is not None else []
    if not curves:
        return {"folder": str(folder) if folder is not None else None, "curve": None, "summary": None}
    path = curves[-1]
    try:
        curve = _read(path)
    except ValueError as e:
        raise UnsupportedInputError(f"{path} is not the learning curve of a run: {e}") from e
    step = len(curve["train"]) // _MOST_POINTS + 1
    curve["train"] = curve["train"][::-1][::step][::-1]  # with the newest
    summary = path.parent / "summary.json"
    return {
        "folder": str(path.parent),
        "time": path.stat().st_mtime,
        "curve": curve,
        "summary": _read(summary) if summary.is_file() else None,
    }


def _read(path: Path) -> Any:
    """JSON, in which what is no number (of a run that diverges) is null."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: None)
