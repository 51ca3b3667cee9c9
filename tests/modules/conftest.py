from __future__ import annotations

from pathlib import Path

import pytest

from tests.text_models import save_tiny_text_model, write_dataset


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with its tokenizer."""
    return save_tiny_text_model(tmp_path_factory.mktemp("text_model"))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 training, 16 validation and 16 test texts in two classes."""
    return write_dataset(tmp_path_factory.mktemp("texts"))
