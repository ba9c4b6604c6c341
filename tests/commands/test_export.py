from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from tests.models.tiny import VIT, clip_bundle
from twotower.commands import export
from twotower.config import Config, ExportFormat, FreeText
from twotower.models.saved import save_bundle
from twotower.settings import ConfigError


@dataclass
class Given:
    """The settings that the command reads."""

    checkpoint: str
    format: ExportFormat = ExportFormat.openai


def run(checkpoint: Path, path: str | None, kind: str = "openai") -> None:
    export.run(cast(Config, Given(str(checkpoint), ExportFormat[kind])), FreeText(path=path))


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("openai", "clip.load('{}') and clip.tokenize(texts, context_length=9)"),
        ("open_clip", "open_clip.create_model_and_transforms('local-dir:{}')"),
        ("hf", "CLIPModel.from_pretrained('{}')"),
        pytest.param("onnx", "InferenceSession('{}/image.onnx')", marks=pytest.mark.slow),
    ],
)
def test_what_is_written_and_how_to_open_it_are_told(
    kind: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(export, "say", told.append)
    checkpoint, out = tmp_path / "best.safetensors", tmp_path / "out"
    save_bundle(checkpoint, clip_bundle(VIT))
    run(checkpoint, str(out), kind)
    assert out.is_dir() != (kind == "openai")
    assert hint.format(out) in told[0]
    trained_on = f"or train on from it: model=openai_finetune model.weights={out}"
    assert told[1:] == ([] if kind == "onnx" else [trained_on])


def test_no_path_and_no_checkpoint_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="export needs path=<name>.pt, the file to write"):
        run(tmp_path / "x", None)
    with pytest.raises(ConfigError, match="export needs path=<folder> to write"):
        run(tmp_path / "x", None, "hf")
    with pytest.raises(ConfigError, match="no such checkpoint"):
        run(tmp_path / "x", str(tmp_path / "out.pt"))
