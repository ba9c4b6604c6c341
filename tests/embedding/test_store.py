"""Rows are found by id whatever the shard; metadata is read by groups; opening reads no row."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.embedding.parts import ONE_THREAD, UNREADABLE
from tests.helpers import HashTokenizer, SquareTransform
from twotower.data.pairs import PairTable
from twotower.embedding import layout, writer
from twotower.embedding.encoder import Encoder, described
from twotower.embedding.export import export
from twotower.embedding.fingerprint import check_fingerprint, check_space
from twotower.embedding.store import EmbeddingStore
from twotower.encode_config import EncodeConfig, Rows
from twotower.settings import ConfigError

SETTINGS = EncodeConfig(shard_rows=16, batch_size=5, rows=Rows.pairs)


@pytest.fixture
def folder(checkpoint: Path, source: PairTable, tmp_path: Path) -> Path:
    export(checkpoint, source, tmp_path / "store", SETTINGS, ONE_THREAD)
    return tmp_path / "store"


def test_rows_are_found_by_id_in_the_order_asked(folder: Path) -> None:
    store = EmbeddingStore.open(folder)
    ids = store.row_ids()
    images, texts = np.concatenate(store.image_shards()), np.concatenate(store.text_shards())
    chosen = np.random.default_rng(0).permutation(len(ids))[:40]
    assert np.array_equal(store.image_rows(ids[chosen]), images[chosen])
    assert np.array_equal(store.text_rows(ids[chosen]), texts[chosen])
    assert [entry["row_id"] for entry in store.metadata(ids[chosen])] == ids[chosen].tolist()
    assert store.image_rows([]).shape == (0, 12) and store.metadata([]) == []
    # Row 0 is the caption of an unreadable picture.
    for unknown in (0, -1, 10_000):
        with pytest.raises(KeyError, match=f"has no row {unknown}"):
            store.metadata([unknown])


def test_metadata_tells_everything_of_the_source(folder: Path, source: PairTable) -> None:
    store = EmbeddingStore.open(folder)
    captions = source.captions(7 * 4 + 2)
    entries = [entry for entry in store.metadata(store.row_ids()) if entry["source_row"] == 30]
    first = entries[0]["row_id"]
    assert entries == [
        {
            "image_path": str(source.path(30)),
            "caption": caption,
            "captions": captions,
            "row_id": first + place,
            "source_row": 30,
            "image_id": "id30",
            "split": "val",
            "url": "https://example.org/30",
        }
        for place, caption in enumerate(captions)
    ]
    assert len(captions) == 2


def test_only_the_groups_that_hold_the_rows_are_read(
    checkpoint: Path, source: PairTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "ROWS_PER_GROUP", 4)
    export(checkpoint, source, tmp_path / "store", SETTINGS, ONE_THREAD)
    store = EmbeddingStore.open(tmp_path / "store")
    read: list[tuple[int, int]] = []
    group = store._group
    store._cached_group = lambda *which: read.append(which) or group(*which)
    ids = store.row_ids()
    first_shard = store.manifest.shards[0].rows
    wanted = [ids[5], ids[first_shard + 9], ids[0]]
    assert [entry["row_id"] for entry in store.metadata(wanted)] == wanted
    assert read == [(0, 1), (1, 2), (0, 0)]


def test_opening_reads_no_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = np.load

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a row was read")

    monkeypatch.setattr(np, "load", refuse)
    monkeypatch.setattr(pq, "read_table", refuse)
    monkeypatch.setattr(pq, "ParquetFile", refuse)
    store = EmbeddingStore.open(folder)
    assert len(store) == store.manifest.rows > 100
    # Mapping the vectors reads the heads of their files, and no metadata.
    monkeypatch.setattr(np, "load", load)
    assert sum(len(rows) for rows in store.image_shards()) == len(store)


def test_an_unsorted_store_finds_its_rows(folder: Path) -> None:
    store = EmbeddingStore.open(folder)
    ids = store.row_ids().copy()
    vectors = store.image_rows(ids)
    mixed = EmbeddingStore.open(folder)
    mixed.__dict__["_row_ids"] = ids[::-1]
    assert np.array_equal(mixed.image_rows(ids[::-1]), vectors)


def test_every_shard_is_a_memory_map_that_cannot_be_written(folder: Path) -> None:
    store = EmbeddingStore.open(folder)
    for shard in store.image_shards():
        assert isinstance(shard, np.memmap)
        assert not shard.flags.writeable
    assert store.image_shards()[0] is store.image_shards()[0]


def test_the_checkpoint_must_be_the_one_that_made_the_store(
    folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    store = EmbeddingStore.open(folder)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(checkpoint.read_bytes())
    store.check_checkpoint(copy)
    copy.write_text("1")
    with pytest.raises(ConfigError) as refused:
        store.check_checkpoint(copy)
    for part in ("5feceb66ffc86f38", "6b86b273ff34fce1", str(copy), "encode again"):
        assert part in str(refused.value)


def test_what_is_no_finished_store_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no embedding store at .*; make one with `twotower"):
        EmbeddingStore.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="is not an embedding store: it has no manifest.json"):
        EmbeddingStore.open(tmp_path / "empty")
    manifest = folder / "manifest.json"
    plain = json.loads(manifest.read_text())
    cases = {
        "of version 3, and this twotower reads version 2": {**plain, "version": 3},
        "is not the manifest of an embedding store": {**plain, "format": "other"},
        "is not finished; run the same": {**plain, "complete": False},
        "lacks or has too many entries": {**plain, "surprise": 1},
        "it was changed after it was written": {**plain, "dtype": "fp32"},
    }
    for sentence, changed in cases.items():
        manifest.write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match=sentence):
            EmbeddingStore.open(folder)
    manifest.write_text("[1, 2")
    with pytest.raises(ConfigError, match="is not the manifest of an embedding store"):
        EmbeddingStore.open(folder)


def test_errors_are_rows_of_their_own(folder: Path, source: PairTable) -> None:
    errors = EmbeddingStore.open(folder).errors()
    assert [error["source_row"] for error in errors] == list(UNREADABLE)
    assert set(errors[0]) == {"source_row", "path", "reason"}


def test_file_names_sort_in_the_order_of_the_shards() -> None:
    few = layout.Manifest(source_rows=100, shard_rows=10)
    assert few.path("img_emb", 3) == "img_emb/img_emb_0003.npy"
    many = dataclasses.replace(few, source_rows=200_000)
    names = [many.path("metadata", shard) for shard in (0, 999, 9_999, 10_000, 19_999)]
    assert names == sorted(names) and names[0] == "metadata/metadata_00000.parquet"


def test_rows_of_two_fingerprints_never_meet(folder: Path, checkpoint: Path) -> None:
    manifest = EmbeddingStore.open(folder).manifest
    assert json.loads((folder / "manifest.json").read_text())["fingerprint"] == manifest.fingerprint
    encoder = Encoder.load(checkpoint, batch_size=5)
    check_space(manifest, folder, encoder.description(), "the encoder")
    # The same checkpoint, but code that prepares pictures in another way.
    encoder.bundle.eval_transform = SquareTransform(17)
    with pytest.raises(ConfigError) as refused:
        check_space(manifest, folder, encoder.description(), "the encoder")
    other = dataclasses.replace(manifest, preprocessing="SquareTransform(size=17)")
    for part in (manifest.space[:16], other.space[:16], "size=16", "size=17", "the encoder"):
        assert part in str(refused.value)
    # Queries may be more precise than rows, but rows of one store are all alike.
    wide = dataclasses.replace(manifest, precision="bf16")
    assert wide.space == manifest.space and wide.fingerprint != manifest.fingerprint
    with pytest.raises(
        ConfigError, match="encode.precision is fp32 there and bf16 here"
    ) as refused:
        check_fingerprint(manifest, "a", wide, "b")
    assert manifest.fingerprint[:16] in str(refused.value)
    assert wide.fingerprint[:16] in str(refused.value)


def test_a_description_is_the_same_wherever_it_is_made() -> None:
    assert described(HashTokenizer()) == (
        "HashTokenizer(context_length=8, vocab_size=97, pad_id=0)"
    )
    assert described(lambda image: image) == "function"
    long = HashTokenizer(pad_id="x" * 1000)
    assert described(long) == described(HashTokenizer(pad_id="x" * 1000)) != described("x")
    assert len(described(long)) == len("HashTokenizer ") + 64
