from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from twotower.commands import export
from twotower.config import Config, FreeText
from twotower.models.dual_encoder import MODELS
from twotower.models.openai_pretrain import OpenaiPretrainConfig
from twotower.models.saved import save_bundle
from twotower.settings import ConfigError


@dataclass
class Given:
    """The one setting that the command reads."""

    checkpoint: str


def run(checkpoint: Path, path: str | None) -> None:
    export.run(cast(Config, Given(str(checkpoint))), FreeText(path=path))


def test_the_file_and_how_to_open_it_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(export, "say", told.append)
    checkpoint, out = tmp_path / "best.safetensors", tmp_path / "out.pt"
    save_bundle(checkpoint, MODELS.build(OpenaiPretrainConfig(architecture="tiny")))
    run(checkpoint, str(out))
    assert out.is_file()
    assert f"clip.load('{out}')" in told[0] and "context_length=32" in told[0]


def test_no_path_and_no_checkpoint_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="export needs path=<name>.pt"):
        run(tmp_path / "x", None)
    with pytest.raises(ConfigError, match="no such checkpoint"):
        run(tmp_path / "x", str(tmp_path / "out.pt"))
