"""What clip-retrieval's back does with the files, with plain faiss and pyarrow."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.retrieval.written import write_store
from twotower.config import Config, FreeText
from twotower.embedding.store import EmbeddingStore
from twotower.index_config import Indexed, IndexingConfig
from twotower.retrieval.exact import ExactConfig
from twotower.retrieval.faiss_index import FaissConfig, import_faiss
from twotower.retrieval.index import unit_rows
from twotower.retrieval.indexing import describe, index_store
from twotower.retrieval.kept import kept_folder

faiss = import_faiss()
# No two of them are alike, so that a coarse index finds the right one too.
ROWS = unit_rows(np.random.default_rng(2).standard_normal((120, 12)))


def indexed(config: Config, store: EmbeddingStore, index: FaissConfig, **indexing: Any) -> Path:
    made = dataclasses.replace(
        config, store=str(store.folder), index=index, indexing=IndexingConfig(**indexing)
    )
    index_store(made, FreeText())
    return kept_folder(index, store)


def found_paths(folder: Path, name: str, queries: Any) -> list[str]:
    """The picture of the best hit of each query, as ParquetMetadataProvider.get finds it."""
    index = faiss.read_index(str(folder / name))
    files = sorted((folder / "metadata").glob("*.parquet"))
    table = pa.concat_tables([pq.read_table(file) for file in files])
    _, ids, vectors = index.search_and_reconstruct(queries, 1)
    assert vectors.shape == (len(queries), 1, queries.shape[1])
    return [table.slice(int(i), 1)["image_path"][0].as_py() for i in ids[:, 0]]


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8", "IVF4,SQ8", "SQ8,RFlat"])
@pytest.mark.parametrize("first", [0, 7])
def test_the_right_row_is_found(factory: str, first: int, config: Config, tmp_path: Path) -> None:
    # Ids that are positions, and ids with gaps, as after deletions.
    ids = np.arange(120) if not first else first + 2 * np.arange(120)
    store = write_store(tmp_path / "store", ROWS, {"row_id": ids}, 50)
    index = FaissConfig(factory=factory, nprobe=4 if "IVF" in factory else 0, rerank=2)
    folder = indexed(config, store, index)
    want = [f"/pictures/{row}.jpg" for row in range(120)]
    assert found_paths(folder, "image.index", ROWS) == want
    linked = (folder / "image.index").stat().st_nlink == 2
    assert linked == ("IVF" in factory)
    metadata = (folder / "metadata" / "metadata_0000.parquet").stat().st_nlink
    assert (metadata == 2) == ("IVF" not in factory or not first)
    assert "image.index, metadata" in describe(folder)


def test_captions_lie_beside_where_both_are_asked_for(config: Config, tmp_path: Path) -> None:
    texts = np.roll(ROWS, 1, axis=0)
    store = write_store(tmp_path / "store", ROWS, {}, 50, texts=texts)
    folder = indexed(config, store, FaissConfig(), modality=Indexed.both)
    want = [f"/pictures/{row}.jpg" for row in range(120)]
    assert found_paths(folder, "image.index", ROWS) == want
    assert found_paths(folder, "text.index", texts) == want
    assert len(list((folder / "metadata").iterdir())) == 3
    # Smaller now: nothing of the old files stays.
    store = write_store(tmp_path / "store", ROWS[:40], {}, 50, texts=texts[:40])
    folder = indexed(config, store, FaissConfig())
    assert [file.name for file in (folder / "metadata").iterdir()] == ["metadata_0000.parquet"]
    assert found_paths(folder, "image.index", ROWS[:40]) == want[:40]


def test_writes_nothing_that_could_not_be_searched(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = write_store(tmp_path / "store", ROWS, {}, 50)
    folder = indexed(config, store, FaissConfig(factory="IVF4,PQ4x4fs"))
    assert "is not written for clip-retrieval" in caplog.text
    indexed(config, store, FaissConfig())
    off = indexed(config, store, FaissConfig(), clip_retrieval=False, overwrite=True)
    exact = indexed(config, store, ExactConfig())  # type: ignore[arg-type]
    for place in (folder, off, exact):
        assert not (place / "image.index").exists()
        assert not (place / "metadata").exists()


def test_files_of_the_store_that_are_linked_keep_their_mode(config: Config, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", ROWS, {"row_id": np.arange(120)}, 50)
    files = sorted(store.folder.glob("**/*.parquet"))
    for file in files:
        file.chmod(0o440)
    folder = indexed(config, store, FaissConfig(factory="Flat"))
    assert (folder / "metadata" / "metadata_0000.parquet").stat().st_nlink == 2
    assert {file.stat().st_mode & 0o777 for file in files} == {0o440}
