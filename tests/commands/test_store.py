"""`twotower store` says what a store holds, and refuses what it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.embedding.parts import ONE_THREAD, bundle_of, make_source
from twotower.commands.store import run
from twotower.config import Config, DataConfig, FreeText, IndexConfig, RunConfig
from twotower.embedding import encoder
from twotower.embedding.export import export
from twotower.embedding.store import EmbeddingStore
from twotower.encode_config import EncodeConfig, StoresConfig
from twotower.model_config import ModelConfig
from twotower.settings import ConfigError
from twotower.train_config import LossConfig


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(encoder, "load_bundle", bundle_of)
    checkpoint = tmp_path / "best.safetensors"
    checkpoint.write_text("0")
    source = make_source(tmp_path / "source").head(20)
    for name in ("store", "other"):
        export(checkpoint, source, tmp_path / name, EncodeConfig(batch_size=4), ONE_THREAD)
    return Config(
        loss=LossConfig(),
        model=ModelConfig(),
        data=DataConfig(),
        index=IndexConfig(),
        run=RunConfig(name="run", models_dir=str(tmp_path)),
        distributed=ONE_THREAD,
        store=str(tmp_path / "store"),
        stores=StoresConfig(inputs=[str(tmp_path / "store"), str(tmp_path / "other")], sample=5),
    )


def test_each_verb(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(config, FreeText(verb="info"))
    told = capsys.readouterr().out
    manifest = EmbeddingStore.open(tmp_path / "store").manifest
    for part in (f"{manifest.rows} (images) of dimension 12, fp16", manifest.fingerprint, "url"):
        assert part in told
    run(config, FreeText(verb="verify"))
    assert "14 rows in 1 shards are what was written, 5 pictures" in capsys.readouterr().out
    run(config, FreeText(verb="merge", path=str(tmp_path / "both")))
    assert "merged 2 stores into" in capsys.readouterr().out
    assert len(EmbeddingStore.open(tmp_path / "both")) == 28
    with pytest.raises(ConfigError, match="nothing to compact"):
        run(config, FreeText(verb="compact"))


def test_what_is_wrong_is_said(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    for verb, words in ((None, "store does not know what to do"), ("look", "know look; it takes")):
        with pytest.raises(ConfigError, match=words):
            run(config, FreeText(verb=verb))
    with pytest.raises(ConfigError, match="say where with path="):
        run(config, FreeText(verb="merge"))
    (Path(config.store).parent / "best.safetensors").unlink()
    run(config, FreeText(verb="verify"))
    assert "is not there: no row is encoded again" in caplog.text
