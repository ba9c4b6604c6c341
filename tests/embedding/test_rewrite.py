"""Merged and compacted stores hold the same vectors and metadata, row for row."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.embedding.parts import ONE_THREAD, UNREADABLE, contents
from tests.helpers import write_pictures
from twotower.data.pairs import Pair, PairTable
from twotower.embedding import rewrite
from twotower.embedding.encoder import Encoder
from twotower.embedding.export import export
from twotower.embedding.layout import METADATA
from twotower.embedding.legacy import write_legacy
from twotower.embedding.rewrite import compact_store, merge_stores
from twotower.embedding.store import EmbeddingStore
from twotower.embedding.verify import verify_store
from twotower.encode_config import EncodeConfig, Rows
from twotower.settings import ConfigError

SETTINGS = EncodeConfig(shard_rows=16, batch_size=5)
PAIRS = dataclasses.replace(SETTINGS, rows=Rows.pairs)


def plain(store: EmbeddingStore, *without: str) -> list[dict[str, object]]:
    """Every row: its vectors and its metadata."""
    ids = store.row_ids()
    rows = store.metadata(ids)
    for row, image, text in zip(rows, store.image_rows(ids), store.text_rows(ids), strict=True):
        row.update(image=image.tobytes(), text=text.tobytes())
        for name in without:
            del row[name]
    return rows


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


@pytest.mark.parametrize("settings", [SETTINGS, PAIRS])
def test_compacting_an_updated_store_gives_a_fresh_one_with_its_old_ids(
    checkpoint: Path, tmp_path: Path, settings: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = tmp_path / "pictures", tmp_path / "store"
    paths = [path for path, _ in write_pictures(folder, 60)]

    def source() -> PairTable:
        names = sorted(path.name for path in folder.iterdir())
        pairs = [Pair(n, f"{word} {n}", "", n) for n in names for word in ("a", "the")]
        return PairTable.from_pairs(pairs, folder, "pictures")

    export(checkpoint, source(), output, settings, ONE_THREAD)
    with pytest.raises(ConfigError, match="has nothing to compact"):
        compact_store(output)
    paths[5].rename(folder / "0000_first.jpg")
    paths[30].write_bytes(paths[31].read_bytes())
    paths[40].write_bytes(b"junk")
    update = dataclasses.replace(settings, update=True)
    export(checkpoint, source(), output, update, ONE_THREAD)
    before = EmbeddingStore.open(output)
    rows = {row["row_id"]: row for row in plain(before, "source_row")}

    with monkeypatch.context() as patch:
        patch.setattr(rewrite, "replace_store", lambda folder: (_ for _ in ()).throw(OSError()))
        with pytest.raises(OSError):
            compact_store(output)
    assert len(EmbeddingStore.open(output)) == len(before)  # as it was
    compact_store(output)

    store = EmbeddingStore.open(output)
    assert {row["row_id"]: row for row in plain(store, "source_row")} == rows
    export(checkpoint, source(), tmp_path / "fresh", settings, ONE_THREAD)
    fresh = EmbeddingStore.open(tmp_path / "fresh")
    assert plain(store, "row_id") == plain(fresh, "row_id")
    for name, content in contents(tmp_path / "fresh").items():
        if name.endswith(".npy"):
            assert (output / name).read_bytes() == content
    assert not (output / "deleted.npy").exists() and store.errors() == fresh.errors()
    # It goes on from there.
    paths[40].write_bytes(paths[41].read_bytes())
    assert export(checkpoint, source(), output, update, ONE_THREAD).encoded == 1
    assert len(EmbeddingStore.open(output)) == 60 * (2 if settings is PAIRS else 1)


def test_verify_reads_every_byte_and_encodes_again(
    checkpoint: Path, source: PairTable, tmp_path: Path
) -> None:
    output = tmp_path / "store"
    export(checkpoint, source, output, SETTINGS, ONE_THREAD)
    encoder = Encoder.load(checkpoint, batch_size=5)
    said = verify_store(EmbeddingStore.open(output), encoder, 30, seed=0)
    assert said == (
        f"{output}: 89 rows in 7 shards are what was written, 30 pictures give the same vectors, "
        "30 captions do"
    )
    path = output / "img_emb" / "img_emb_0003.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ConfigError, match="img_emb_0003.npy .another content than was written"):
        verify_store(EmbeddingStore.open(output), None, 0, seed=0)
    path.write_bytes(whole)
    assert "0003" not in verify_store(EmbeddingStore.open(output), None, 0, seed=0)
    # Vectors that are whole, but not those of the pictures.
    store = EmbeddingStore.open(output)
    shards = store.image_shards()
    shards[2] = np.roll(shards[2], 1, axis=0)
    with pytest.raises(ConfigError, match="is not what its checkpoint gives: in img_emb, row"):
        verify_store(store, encoder, 89, seed=0)


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
