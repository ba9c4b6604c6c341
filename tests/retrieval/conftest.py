"""A store of small pictures with captions that try to break what prints them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import tiny_bundle, write_pictures
from twotower.config import Config, DataConfig, DistributedConfig, RunConfig
from twotower.data.pairs import Pair, PairTable
from twotower.embedding import encoder
from twotower.embedding.export import export
from twotower.embedding.store import EmbeddingStore
from twotower.encode_config import EncodeConfig
from twotower.model_config import ModelConfig
from twotower.models.dual_encoder import ModelBundle
from twotower.retrieval.exact import ExactConfig
from twotower.train_config import LossConfig

COUNT = 30
CAPTIONS = {
    0: "[red]no markup[/red] :dog: {x}",
    1: "浜辺を走る犬",
    2: "long " * 2000,
    3: "line\nbreak\tand \x1b[31mescape",
}
UNREADABLE_LATER = 4


def bundle_of(checkpoint: Path) -> ModelBundle:
    """The bundle of a checkpoint whose text is a seed."""
    return tiny_bundle(seed=int(checkpoint.read_text()))


@pytest.fixture
def any_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file with a number stand for a checkpoint."""
    monkeypatch.setattr(encoder, "load_bundle", bundle_of)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    """30 pictures in shards of 8; the fifth picture is cut after it was encoded."""
    root = tmp_path_factory.mktemp("models") / "run"
    made = write_pictures(root / "pictures", COUNT)
    pairs = [
        Pair(path.name, CAPTIONS.get(row, caption), "train", f"id{row}")
        for row, (path, caption) in enumerate(made)
    ]
    table = PairTable.from_pairs(pairs, root / "pictures", "squares")
    checkpoint = root / "best.safetensors"
    checkpoint.write_text("0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "load_bundle", bundle_of)
        export(
            checkpoint,
            table,
            root / "store",
            EncodeConfig(shard_rows=8, batch_size=4),
            DistributedConfig(num_threads=1),
        )
    path = made[UNREADABLE_LATER][0]
    path.write_bytes(path.read_bytes()[:100])
    return EmbeddingStore.open(root / "store")


@pytest.fixture
def config(store: EmbeddingStore, tmp_path: Path) -> Config:
    """A search of that store whose outputs go to the test's own folder."""
    return Config(
        loss=LossConfig(),
        model=ModelConfig(),
        data=DataConfig(),
        index=ExactConfig(),
        run=RunConfig(name="run", models_dir=str(tmp_path), logs_dir=str(tmp_path / "logs")),
        distributed=DistributedConfig(num_threads=1),
        store=str(store.folder),
    )
