"""The same bytes over any number of ranks and kills, and a sentence where a store would be lost."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.embedding.parts import (
    BATCH,
    COUNT,
    ONE_THREAD,
    SHARD_ROWS,
    UNREADABLE,
    bundle_of,
    contents,
    run_jobs,
)
from tests.helpers import run_ranks
from twotower.console import ProgressLine
from twotower.data.pairs import PairTable
from twotower.distributed import Stopped
from twotower.embedding import batch_size, encoder
from twotower.embedding import export as export_module
from twotower.embedding.export import export
from twotower.embedding.store import EmbeddingStore
from twotower.embedding.work import ExportJob, ExportResult
from twotower.embedding.writer import StoreWriter
from twotower.encode_config import EncodeConfig, Rows, StoreDtype
from twotower.prefetch import AHEAD, PrefetchToDevice
from twotower.settings import ConfigError, to_plain

SETTINGS = EncodeConfig(shard_rows=SHARD_ROWS, batch_size=BATCH)
PAIRS = dataclasses.replace(SETTINGS, rows=Rows.pairs, dtype=StoreDtype.fp32)


def encode(
    checkpoint: Path, source: PairTable, output: Path, settings: EncodeConfig = SETTINGS
) -> ExportResult:
    result = export(checkpoint, source, output, settings, ONE_THREAD)
    assert result is not None
    return result


def with_changes(**changes: object) -> EncodeConfig:
    return dataclasses.replace(SETTINGS, **changes)


def test_three_ranks_write_the_bytes_of_one(
    checkpoint: Path, source: PairTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"images": SETTINGS, "pairs": PAIRS}
    for name, settings in names.items():
        encode(checkpoint, source, tmp_path / "one" / name, settings)
    jobs: list[ExportJob] = []
    monkeypatch.setattr(export_module, "launch", lambda fn, config, job: jobs.append(job))
    for name, settings in names.items():
        export(checkpoint, source, tmp_path / "three" / name, settings, ONE_THREAD)

    results = run_ranks(run_jobs, 3, jobs)

    assert [result is None for result in results[1]] == [True, True]
    for name in names:
        one, three = contents(tmp_path / "one" / name), contents(tmp_path / "three" / name)
        assert list(one) == list(three)
        assert [path for path in one if one[path] != three[path]] == []
        # 7 shards of image vectors, caption vectors and metadata; errors, source and manifest.
        assert len(one) == 7 * 3 + 3
        rows = EmbeddingStore.open(tmp_path / "three" / name).row_ids()
        assert (np.diff(rows) > 0).all()


def test_workers_change_no_byte(checkpoint: Path, source: PairTable, tmp_path: Path) -> None:
    encode(checkpoint, source, tmp_path / "a")
    encode(checkpoint, source, tmp_path / "b", with_changes(num_workers=2))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


class EarlyPipeline(PrefetchToDevice):
    """On a CPU what CUDA does: results are handed out when later batches are begun."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.ahead = AHEAD


def test_batches_that_are_on_their_way_change_no_byte(
    checkpoint: Path, source: PairTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(checkpoint, source, tmp_path / "a", PAIRS)
    monkeypatch.setattr(encoder, "PrefetchToDevice", EarlyPipeline)
    encode(checkpoint, source, tmp_path / "b", PAIRS)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_compiling_stands_in_the_manifest(
    checkpoint: Path, source: PairTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    encode(checkpoint, source, tmp_path / "a", with_changes(compile=True))
    assert EmbeddingStore.open(tmp_path / "a").manifest.compiled
    with pytest.raises(ConfigError, match="encode.compile is True there and False here"):
        encode(checkpoint, source, tmp_path / "a")
    with pytest.raises(ConfigError, match="so give encode.batch_size a number"):
        with_changes(compile=True, batch_size="auto")


def test_rows_are_what_the_model_gives_for_each_picture(
    checkpoint: Path, source: PairTable, tmp_path: Path
) -> None:
    encode(checkpoint, source, tmp_path / "store", PAIRS)
    store = EmbeddingStore.open(tmp_path / "store")
    bundle = bundle_of(checkpoint)
    one = encoder.Encoder(bundle, batch_size=BATCH)
    images, texts = np.concatenate(store.image_shards()), np.concatenate(store.text_shards())
    expected = []
    row_id = 0
    for row in range(COUNT):
        for caption in source.captions(row) or [""]:
            if row not in UNREADABLE:
                expected.append((row_id, row, caption))
            row_id += 1
    metadata = store.metadata(store.row_ids())
    found = [(entry["row_id"], entry["source_row"], entry["caption"]) for entry in metadata]
    assert found == expected
    assert len(store) == len(expected) == len(images) == len(texts)
    paths = [source.path(row) for _, row, _ in expected]
    assert np.array_equal(one.encode_texts([caption for *_, caption in expected]), texts)
    assert np.array_equal(one.encode_images(paths), images)
    by_hand = bundle.model.encode_text(bundle.tokenizer([expected[40][2]]), normalize=True)
    assert np.allclose(by_hand.detach().numpy()[0], texts[40], atol=1e-6)


def test_unreadable_pictures_are_listed_and_shift_nothing(
    checkpoint: Path, source: PairTable, tmp_path: Path
) -> None:
    result = encode(checkpoint, source, tmp_path / "store")
    store = EmbeddingStore.open(tmp_path / "store")
    errors = store.errors()
    assert [error["source_row"] for error in errors] == list(UNREADABLE)
    assert [error["path"] for error in errors] == [str(source.path(row)) for row in UNREADABLE]
    assert "no such file" in errors[1]["reason"]
    assert all(error["reason"] for error in errors)
    assert store.row_ids().tolist() == [row for row in range(COUNT) if row not in UNREADABLE]
    assert result.manifest.errors == 12
    assert "89 rows of 12 (fp16), 12 unreadable (errors.parquet)" in result.sentence()
    # Row 40 has the vector that it has where no neighbour is missing.
    whole = PairTable(source.table.slice(40, 5), source.root)
    encode(checkpoint, whole, tmp_path / "part")
    alone = EmbeddingStore.open(tmp_path / "part")
    assert np.array_equal(alone.image_rows([0, 1, 4]), store.image_rows([40, 41, 44]))


@pytest.mark.parametrize("dtype", [StoreDtype.fp16, StoreDtype.fp32])
def test_vectors_have_unit_norm_and_the_type_asked_for(
    checkpoint: Path, source: PairTable, tmp_path: Path, dtype: StoreDtype
) -> None:
    encode(checkpoint, source, tmp_path / "store", with_changes(dtype=dtype))
    store = EmbeddingStore.open(tmp_path / "store")
    numpy_type, tolerance = (np.float16, 1e-3) if dtype is StoreDtype.fp16 else (np.float32, 1e-6)
    for shard in [*store.image_shards(), *store.text_shards()]:
        assert isinstance(shard, np.memmap)
        assert shard.dtype == numpy_type
        assert np.allclose(np.linalg.norm(shard.astype(np.float64), axis=1), 1, atol=tolerance)


def test_an_interrupted_export_continues_where_it_was(
    checkpoint: Path, source: PairTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(checkpoint, source, tmp_path / "whole")
    commit, output = StoreWriter.commit, tmp_path / "store"

    def interrupted(writer: StoreWriter, shard: int, *rest: object) -> None:
        if shard == 3:
            raise KeyboardInterrupt
        commit(writer, shard, *rest)

    monkeypatch.setattr(StoreWriter, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(checkpoint, source, output)
    with pytest.raises(ConfigError, match=r"is not finished; run the same `twotower encode` again"):
        EmbeddingStore.open(output)
    monkeypatch.setattr(StoreWriter, "commit", commit)
    times = {path: path.stat().st_mtime_ns for path in output.glob("img_emb/*.npy")}
    # One more shard is there but cut: it is not whole, so it is made again.
    cut = output / "text_emb" / "text_emb_0001.npy"
    cut.write_bytes(cut.read_bytes()[:-1])

    result = encode(checkpoint, source, output)

    assert result.encoded == COUNT - 2 * SHARD_ROWS
    assert "32 images were done before" in result.sentence()
    kept = [path.name for path, time in times.items() if path.stat().st_mtime_ns == time]
    assert sorted(kept) == ["img_emb_0000.npy", "img_emb_0002.npy"]
    assert contents(output) == contents(tmp_path / "whole")


def test_ctrl_c_keeps_finished_shards_and_gives_the_signals_back(
    checkpoint: Path, source: PairTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = np.save
    handler = signal.getsignal(signal.SIGINT)

    def interrupted(file: IO[bytes], rows: np.ndarray) -> None:
        save(file, rows)
        if "img_emb_0002" in file.name:
            os.kill(os.getpid(), signal.SIGINT)
            # A launcher asks again; the clean-up must not be interrupted.
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(np, "save", interrupted)
    with pytest.raises(Stopped, match="every finished shard is kept") as stopped:
        encode(checkpoint, source, tmp_path / "store", with_changes(num_workers=1))
    assert stopped.value.signal == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.setattr(np, "save", save)
    assert not list((tmp_path / "store").rglob(".*"))
    assert encode(checkpoint, source, tmp_path / "store").encoded == COUNT - 2 * SHARD_ROWS


def _killed(checkpoint: Path, source: PairTable, output: Path) -> None:
    """Die by SIGKILL when the third shard's files are written and its record is not."""
    encoder.load_bundle = bundle_of
    record = StoreWriter._write_record

    def kill(writer: StoreWriter, shard: object, errors: object) -> None:
        if shard.shard == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        record(writer, shard, errors)

    StoreWriter._write_record = kill
    export(checkpoint, source, output, SETTINGS, ONE_THREAD)


def test_a_killed_export_leaves_whole_shards(
    checkpoint: Path, source: PairTable, tmp_path: Path
) -> None:
    encode(checkpoint, source, tmp_path / "whole")
    process = multiprocessing.get_context("spawn").Process(
        target=_killed, args=(checkpoint, source, tmp_path / "store")
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert encode(checkpoint, source, tmp_path / "store").encoded == COUNT - 2 * SHARD_ROWS
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_a_finished_store_that_lost_files_gets_only_those_back(
    checkpoint: Path, source: PairTable, tmp_path: Path
) -> None:
    output = tmp_path / "store"
    encode(checkpoint, source, output)
    before = contents(output)
    (output / "img_emb" / "img_emb_0002.npy").unlink()
    (output / "metadata" / "metadata_0005.parquet").unlink()
    with pytest.raises(ConfigError, match="is damaged: a file of shard 2 is missing or cut"):
        EmbeddingStore.open(output)
    assert encode(checkpoint, source, output).encoded == 2 * SHARD_ROWS
    assert contents(output) == before
    # Without the list of errors, the shards that had some are made again, to know them.
    (output / "errors.parquet").unlink()
    (output / "img_emb" / "img_emb_0004.npy").unlink()
    assert encode(checkpoint, source, output).encoded == 4 * SHARD_ROWS + 5
    assert contents(output) == before


def test_a_finished_store_is_reused_and_another_refused(
    checkpoint: Path, source: PairTable, tmp_path: Path
) -> None:
    output = tmp_path / "store"
    encode(checkpoint, source, output)
    before = contents(output)
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    again = encode(checkpoint, source, output)
    assert again.reused and "kept the store" in again.sentence()
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == times

    # What the source is called makes no other one of it.
    renamed = PairTable(source.table, source.root, "squares by another name")
    assert encode(checkpoint, renamed, output).reused

    other = tmp_path / "other.safetensors"
    other.write_text("1")
    refusals = {
        "encode.batch_size is 5 there and 6 here": (checkpoint, with_changes(batch_size=6)),
        "encode.dtype is fp16 there and fp32 here": (
            checkpoint,
            with_changes(dtype=StoreDtype.fp32),
        ),
        "encode.rows is images there and pairs here": (checkpoint, with_changes(rows=Rows.pairs)),
        "the checkpoint .SHA-256. is 5feceb66": (other, SETTINGS),
    }
    for sentence, (weights, settings) in refusals.items():
        with pytest.raises(ConfigError, match=sentence) as refused:
            encode(weights, source, output, settings)
        assert "encode.overwrite=true" in str(refused.value)
    with pytest.raises(ConfigError, match="the source's paths and captions .fingerprint. is"):
        encode(checkpoint, source.split("val"), output)
    assert contents(output) == before


def test_a_store_that_another_kind_of_device_is_making_is_left_alone(
    checkpoint: Path, source: PairTable, tmp_path: Path
) -> None:
    output = tmp_path / "store"
    plan = encode(checkpoint, source, output).manifest
    on_gpu = dataclasses.replace(plan, device="cuda", complete=False, shards=())
    begun = StoreWriter.begin(output, on_gpu)
    assert begun.is_over()  # what is finished is good for all
    dataclasses.replace(plan, complete=False, shards=()).write(output)
    with pytest.raises(ConfigError, match="the device is cpu there and cuda here"):
        StoreWriter.begin(output, on_gpu)
    assert (output / "img_emb" / "img_emb_0000.npy").exists()


def test_overwriting_keeps_the_old_store_until_the_new_one_is_finished(
    checkpoint: Path, source: PairTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "store"
    encode(checkpoint, source, output)
    (output / "mine.txt").write_text("a note")
    before = contents(output)
    anew = with_changes(overwrite=True, dtype=StoreDtype.fp32)
    commit = StoreWriter.commit

    def interrupted(writer: StoreWriter, shard: int, *rest: object) -> None:
        if shard == 5:
            raise KeyboardInterrupt
        commit(writer, shard, *rest)

    monkeypatch.setattr(StoreWriter, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(checkpoint, source, output, anew)
    assert contents(output) == before
    monkeypatch.setattr(StoreWriter, "commit", commit)
    assert encode(checkpoint, source, output, anew).encoded == COUNT - 5 * SHARD_ROWS
    encode(checkpoint, source, tmp_path / "fresh", with_changes(dtype=StoreDtype.fp32))
    assert contents(output) == contents(tmp_path / "fresh")
    # What was not the store's stays; nothing else does.
    assert contents(tmp_path / "store.old") == {"mine.txt": b"a note"}
    assert not (tmp_path / "store.new").exists()
    with pytest.raises(ConfigError, match="store.old holds mine.txt, which an earlier encoding"):
        encode(checkpoint, source, output, anew)
    # A kill between the two renames leaves the store under its other name: it comes back.
    output.rename(tmp_path / "moved")
    (tmp_path / "store.old" / "mine.txt").unlink()
    (tmp_path / "store.old").rmdir()
    (tmp_path / "moved").rename(tmp_path / "store.old")
    assert encode(checkpoint, source, output, with_changes(dtype=StoreDtype.fp32)).reused


def test_nothing_readable_is_an_error_and_leaves_nothing(
    checkpoint: Path, source: PairTable, tmp_path: Path
) -> None:
    broken = PairTable(source.table.slice(32, 5), source.root, "broken")
    with pytest.raises(ConfigError, match="none of the 5 pictures of broken could be read") as none:
        encode(checkpoint, broken, tmp_path / "store")
    assert str(source.path(32)) in str(none.value)
    assert not (tmp_path / "store").exists()
    # An older store survives an attempt to replace it by nothing.
    encode(checkpoint, source, tmp_path / "store")
    before = contents(tmp_path / "store")
    with pytest.raises(ConfigError, match="could be read"):
        encode(checkpoint, broken, tmp_path / "store", with_changes(overwrite=True))
    assert contents(tmp_path / "store") == before


def test_captions_alone_need_no_pictures(
    checkpoint: Path, source: PairTable, tmp_path: Path
) -> None:
    encode(checkpoint, source, tmp_path / "store", with_changes(images=False))
    store = EmbeddingStore.open(tmp_path / "store")
    assert len(store) == COUNT and store.has_texts and not store.has_images
    assert store.errors() == []
    with pytest.raises(ConfigError, match="has no image embeddings"):
        store.image_shards()
    captions = [(source.captions(row) or [""])[0] for row in range(COUNT)]
    expected = encoder.Encoder(bundle_of(checkpoint), batch_size=BATCH).encode_texts(captions)
    assert np.array_equal(store.text_rows(range(COUNT)), expected.astype(np.float16))


def test_pictures_without_captions_have_no_text_vectors(
    checkpoint: Path, source: PairTable, tmp_path: Path
) -> None:
    # Every fourth picture has no caption.
    bare = PairTable(source.table.take(list(range(0, COUNT, 4))), source.root, "bare")
    encode(checkpoint, bare, tmp_path / "store")
    store = EmbeddingStore.open(tmp_path / "store")
    assert store.has_images and not store.has_texts
    assert not (tmp_path / "store" / "text_emb").exists()
    assert {entry["caption"] for entry in store.metadata(store.row_ids())} == {""}
    with pytest.raises(ConfigError, match="encode.rows=pairs makes a row of each caption"):
        encode(checkpoint, bare, tmp_path / "pairs", PAIRS)
    with pytest.raises(ConfigError, match="nothing to encode of bare: encode.images is false and"):
        encode(checkpoint, bare, tmp_path / "texts", with_changes(images=False))


def test_folders_that_are_no_store_are_left_alone(
    checkpoint: Path, source: PairTable, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text("{}")
    anew = with_changes(overwrite=True)
    with pytest.raises(ConfigError, match="is not empty and holds no embedding store"):
        encode(checkpoint, source, tmp_path / "full", anew)
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        encode(checkpoint, source, tmp_path / "file", anew)
    with pytest.raises(ConfigError, match="is not the manifest of an embedding store"):
        encode(checkpoint, source, tmp_path / "foreign", anew)
    with pytest.raises(ConfigError, match="no checkpoint at .*; train one first with"):
        encode(tmp_path / "none.safetensors", source, tmp_path / "store")
    assert (tmp_path / "full" / "thesis.tex").read_text() == "x"


def test_a_full_disk_is_a_sentence_and_keeps_whole_shards(
    checkpoint: Path, source: PairTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = np.save

    def full(file: IO[bytes], rows: np.ndarray) -> None:
        if "img_emb_0002" in str(file.name):
            raise OSError(28, "No space left on device")
        save(file, rows)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(ConfigError, match="cannot write .*img_emb_0002.npy: No space left"):
        encode(checkpoint, source, tmp_path / "store")
    monkeypatch.setattr(np, "save", save)
    assert encode(checkpoint, source, tmp_path / "store").encoded == COUNT - 2 * SHARD_ROWS
    assert not list((tmp_path / "store").rglob(".*"))


def test_the_manifest_says_how_the_store_was_made(
    checkpoint: Path, source: PairTable, tmp_path: Path
) -> None:
    encode(checkpoint, source, tmp_path / "store")
    plain = json.loads((tmp_path / "store" / "manifest.json").read_text())
    shards = plain.pop("shards")
    fingerprint = plain.pop("source_fingerprint")
    assert plain.pop("fingerprint") == EmbeddingStore.open(tmp_path / "store").manifest.fingerprint
    assert plain == {
        "format": "twotower embedding store",
        "version": 2,
        "complete": True,
        "rows": 89,
        "source_rows": 101,
        "errors": 12,
        "dim": 12,
        "dtype": "fp16",
        "normalized": True,
        "rows_kind": "images",
        "images": True,
        "texts": True,
        "columns": True,
        "shard_rows": 16,
        "batch_size": 5,
        "compiled": False,
        "text_length": 8,
        "precision": "fp32",
        "device": "cpu",
        "threads": 1,
        "model": "",
        "config": to_plain(bundle_of(checkpoint).config),
        "preprocessing": "SquareTransform(size=16)",
        "tokenizer": "HashTokenizer(context_length=8, vocab_size=97, pad_id=0)",
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": "5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9",
        "source": "squares",
        "state": "source.parquet",
        "next_row_id": 101,
        "updates": 0,
        "deleted": 0,
    }
    assert len(fingerprint) == 64
    assert [shard["rows"] for shard in shards] == [11, 15, 11, 16, 16, 16, 4]
    assert [shard["source_rows"] for shard in shards] == [16] * 6 + [5]
    assert list(shards[0]["files"]) == [
        "img_emb/img_emb_0000.npy",
        "text_emb/text_emb_0000.npy",
        "metadata/metadata_0000.parquet",
    ]


def test_threads_are_kept_when_a_store_is_continued(
    checkpoint: Path, source: PairTable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "store"
    encode(checkpoint, source, output)
    before = contents(output)
    (output / "img_emb" / "img_emb_0002.npy").unlink()
    export(checkpoint, source, output, SETTINGS, dataclasses.replace(ONE_THREAD, num_threads=2))
    assert contents(output) == before
    assert "keeping 1 thread(s) a process, with which the store was begun" in caplog.text


def test_a_name_that_no_file_can_have_is_listed(
    checkpoint: Path, source: PairTable, tmp_path: Path
) -> None:
    names = source.table["filepath"].to_pylist()
    names[5] = "a\0b.jpg"
    table = source.table.set_column(0, "filepath", pa.array(names, pa.large_string()))
    encode(checkpoint, PairTable(table, source.root, "odd"), tmp_path / "store")
    (error,) = [e for e in EmbeddingStore.open(tmp_path / "store").errors() if e["source_row"] == 5]
    assert error["reason"] == "embedded null byte"
    update = with_changes(update=True)
    assert encode(checkpoint, PairTable(table, source.root), tmp_path / "store", update).reused


@pytest.mark.parametrize("images", [True, False])
def test_progress_counts_each_image_once(
    checkpoint: Path,
    source: PairTable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    images: bool,
) -> None:
    counted: list[int] = []
    monkeypatch.setattr(ProgressLine, "advance", lambda self, n=1, note="": counted.append(n))
    encode(checkpoint, source, tmp_path / "store", with_changes(images=images))
    assert sum(counted) == COUNT


def test_a_model_that_gives_nan_is_refused(
    checkpoint: Path, source: PairTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> object:
        bundle = bundle_of(path)
        bundle.model.image_tower.head.bias.data[3] = float("nan")
        return bundle

    monkeypatch.setattr(encoder, "load_bundle", broken)
    with pytest.raises(ConfigError, match="features that are not finite numbers"):
        encode(checkpoint, source, tmp_path / "store")


def test_a_batch_size_that_is_found_is_kept(
    checkpoint: Path, source: PairTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto, output = with_changes(batch_size="auto"), tmp_path / "store"
    rates = {8: 10.0, 16: 30.0, 32: 31.0, 64: 5.0, 128: 90.0}
    tried = []

    def rate(_: object, size: int, images: bool) -> float:
        tried.append(size)
        return rates[size]

    monkeypatch.setattr(batch_size, "_rate", rate)
    assert encode(checkpoint, source, output, auto).manifest.batch_size == 16
    assert tried == [8, 16, 32, 64]
    before = contents(output)
    assert encode(checkpoint, source, output, auto).reused
    (output / "img_emb" / "img_emb_0002.npy").unlink()
    encode(checkpoint, source, output, auto)
    assert tried == [8, 16, 32, 64] and contents(output) == before
    with pytest.raises(ConfigError, match="encode.batch_size is 16 there and 5 here"):
        encode(checkpoint, source, output)
    with pytest.raises(ConfigError, match="batch_size must be at least 1, or auto, not many"):
        with_changes(batch_size="many")
    monkeypatch.undo()
    one = encoder.Encoder(bundle_of(checkpoint))
    assert batch_size.find_batch_size(one, images=True) in batch_size.SIZES
    assert one.batch_size == 64


def test_metadata_without_the_sources_own_columns(
    checkpoint: Path, source: PairTable, tmp_path: Path
) -> None:
    """What the source has is passed on as it is, nested fields too, unless it is not wanted."""
    nested = pa.array([{"licence": "free", "tags": [str(row)]} for row in range(COUNT)])
    wide = PairTable(source.table.append_column("json", nested), source.root, "wide")
    encode(checkpoint, wide, tmp_path / "full")
    (row,) = EmbeddingStore.open(tmp_path / "full").metadata([3])
    assert row["json"] == {"licence": "free", "tags": ["3"]} and row["url"].endswith("/3")
    encode(checkpoint, wide, tmp_path / "bare", with_changes(metadata=False))
    (bare,) = EmbeddingStore.open(tmp_path / "bare").metadata([3])
    assert set(row) - set(bare) == {"json", "url"}
    assert bare.items() <= row.items()
    with pytest.raises(ConfigError, match="encode.metadata is True there and False here"):
        encode(checkpoint, wide, tmp_path / "full", with_changes(metadata=False))
