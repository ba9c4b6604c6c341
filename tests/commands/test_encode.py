"""`twotower encode` finds its source, checkpoint and store, and says what it made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.embedding.parts import ONE_THREAD, bundle_of
from tests.helpers import write_pictures
from twotower.commands.encode import run
from twotower.config import Config, FreeText, IndexConfig, RunConfig
from twotower.data.folder import CaptionsFrom, FolderConfig
from twotower.embedding import encoder
from twotower.embedding.store import EmbeddingStore
from twotower.encode_config import EncodeConfig
from twotower.model_config import ModelConfig
from twotower.settings import ConfigError
from twotower.train_config import LossConfig


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run with a checkpoint, and a folder of seven pictures with captions beside five of them."""
    monkeypatch.setattr(encoder, "load_bundle", bundle_of)
    (tmp_path / "models" / "a run").mkdir(parents=True)
    (tmp_path / "models" / "a run" / "best.safetensors").write_text("0")
    for path, caption in write_pictures(tmp_path / "pictures", 7)[:5]:
        path.with_suffix(".txt").write_text(caption)
    return Config(
        loss=LossConfig(),
        model=ModelConfig(),
        data=FolderConfig(folder=str(tmp_path / "pictures"), captions=CaptionsFrom.text),
        index=IndexConfig(),
        run=RunConfig(name="a run", models_dir=str(tmp_path / "models")),
        encode=EncodeConfig(batch_size=4),
        distributed=ONE_THREAD,
    )


def test_the_data_section_goes_into_the_store_of_the_run(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config, FreeText())
    folder = tmp_path / "models" / "a run" / "store"
    store = EmbeddingStore.open(folder)
    assert len(store) == 5 and store.has_texts
    printed = capsys.readouterr().out
    assert printed.startswith("encoded 5 rows of 12 (fp16) in ")
    assert printed.endswith(f" images/s; the store is {folder}\n")
    run(config, FreeText())
    assert capsys.readouterr().out.startswith(f"kept the store {folder}: 5 rows of 12 (fp16); ")


def test_path_takes_the_place_of_the_data_section(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    config.encode.output = str(tmp_path / "elsewhere")
    run(config, FreeText(path=str(tmp_path / "pictures")))
    store = EmbeddingStore.open(tmp_path / "elsewhere")
    assert len(store) == 7 and not store.has_texts
    assert "encoded 7 rows of 12 (fp16), 1 unreadable (errors.parquet) in" in (
        capsys.readouterr().out
    )
    assert not (tmp_path / "models" / "a run" / "store").exists()
    made = encoder.Encoder(bundle_of(tmp_path / "models" / "a run" / "best.safetensors"))
    paths = [entry["image_path"] for entry in store.metadata(store.row_ids())]
    assert np.allclose(store.image_shards()[0], made.encode_images(paths), atol=1e-3)


def test_one_split_alone(config: Config, tmp_path: Path) -> None:
    config.encode.split = "train"
    run(config, FreeText())
    store = EmbeddingStore.open(tmp_path / "models" / "a run" / "store")
    splits = {entry["split"] for entry in store.metadata(store.row_ids())}
    assert splits == {"train"} and len(store) < 5
    config.encode.split = "exam"
    with pytest.raises(ConfigError, match="has no split 'exam'"):
        run(config, FreeText())


def test_a_missing_checkpoint_is_said_before_anything_is_read(config: Config) -> None:
    config.checkpoint = "nowhere/best.safetensors"
    with pytest.raises(ConfigError, match="no checkpoint at nowhere/best.safetensors; train one"):
        run(config, FreeText(path="/does/not/exist"))


def test_a_few_pictures_and_a_copy_in_the_older_layout(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.encode.limit = 3
    config.encode.legacy_output = str(tmp_path / "older")
    run(config, FreeText())
    store = EmbeddingStore.open(tmp_path / "models" / "a run" / "store")
    older = EmbeddingStore.open(tmp_path / "older")
    assert len(store) == len(older) == 3
    assert np.allclose(store.image_shards()[0], older.image_shards()[0], atol=1e-3)
    paths = [[e["image_path"] for e in each.metadata(range(3))] for each in (store, older)]
    assert paths[0] == paths[1]
    assert "wrote 1 files of the older layout into" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="is not empty; give encode.legacy_output an empty"):
        run(config, FreeText())
