"""What holds for every format: the check sees what is wrong, and nothing wrong is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.export.parts import export
from tests.models.tiny import VIT, clip_bundle
from twotower.config import ExportFormat
from twotower.export import huggingface
from twotower.export.formats import EXPORTERS, Exporter
from twotower.export.probe import make_probe
from twotower.models.clip_weights import read_clip
from twotower.models.dual_encoder import MODELS, ModelBundle
from twotower.models.openai_finetune import OpenaiFinetuneConfig
from twotower.settings import ConfigError

FORMATS = [kind.name for kind in ExportFormat]


def test_every_format_has_an_exporter() -> None:
    assert list(EXPORTERS) == list(ExportFormat)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same model in any format, written once."""
    folder = tmp_path_factory.mktemp("written")

    def write(kind: str) -> Path:
        path, exporter = folder / kind, EXPORTERS[ExportFormat[kind]]
        if not path.exists():
            if exporter.folder:
                path.mkdir()
            exporter.write(clip_bundle(VIT), path)
        return path

    return write


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_check_sees_a_small_difference_in_either_tower(
    kind: str, tower: str, written: Callable[[str], Path]
) -> None:
    """One row of one projection is a little off."""
    bundle, path = clip_bundle(VIT), written(kind)
    probe = make_probe(bundle, path)
    exporter = EXPORTERS[ExportFormat[kind]]
    exporter.check(bundle, path, probe)
    name = {"image": "image_tower.trunk.1.proj", "text": "text_tower.trunk.text_projection"}
    with torch.no_grad():
        bundle.model.get_parameter(name[tower])[0].mul_(1.05)
    with pytest.raises(RuntimeError, match=f"the {tower} features that .* gives differ from those"):
        exporter.check(bundle, path, probe)


@pytest.mark.parametrize("kind", ["openai", "open_clip"])
def test_what_came_out_different_is_not_kept(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = EXPORTERS[ExportFormat[kind]]

    def write(bundle: ModelBundle, path: Path) -> None:
        with torch.no_grad():
            wrong = clip_bundle(VIT)
            wrong.model.get_parameter("text_tower.trunk.text_projection").mul_(1.01)
        exporter.write(wrong, path)

    values: dict[str, Any] = {**vars(exporter), "write": write}
    monkeypatch.setitem(EXPORTERS, ExportFormat[kind], Exporter(**values))
    with pytest.raises(RuntimeError, match="nothing was written"):
        export(clip_bundle(VIT), kind, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_activation_is_noticed(tmp_path: Path) -> None:
    """GELU instead of QuickGELU is the smallest of the mistakes that people make."""
    bundle = clip_bundle(VIT)
    huggingface.write(bundle, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("quick_gelu", "gelu"))
    with pytest.raises(RuntimeError, match="the image features that CLIPModel gives differ"):
        huggingface.check(bundle, tmp_path, make_probe(bundle, tmp_path / "best.safetensors"))


@pytest.mark.parametrize("kind", ["openai", "open_clip", "hf"])
def test_the_bias_of_a_sigmoid_loss_is_no_obstacle(kind: str, tmp_path: Path) -> None:
    bundle = clip_bundle(VIT)
    bundle.model.start_temperature(1.0, -10.0)
    export(bundle, kind, tmp_path / "out")
    weights = read_clip(tmp_path / "out").weights
    assert ("logit_bias" in weights) == (kind == "open_clip")
    assert weights["logit_scale"] == 1
    MODELS.build(OpenaiFinetuneConfig(weights=str(tmp_path / "out")))


def test_an_earlier_export_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(clip_bundle(VIT), "open_clip", out)
    export(clip_bundle(VIT, quick_gelu=False), "open_clip", out)
    config = json.loads((out / "open_clip_config.json").read_text())
    assert config["model_cfg"]["quick_gelu"] is False
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"out holds notes.txt, which would be lost; give a new"):
        export(clip_bundle(VIT), "open_clip", out)
    assert json.loads((out / "open_clip_config.json").read_text()) == config
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("kind", "name", "sentence"),
    [
        ("openai", "folder", "format=openai writes one file, but path=.*folder is a folder"),
        ("onnx", "model.onnx", "format=onnx writes a folder, but .* like a file; give path=.*/mod"),
        ("hf", "file", "file is a file; give the name of a folder"),
        ("hf", "file/below", "cannot write .*file/below: Not a directory"),
        ("open_clip", "..", "must name the folder to write"),
    ],
)
def test_a_place_of_another_kind_is_refused(
    kind: str, name: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=sentence):
        export(clip_bundle(VIT), kind, tmp_path / name)
