from pathlib import Path

import pytest

from twotower.commands import prepare
from twotower.config import Config, FreeText, IndexConfig, RunConfig
from twotower.data.synthetic import SyntheticConfig
from twotower.model_config import ModelConfig
from twotower.models import backbones
from twotower.settings import ConfigError
from twotower.train_config import LossConfig


def config(folder: Path) -> Config:
    return Config(
        loss=LossConfig(),
        model=ModelConfig(),
        data=SyntheticConfig(folder=str(folder / "data"), count=8),
        index=IndexConfig(),
        run=RunConfig(name="r", models_dir=str(folder / "models")),
    )


def test_a_data_set_is_laid_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare.run(config(tmp_path), FreeText())
    folder = tmp_path / "data" / "8-32-3-0"
    assert (folder / "manifest.csv").is_file()
    assert capsys.readouterr().out.splitlines() == [
        "synthetic: 8 images, 24 captions",
        "  train: 6 images, 18 captions",
        "  val: 2 images, 6 captions",
        f"  in {folder}",
    ]


def test_backbones_go_below_the_models_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders: list[Path] = []
    monkeypatch.setattr(backbones, "prepare_backbones", folders.append)
    prepare.run(config(tmp_path), FreeText(verb="backbones"))
    assert folders == [tmp_path / "models" / "pretrained"]
    assert str(folders[0]) in capsys.readouterr().out
    assert not (tmp_path / "data").exists()


def test_another_verb_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not know 'bones'; .* data set .* or backbones"):
        prepare.run(config(tmp_path), FreeText(verb="bones"))
