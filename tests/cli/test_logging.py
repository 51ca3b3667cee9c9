"""The log as lines for programs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from petals_lightning.cli.options import configure_logging
from petals_lightning.errors import ConfigurationError


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, which gets its handlers back."""
    logger = logging.getLogger()
    handlers, level = list(logger.handlers), logger.level
    logger.handlers[:] = []
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)


def test_each_record_is_an_object_on_a_line(root, capsys):
    configure_logging(form="json")
    logging.getLogger("petals_lightning.server").info("moving to blocks %d:%d\nof “x”", 2, 4)
    logging.getLogger("other.library").info("not on the screen")
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("other.library").exception("failed")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert abs(datetime.fromisoformat(first.pop("time")) - datetime.now(UTC)) < timedelta(minutes=1)
    message = "moving to blocks 2:4\nof “x”"
    assert first == {"level": "INFO", "logger": "petals_lightning.server", "message": message}
    assert (second["level"], second["message"]) == ("ERROR", "failed")
    assert second["exception"].endswith("ValueError: no")


def test_another_form_is_one_line(root):
    with pytest.raises(ConfigurationError, match="--log-format is 'xml': choose text or json"):
        configure_logging(form="xml")
