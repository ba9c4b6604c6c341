"""A source with all that goes wrong in it, and a checkpoint whose loader needs no variant."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.embedding.parts import bundle_of, make_source
from twotower.data.pairs import PairTable
from twotower.embedding import encoder


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> PairTable:
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stands for a checkpoint; its text is the seed of the weights."""
    monkeypatch.setattr(encoder, "load_bundle", bundle_of)
    path = tmp_path / "best.safetensors"
    path.write_text("0")
    return path
