from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tests.retrieval.written import clustered_rows, write_store
from twotower.config import Config, FreeText, IndexConfig
from twotower.embedding.store import EmbeddingStore
from twotower.index_config import Indexed, IndexingConfig
from twotower.retrieval.exact import ExactConfig
from twotower.retrieval.faiss_index import FaissConfig, FaissIndex
from twotower.retrieval.index import Modality
from twotower.retrieval.indexing import describe, index_store
from twotower.retrieval.kept import kept_folder, open_index
from twotower.retrieval.search.opening import open_collections
from twotower.settings import ConfigError

HNSW = FaissConfig(factory="HNSW8")
BUILD = FreeText()


@pytest.fixture
def written(tmp_path: Path) -> EmbeddingStore:
    rows = clustered_rows(120)
    return write_store(tmp_path / "store", rows, {}, 50, texts=rows[::-1].copy())


def of(config: Config, store: EmbeddingStore, index: IndexConfig, **indexing: object) -> Config:
    return dataclasses.replace(
        config,
        store=str(store.folder),
        index=index,
        indexing=IndexingConfig(**indexing),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("index", [HNSW, ExactConfig()])
def test_a_search_opens_what_was_saved(
    index: IndexConfig,
    config: Config,
    written: EmbeddingStore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = np.concatenate(written.image_shards())
    want = open_index(dataclasses.replace(index), written).search(rows[:5], 4)
    index_store(of(config, written, index), BUILD)
    said = capsys.readouterr().out
    assert str(kept_folder(index, written)) in said
    assert "120 of dimension 12" in said
    assert f"the images of {written.folder}, which has the same rows" in said

    def not_again(*args: object, **kwargs: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr("twotower.retrieval.kept.build_index", not_again)
    found = open_index(index, written).search(rows[:5], 4)
    np.testing.assert_array_equal(found.ids, want.ids)
    index_store(of(config, written, index), BUILD)
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="built again"):
        index_store(of(config, written, index, overwrite=True), BUILD)


def test_pictures_and_captions_get_an_index_each(config: Config, written: EmbeddingStore) -> None:
    index_store(of(config, written, HNSW, modality=Indexed.both), BUILD)
    kept = sorted(path.name for path in (written.folder.parent / "index").iterdir())
    assert kept == ["store-HNSW8", "store-HNSW8-texts"]


def test_a_folder_that_is_named_says_what_it_is(
    config: Config, written: EmbeddingStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = dataclasses.replace(HNSW, folder=str(tmp_path / "elsewhere"))
    index_store(of(config, written, named, modality=Indexed.both), BUILD)
    asked = ExactConfig(folder=named.folder)  # the default kind: the folder knows better
    assert isinstance(open_index(asked, written), FaissIndex)
    assert isinstance(open_index(asked, written, modality=Modality.texts), FaissIndex)
    capsys.readouterr()
    index_store(of(config, written, asked), FreeText(verb="show"))
    assert "faiss HNSW8" in capsys.readouterr().out

    other = write_store(tmp_path / "other", clustered_rows(120, seed=4), {})
    with pytest.raises(ConfigError, match="was not built from the images of the store .*other"):
        open_index(asked, other)
    with pytest.raises(ConfigError, match="holds no index; build one first"):
        open_index(ExactConfig(folder=str(tmp_path / "nowhere")), written)
    for stores in ({"a": written, "b": other}, {"": written}):
        parted = dataclasses.replace(asked, partition_by="" if len(stores) > 1 else "caption")
        with pytest.raises(ConfigError, match="index.folder names the index of one whole store"):
            open_collections(of(config, written, parted), stores)


def test_tells_a_store_that_has_changed(
    config: Config, written: EmbeddingStore, capsys: pytest.CaptureFixture[str]
) -> None:
    index_store(of(config, written, HNSW), BUILD)
    folder = kept_folder(HNSW, written)
    write_store(written.folder, clustered_rows(100, seed=8), {}, 50)
    assert "HAS OTHER ROWS NOW" in describe(folder)
    index_store(of(config, written, HNSW), FreeText(verb="show", path=str(folder)))
    assert "HAS OTHER ROWS NOW" in capsys.readouterr().out
    (written.folder / "manifest.json").unlink()
    assert "which cannot be opened now" in describe(folder)
    # An index that another program saved with no word about its rows.
    manifest = json.loads((folder / "index.json").read_text())
    del manifest["about"]
    (folder / "index.json").write_text(json.dumps(manifest))
    assert "\nstore" not in describe(folder)
    (folder / manifest["file"]).unlink()
    with pytest.raises(ConfigError, match="is damaged"):
        describe(folder)


def test_refuses_what_makes_no_index(config: Config, written: EmbeddingStore) -> None:
    def refused(index: IndexConfig, free: FreeText = BUILD, **changes: object) -> str:
        with pytest.raises(ConfigError) as error:
            made = of(config, written, index)
            index_store(dataclasses.replace(made, **changes), free)  # type: ignore[arg-type]
        return str(error.value)

    assert "index does not know build" in refused(HNSW, FreeText(verb="build"))
    parted = dataclasses.replace(HNSW, partition_by="caption")
    assert "leave it out here" in refused(parted)
    write_store(written.folder.parent / "more", clustered_rows(20), {})
    several = {"store": str(written.folder.parent)}
    assert "say which index with path=" in refused(HNSW, FreeText(verb="show"), **several)
    named = dataclasses.replace(HNSW, folder="x")
    assert "names the index of one store, but there are 2" in refused(named, **several)
