"""The bundled sample, for first runs and tests: a small causal LM, labelled reviews, dialogues and preferences.

All are synthetic. `tools/sample` of the repository makes them.
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
"""A sharded Llama checkpoint with its tokenizer, for `from_pretrained`."""

REVIEWS_DIR: Path = Path(__file__).parent / "reviews"
"""`train.jsonl`, `validation.jsonl` and `test.jsonl` with the fields `sentence` and `label`."""

DIALOGUES_DIR: Path = Path(__file__).parent / "dialogues"
"""`train.jsonl`, `validation.jsonl` and `test.jsonl` with the field `turns`, the user's first."""

PREFERENCES_DIR: Path = Path(__file__).parent / "preferences"
"""`train.jsonl`, `validation.jsonl` and `test.jsonl` with the fields `prompt`, `chosen` and `rejected`."""

__all__ = ["DIALOGUES_DIR", "MODEL_DIR", "PREFERENCES_DIR", "REVIEWS_DIR"]
