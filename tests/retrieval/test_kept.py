from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest

from twotower.config import IndexConfig
from twotower.embedding.store import EmbeddingStore
from twotower.engine_config import Engine
from twotower.retrieval.auto.card import Card, Tried
from twotower.retrieval.auto.config import AutoConfig
from twotower.retrieval.build import build_index
from twotower.retrieval.exact import ExactConfig
from twotower.retrieval.faiss_index import FaissConfig, FaissIndex
from twotower.retrieval.index import Modality, SearchResult, VectorIndex
from twotower.retrieval.kept import Made, keep_index, kept_folder, make_index, open_index
from twotower.retrieval.milvus.collection import MilvusConfig
from twotower.retrieval.rerank import RerankedIndex
from twotower.settings import ConfigError

IVF = FaissConfig(factory="IVF2,Flat", nprobe=2)
HNSW = FaissConfig(factory="HNSW8", ef_search=30)


@pytest.fixture
def here(store: EmbeddingStore, tmp_path: Path) -> EmbeddingStore:
    """The store under a name in the test's own folder."""
    (tmp_path / "store").symlink_to(store.folder)
    return EmbeddingStore.open(tmp_path / "store")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is trained and filled, in order."""
    work: list[str] = []
    train, add = FaissIndex.train, FaissIndex.add

    def training(self: FaissIndex, *args: object, **kwargs: object) -> None:
        work.append("train")
        train(self, *args, **kwargs)  # type: ignore[arg-type]

    def adding(self: FaissIndex, *args: object, **kwargs: object) -> None:
        work.append("add")
        add(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(FaissIndex, "train", training)
    monkeypatch.setattr(FaissIndex, "add", adding)
    return work


def found(index: VectorIndex, store: EmbeddingStore) -> SearchResult:
    return index.search(np.concatenate(store.text_shards()).astype(np.float32), 5)


def assert_same(one: SearchResult, other: SearchResult) -> None:
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_array_equal(one.scores, other.scores)


@pytest.mark.parametrize("config", [IVF, HNSW])
def test_a_second_search_uses_the_kept_index(
    config: FaissConfig,
    here: EmbeddingStore,
    built: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "twotower")
    first = found(open_index(config, here), here)
    assert "add" in built
    assert "using the index" not in caplog.text
    built.clear()
    again = open_index(config, here)
    assert built == []
    assert f"using the index {kept_folder(config, here)}" in caplog.text
    assert again.config == config
    assert_same(found(again, here), first)


def test_indexes_of_one_store_are_kept_side_by_side(here: EmbeddingStore, built: list[str]) -> None:
    for config in (IVF, HNSW):
        open_index(config, here)
    built.clear()
    for config in (IVF, HNSW):
        open_index(config, here)
    assert built == []
    kept = sorted(path.name for path in (here.folder.parent / "index").iterdir())
    assert kept == ["store-HNSW8", "store-IVF2,Flat"]


def other_store(store: EmbeddingStore) -> EmbeddingStore:
    shards = store.manifest.shards[:-1]
    rows = sum(shard.rows for shard in shards)
    return EmbeddingStore(
        store.folder, dataclasses.replace(store.manifest, shards=shards, rows=rows)
    )


def test_a_changed_store_gets_a_new_index_in_place_of_the_old(
    here: EmbeddingStore, built: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "twotower")
    open_index(IVF, here)
    changed = other_store(here)
    index = open_index(IVF, changed)
    assert "was built from other rows or with other settings; building it again" in caplog.text
    assert len(index) == len(changed) < len(here)
    assert len(list(kept_folder(IVF, here).iterdir())) == 2
    built.clear()
    assert_same(found(open_index(IVF, changed), here), found(index, here))
    assert built == []


@pytest.mark.parametrize("change", [{"sample_rows": 20}, {"seed": 2}])
def test_other_settings_get_a_new_index(
    change: dict[str, int], here: EmbeddingStore, built: list[str]
) -> None:
    open_index(IVF, here)
    built.clear()
    seed = change.pop("seed", 1)
    other = open_index(dataclasses.replace(IVF, **change), here, seed)
    assert "train" in built
    assert other.config == dataclasses.replace(IVF, **change)


def test_other_search_settings_open_the_same_index(
    here: EmbeddingStore, built: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = found(open_index(IVF, here), here)
    built.clear()
    for change in ({"nprobe": 1}, {"memory_map": True}, {"rerank": 6.0}):
        config = dataclasses.replace(IVF, **change)  # type: ignore[arg-type]
        opened = open_index(config, here)
        assert opened.config == config
        if "nprobe" not in change:
            np.testing.assert_array_equal(found(opened, here).ids, first.ids)
    assert built == []
    named = dataclasses.replace(IVF, folder=str(kept_folder(IVF, here)), nprobe=0, rerank=2.0)
    again = open_index(named, here)
    assert isinstance(again.config, FaissConfig)
    assert (again.config.nprobe, again.config.rerank) == (2, 2.0)  # as saved; as asked


def test_rows_stay_in_the_store_where_they_re_rank(here: EmbeddingStore) -> None:
    config = FaissConfig(factory="SQ8", rerank=4)
    exact = found(open_index(ExactConfig(), here), here)
    for index in (open_index(config, here), open_index(config, here)):
        assert isinstance(index, RerankedIndex)
        assert all(isinstance(part.rows, np.memmap) for part in index._rows.parts)
        assert index.nbytes == index.inner.nbytes
        assert_same(found(index, here), exact)


def test_a_mapped_index_is_mapped_by_the_search_that_builds_it_too(here: EmbeddingStore) -> None:
    config = FaissConfig(factory="SQ8", memory_map=True)
    for index in (open_index(config, here), open_index(config, here)):
        with pytest.raises(ConfigError, match="opens an index for searching only"):
            index.delete(np.array([0]))


def test_a_damaged_index_is_built_again(here: EmbeddingStore, built: list[str]) -> None:
    first = found(open_index(HNSW, here), here)
    (data,) = kept_folder(HNSW, here).glob("*.bin")
    data.write_bytes(data.read_bytes()[:100])
    built.clear()
    assert_same(found(open_index(HNSW, here), here), first)
    assert "add" in built
    built.clear()
    open_index(HNSW, here)
    assert built == []


def test_where_nothing_can_be_written_the_search_goes_on(
    here: EmbeddingStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "index").write_text("a file in the way")
    first = found(open_index(HNSW, here), here)
    assert "the index is not kept for the next search: cannot write" in caplog.text
    (tmp_path / "index").unlink()
    caplog.clear()

    def full_disk(*args: object) -> None:
        raise RuntimeError("Error in operator(): fwrite")

    index = FaissIndex(HNSW, 4)
    monkeypatch.setattr(index._faiss, "write_index", full_disk)
    assert_same(found(open_index(HNSW, here), here), first)
    assert "index.factory 'HNSW8' cannot be written" in caplog.text
    assert not list((tmp_path / "index").glob("*/*"))


def test_an_exact_index_is_not_kept(here: EmbeddingStore, tmp_path: Path) -> None:
    open_index(ExactConfig(), here)
    assert not (tmp_path / "index").exists()


def test_what_cannot_be_built_gets_its_own_sentence(here: EmbeddingStore, tmp_path: Path) -> None:
    refused: list[tuple[IndexConfig, str]] = [
        (FaissConfig(factory="IVF64,Flat"), "needs at least 64 rows to train on"),
        (FaissConfig(factory="../../Nothing"), "cannot be built"),
        (dataclasses.replace(HNSW, nprobe=2), "has no nprobe to set"),
    ]
    for config, sentence in refused:
        with pytest.raises(ConfigError, match=sentence):
            open_index(config, here)
    assert not (tmp_path / "index").exists()


def test_the_folder_is_beside_the_store_whatever_the_factory_string(
    here: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = here.folder.parent / "index"
    odd = kept_folder(FaissConfig(factory="../IVF2(x),P Q4" + "x" * 300), here)
    assert odd.parent == beside
    assert odd.name.startswith("store-.._IVF2_x_,P_Q4")
    assert len(odd.name) < 120
    monkeypatch.chdir(here.folder.parent)
    monkeypatch.setattr(here, "folder", Path("."))
    assert kept_folder(HNSW, here).parent == beside.parent.parent / "index"


@pytest.mark.parametrize("config", [AutoConfig(engine=Engine.ray), MilvusConfig(engine=Engine.ray)])
def test_an_engine_that_would_be_ignored_is_refused(
    config: IndexConfig, here: EmbeddingStore
) -> None:
    named = dataclasses.replace(config, folder="index")
    for work in (
        lambda: open_index(config, here),
        lambda: open_index(named, here),
        lambda: make_index(config, here, 1, Modality.images),
    ):
        with pytest.raises(ConfigError, match=r"index\.engine=ray goes with index=exact or faiss"):
            work()


@pytest.mark.parametrize("modality", list(Modality))
def test_nothing_of_an_earlier_index_stays_beside_a_new_one(
    modality: Modality, here: EmbeddingStore, tmp_path: Path
) -> None:
    pictures, folder = (kept_folder(HNSW, here, kind) for kind in (Modality.images, modality))
    mine = "image.index" if modality is Modality.images else "text.index"
    old = {folder / "index_card.json", folder / "index_card.md", pictures / mine}
    for file in (*old, pictures / "metadata" / "metadata_0000.parquet", folder / "notes.txt"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    open_index(HNSW, here, modality=modality)
    assert not any(file.exists() for file in (*old, pictures / "metadata"))
    assert (folder / "notes.txt").exists() and (folder / "index.json").exists()


def test_the_card_is_written_after_the_index(
    here: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = build_index(HNSW, here)
    card = Card("HNSW8", "", [Tried("HNSW8", {}, 0, 0)], "", {}, 0.9, 10)
    folder = tmp_path / "index"
    keep_index(Made(index, card), folder, HNSW, here, 1, Modality.images)
    assert (folder / "index_card.md").is_file()

    def full_disk(*args: object) -> None:
        raise ConfigError("the disk is full")

    monkeypatch.setattr(index, "write", full_disk)
    with pytest.raises(ConfigError, match="the disk is full"):
        keep_index(Made(index, card), folder, HNSW, here, 1, Modality.images)
    assert not (folder / "index_card.md").exists()  # of what is there nobody knows the card
