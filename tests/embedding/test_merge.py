"""Merged stores hold the same vectors and metadata, row for row."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.embedding.parts import ONE_THREAD, UNREADABLE, plain
from twotower.data.pairs import PairTable
from twotower.embedding.encoder import Encoder
from twotower.embedding.export import export
from twotower.embedding.layout import METADATA
from twotower.embedding.legacy import write_legacy
from twotower.embedding.merge import merge_stores
from twotower.embedding.store import EmbeddingStore
from twotower.embedding.verify import verify_store
from twotower.encode_config import EncodeConfig, Rows
from twotower.settings import ConfigError

SETTINGS = EncodeConfig(shard_rows=16, batch_size=5)
PAIRS = dataclasses.replace(SETTINGS, rows=Rows.pairs)


@pytest.fixture
def halves(checkpoint: Path, source: PairTable, tmp_path: Path) -> list[Path]:
    """Two stores: the first 41 images, and the others without the column url."""
    rest = source.table.slice(41).drop_columns(["url"])
    parts = [source.head(41), PairTable(rest, source.root, "rest")]
    for name, part in zip("ab", parts, strict=True):
        export(checkpoint, part, tmp_path / name, SETTINGS, ONE_THREAD)
    return [tmp_path / "a", tmp_path / "b"]


def test_two_halves_are_the_whole(
    checkpoint: Path, source: PairTable, halves: list[Path], tmp_path: Path
) -> None:
    manifest = merge_stores(halves, tmp_path / "merged")
    export(checkpoint, source, tmp_path / "whole", SETTINGS, ONE_THREAD)
    merged, whole = (
        EmbeddingStore.open(tmp_path / "merged"),
        EmbeddingStore.open(tmp_path / "whole"),
    )
    assert merged.manifest == manifest and manifest.fingerprint == whole.manifest.fingerprint
    assert plain(merged, "url") == plain(whole, "url")
    urls = [entry["url"] for entry in merged.metadata(merged.row_ids())]
    assert urls == [
        f"https://example.org/{row}" if row < 41 else None
        for row in range(101)
        if row not in UNREADABLE
    ]
    assert [error["source_row"] for error in merged.errors()] == list(UNREADABLE)
    assert (manifest.source, manifest.next_row_id) == ("squares + rest", 101)
    shapes = {
        str(pq.read_schema(path)) for path in (tmp_path / "merged" / METADATA).glob("*.parquet")
    }
    assert len(shapes) == 1
    verify_store(merged, Encoder.load(checkpoint, batch_size=5), 40, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        *("a", "b", "merged", "whole"),
    ]


def test_what_cannot_be_merged_is_said(
    checkpoint: Path, source: PairTable, halves: list[Path], tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    other.write_text("1")
    export(other, source.head(20), tmp_path / "other", SETTINGS, ONE_THREAD)
    with pytest.raises(ConfigError) as refused:
        merge_stores([halves[0], tmp_path / "other"], tmp_path / "merged")
    for folder in (halves[0], tmp_path / "other"):
        assert EmbeddingStore.open(folder).manifest.fingerprint[:16] in str(refused.value)
    assert "the checkpoint (SHA-256) is 5fec" in str(refused.value)
    export(checkpoint, source.head(20), tmp_path / "pairs", PAIRS, ONE_THREAD)
    with pytest.raises(ConfigError, match="encode.rows is images in one and pairs in the"):
        merge_stores([halves[0], tmp_path / "pairs"], tmp_path / "merged")
    write_legacy(EmbeddingStore.open(halves[0]), tmp_path / "older")
    with pytest.raises(ConfigError, match="older is of the older layout and cannot be merged"):
        merge_stores([halves[0], tmp_path / "older"], tmp_path / "merged")
    with pytest.raises(ConfigError, match="joins two stores or more"):
        merge_stores(halves[:1], tmp_path / "merged")
    with pytest.raises(ConfigError, match="joins two stores or more; name each once"):
        merge_stores([*halves, halves[0]], tmp_path / "merged")
    with pytest.raises(ConfigError, match="is there already"):
        merge_stores(halves, halves[0])
    numbers = source.head(20).table.drop_columns(["url"])
    numbers = numbers.append_column("url", pa.array([[1]] * 20))
    table = PairTable(numbers, source.root, "numbers")
    export(checkpoint, table, tmp_path / "numbers", SETTINGS, ONE_THREAD)
    with pytest.raises(ConfigError, match="has a column of two kinds"):
        merge_stores([halves[0], tmp_path / "numbers"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_picture_of_two_stores_is_told_and_a_merged_store_is_not_updated(
    checkpoint: Path, source: PairTable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = [source.head(41), PairTable(source.table.slice(38), source.root, "rest")]
    for name, part in zip("ab", parts, strict=True):
        export(checkpoint, part, tmp_path / name, SETTINGS, ONE_THREAD)
    merged = tmp_path / "merged"
    merge_stores([tmp_path / "a", tmp_path / "b"], merged)
    assert f"3 pictures are in more than one of the stores, and {merged} has all" in caplog.text
    update = dataclasses.replace(SETTINGS, update=True)
    with pytest.raises(ConfigError, match="update the stores that were merged and merge them"):
        export(checkpoint, source, merged, update, ONE_THREAD)
    (merged / "img_emb" / "img_emb_0001.npy").unlink()
    with pytest.raises(ConfigError, match="is missing or cut; merge its parts again, or encode"):
        EmbeddingStore.open(merged)
    # A store with dead rows is merged a shard at a time.
    few = PairTable(source.table.slice(20, 20), source.root, "squares")
    export(checkpoint, few, tmp_path / "a", update, ONE_THREAD)
    export(checkpoint, few, tmp_path / "fresh", SETTINGS, ONE_THREAD)
    merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "again")
    again, fresh = EmbeddingStore.open(tmp_path / "again"), EmbeddingStore.open(tmp_path / "fresh")
    count = len(fresh)
    ids = (again.row_ids()[:count], fresh.row_ids())
    assert np.array_equal(again.image_rows(ids[0]), fresh.image_rows(ids[1]))
    assert np.array_equal(again.text_rows(ids[0]), fresh.text_rows(ids[1]))
