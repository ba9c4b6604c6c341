"""Folders that several model tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.tiny import write_bert


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT in Hugging Face's folder format."""
    return write_bert(tmp_path_factory.mktemp("hf") / "bert")
