"""A run with wandb itself, offline: its files hold the metrics, figures and tables that went in."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import wandb
from PIL import Image

from tests.helpers import tiny_bundle, write_pictures
from twotower.config import Config
from twotower.data.manifest import ManifestConfig, load_manifest
from twotower.data.pairs import Pair, PairTable
from twotower.evaluation.published import publish_checkpoint, publish_data
from twotower.hydra_app import compose
from twotower.models.saved import save_bundle
from twotower.settings import ConfigError
from twotower.tracking import MetricWriter
from twotower.wandb_run import WandbRun, artifact_name, wandb_run


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No account, no network, nothing in the home folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    yield
    wandb.teardown()


def config(folder: Path, *overrides: str) -> Config:
    places = [f"run.logs_dir={folder}/logs", f"run.models_dir={folder}/models", "run.name=mine"]
    return compose([*places, "model=openai_pretrain", "train.wandb=true", *overrides])


def records(logs: Path) -> bytes:
    """What the offline runs under a folder would send: protocol buffers, their texts in clear."""
    wandb.teardown()  # an offline run's last records reach the disk when its service ends
    return b"".join(path.read_bytes() for path in sorted(logs.glob("wandb/offline-*/*.wandb")))


def test_a_run_from_metrics_to_artifacts(tmp_path: Path) -> None:
    logs = tmp_path / "logs" / "mine"
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    pictures = write_pictures(tmp_path / "pictures", 3)
    rows = [Pair(path.name, caption, "val", path.name) for path, caption in pictures]
    pairs = PairTable.from_pairs(rows, tmp_path / "pictures", "three")
    best = tmp_path / "models" / "mine" / "best.safetensors"
    save_bundle(best, tiny_bundle(), run="mine", step=7, metrics={"mean_recall": 61.375})
    cell = Image.fromarray(pixels).resize((8, 8))
    chosen = config(tmp_path, "train.lr=0.001234", "run.wandb_project=our project")
    with wandb_run(chosen, resumed=False) as run, MetricWriter(logs, wandb=run) as writer:
        assert run is not None and writer.takes_tables
        writer.write(3, {"train/loss": 2.015625, "val/mean_recall": 40.5})
        writer.image("figures/matrix", pixels, 3)
        writer.table("figures/match_table", ["caption", "own"], [["a dog", cell], ["x", None]], 3)
        publish_data(run, pairs, "manifest", logs)
        publish_checkpoint(run, best, "mine")
    sent = records(logs)
    for text in ("our project", "mine", "train/loss", "2.015625", "val/mean_recall", "40.5"):
        assert text.encode() in sent
    for text in ("0.001234", "openai_pretrain", "figures/matrix", "figures/match_table"):
        assert text.encode() in sent
    for text in ("best.safetensors", "61.375", "pairs.parquet", "manifest-", "dataset", "model"):
        assert text.encode() in sent
    media = next(logs.glob("wandb/offline-*/files/media"))
    written = np.array(Image.open(next(media.glob("images/figures/matrix*.png"))))
    assert np.array_equal(written, pixels)
    # Tables travel as artifacts, whose files are staged under the hash of what they hold.
    staged = [path.read_bytes() for path in (tmp_path / "wandb_data_dir").rglob("staging/tmp*")]
    table = next(json.loads(data) for data in staged if data.startswith(b'{"_type": "table"'))
    assert table["columns"] == ["caption", "own"]
    assert [row[0] for row in table["data"]] == ["a dog", "x"] and table["data"][1][1] is None
    wanted = table["data"][0][1]["sha256"]
    [picture] = [data for data in staged if hashlib.sha256(data).hexdigest() == wanted]
    assert np.array_equal(np.array(Image.open(io.BytesIO(picture))), np.array(cell))
    assert best.read_bytes() in staged
    # What went out as an artifact is a manifest that reads as the pairs.
    read = ManifestConfig(manifest=str(logs / "pairs.parquet"), root=str(tmp_path / "pictures"))
    assert load_manifest(read).table.equals(pairs.table)


def test_a_resumed_run_goes_on_under_its_id_and_a_new_one_has_its_own(tmp_path: Path) -> None:
    logs = tmp_path / "logs" / "mine"
    ids = []
    for resumed in (False, True, False):
        with wandb_run(config(tmp_path), resumed=resumed) as run:
            assert run is not None
            run.write(1, {"train/loss": 1.0})
        ids.append(json.loads((logs / "wandb.json").read_text())["id"])
    assert ids[0] == ids[1] != ids[2]
    assert len(list(logs.glob(f"wandb/offline-run-*-{ids[0]}"))) in (1, 2)  # two within a second
    assert len(list(logs.glob(f"wandb/offline-run-*-{ids[2]}"))) == 1


def test_what_was_not_asked_for_does_not_even_import_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with wandb_run(config(tmp_path, "train.wandb=false"), resumed=False) as run:
        assert run is None
    assert not (tmp_path / "logs").exists()
    wanted = r"^train.wandb=true needs the package wandb.*pip install 'twotower\[wandb\]'$"
    with (
        pytest.raises(ConfigError, match=wanted),
        wandb_run(config(tmp_path), resumed=False),
    ):
        pass
    monkeypatch.delitem(sys.modules, "wandb")  # the fixture ends with it


def test_nobody_logged_in_gets_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="Weights & Biases cannot be used .*`wandb login`"):
        WandbRun("p", "n", tmp_path / "logs", {})


def test_an_error_marks_the_run_as_failed(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        wandb_run(config(tmp_path), resumed=False) as run,
    ):
        assert run is not None
        codes: list[int] = []
        plain = run._run.finish
        run._run.finish = lambda exit_code: (codes.append(exit_code), plain(exit_code))
        raise RuntimeError("in the middle")
    assert codes == [1]


def test_names_that_wandb_takes() -> None:
    assert artifact_name("a run=1, ü/2") == "a-run-1----2"
    assert artifact_name("bert_resnet-flickr8k-1a2b.3") == "bert_resnet-flickr8k-1a2b.3"
    assert len(artifact_name("x" * 200)) == 128


def test_artifacts_that_are_read_are_noted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with wandb_run(config(tmp_path), resumed=False) as run:
        assert run is not None
        run.uses("wandb:me/p/data:v2")  # offline: nothing happens

        class Online:
            offline = False
            used: list[str] = []

            def use_artifact(self, name: str) -> None:
                self.used.append(name)
                if "gone" in name:
                    raise wandb.errors.CommError("no such artifact")

        plain, run._run = run._run, Online()
        for given in ("wandb:me/p/data:v2", "a/b.csv", "wandb:me/p/gone:v0"):
            run.uses(given)
        run._run = plain
    assert Online.used == ["me/p/data:v2", "me/p/gone:v0"]
    assert "does not note that me/p/gone:v0 is read: no such artifact" in caplog.text
