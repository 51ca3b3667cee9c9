"""The bundled sample: a small causal LM and labelled reviews in SST-2's form, for first runs and tests.

Both are synthetic: see :mod:`~petals_lightning.sample.grammar`. To make them anew::

    python -m petals_lightning.sample.make_reviews
    python -m petals_lightning.sample.pretrain
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
"""A sharded Llama checkpoint with its tokenizer, for ``from_pretrained``."""

REVIEWS_DIR: Path = Path(__file__).parent / "reviews"
"""``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` with the fields ``sentence`` and ``label``."""

__all__ = ["MODEL_DIR", "REVIEWS_DIR"]
