"""Tools of the field read a store as it stands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from embedding_reader import EmbeddingReader

from tests.embedding.parts import ONE_THREAD
from twotower.data.pairs import PairTable
from twotower.embedding.export import export
from twotower.embedding.store import EmbeddingStore
from twotower.encode_config import EncodeConfig


def test_embedding_reader_reads_vectors_and_metadata(
    checkpoint: Path, source: PairTable, tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    export(checkpoint, source, folder, EncodeConfig(shard_rows=16, batch_size=5), ONE_THREAD)
    store = EmbeddingStore.open(folder)
    for kind, shards in (("img_emb", store.image_shards()), ("text_emb", store.text_shards())):
        reader = EmbeddingReader(str(folder / kind), file_format="npy")
        assert (reader.count, reader.dimension, reader.byte_per_item) == (89, 12, 12 * 2)
        found = np.concatenate([rows for rows, _ in reader(batch_size=10, show_progress=False)])
        assert np.array_equal(found, np.concatenate(shards))
    reader = EmbeddingReader(
        str(folder / "img_emb"),
        file_format="parquet_npy",
        metadata_folder=str(folder / "metadata"),
        meta_columns=["image_path", "caption", "row_id", "url"],
    )
    rows, captions = [], []
    for vectors, about in reader(batch_size=10, show_progress=False):
        assert np.array_equal(store.image_rows(about["row_id"].to_numpy()), vectors)
        rows += about["row_id"].tolist()
        captions += about["caption"].tolist()
    assert rows == store.row_ids().tolist()
    assert captions == [entry["caption"] for entry in store.metadata(rows)]


def test_mapping_needs_no_copy(checkpoint: Path, source: PairTable, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    export(checkpoint, source, folder, EncodeConfig(shard_rows=64, batch_size=5), ONE_THREAD)
    path = folder / "img_emb" / "img_emb_0000.npy"
    mapped = np.load(path, mmap_mode="r")
    assert isinstance(mapped, np.memmap) and mapped.flags.c_contiguous
    # The file is a header and the rows, one after the other.
    assert path.stat().st_size == mapped.offset + mapped.nbytes
    (first, _) = EmbeddingStore.open(folder).image_shards()
    assert isinstance(first, np.memmap) and np.shares_memory(first, first[10:20])
