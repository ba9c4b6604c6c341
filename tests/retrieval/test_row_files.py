"""A saved index whose rows stay in the files of a store."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.retrieval.reference import brute_force
from twotower.config import Metric
from twotower.retrieval import arrays
from twotower.retrieval.exact import ExactConfig, ExactIndex, RowMemory
from twotower.retrieval.index import AnyFloatArray, IdArray, VectorIndex, unit_rows
from twotower.retrieval.saved import load_index, save_index
from twotower.retrieval.scan import certified_scan
from twotower.retrieval.scan.tiers import Tier
from twotower.settings import ConfigError

DIM = 24
STORED = ExactConfig(memory=RowMemory.stored)


def rows_in(folder: Path, count: int = 600, dtype: type = np.float16) -> list[AnyFloatArray]:
    """Two files of rows, mapped."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = unit_rows(np.random.default_rng(0).standard_normal((count, DIM))).astype(dtype)
    cut = count // 3
    np.save(folder / "0.npy", rows[:cut])
    np.save(folder / "1.npy", rows[cut:])
    return [np.load(folder / f"{number}.npy", mmap_mode="r") for number in (0, 1)]


def built(parts: list[AnyFloatArray], config: ExactConfig = STORED) -> ExactIndex:
    index = ExactIndex(config, DIM)
    for part in parts:
        index.add(part, normalized=True)
    return index


def check(index: VectorIndex, rows: AnyFloatArray, ids: IdArray) -> None:
    queries = np.random.default_rng(1).standard_normal((7, DIM)).astype(np.float32)
    queries[3] = 0
    assert len(index) == len(ids)
    for k in (1, 20, len(ids)):
        found = index.search(queries, k)
        want = brute_force(rows, ids, queries, k, Metric.cosine)
        np.testing.assert_array_equal(found.ids, want.ids)
        np.testing.assert_array_equal(found.scores, want.scores)


@pytest.mark.parametrize("tier", [Tier.native, Tier.torch, Tier.reference])
def test_rows_stay_in_the_store_and_deleted_ones_stay_deleted(tier: Tier, tmp_path: Path) -> None:
    parts = rows_in(tmp_path / "store", 6000)
    # A slice of a map, too, is where it is.
    index = built([parts[0][:500], parts[0][500:], parts[1]], ExactConfig(memory=RowMemory.stored))
    rows = np.concatenate([*parts, np.ones((3, DIM), np.float16)])
    save_index(index, tmp_path / "index")
    data = next((tmp_path / "index").glob("*.bin"))
    # A code a value, an fp64 norm, an int64 id, a few fp32 numbers; the frame and the header.
    assert data.stat().st_size < 6000 * (DIM + 8 + 8 + 5 * 4) + 8192
    loaded = load_index(tmp_path / "index")
    check(loaded, rows[:6000], np.arange(6000))

    gone = np.arange(0, 6000, 7)
    loaded.delete(gone)
    loaded.add(rows[6000:], normalized=True)  # rows of no file
    loaded.delete(np.array([6001]))
    ids = np.setdiff1d(np.arange(6003), [*gone, 6001])
    for _ in range(2):  # the second time, what was in the first index file is written anew
        save_index(loaded, tmp_path / "index")
        config = ExactConfig(memory=RowMemory.stored, tier=tier)
        other = ExactIndex(config, DIM)
        other.read(next((tmp_path / "index").glob("*.bin")))
        check(other, rows[ids], ids)
        with pytest.raises(ConfigError, match="row id 7 is not in the index"):
            other.delete(np.array([7]))
        other.delete(np.array([8]))
        check(other, rows[ids[ids != 8]], ids[ids != 8])
        loaded = load_index(tmp_path / "index")
        check(loaded, rows[ids], ids)
    loaded.add(rows[:1], normalized=True)
    assert loaded.search(rows[:1].astype(np.float32), 1).ids.tolist() == [[6003]]


def advice(path: Path) -> list[bool]:
    """Of each map of a file in this process, whether the system reads nothing ahead."""
    found: list[bool] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("VmFlags:"):
            found.append("rr" in line.split())
    return sorted(found)


def test_a_search_reads_nothing_ahead_and_others_of_the_store_do(tmp_path: Path) -> None:
    parts = rows_in(tmp_path / "store")
    file = tmp_path / "store" / "1.npy"
    index = built(parts)
    assert advice(file) == [False, True]
    save_index(index, tmp_path / "index")
    loaded = load_index(tmp_path / "index")
    assert advice(file) == [False, True, True] and len(loaded) == len(index)
    scanned = built(parts, ExactConfig(memory=RowMemory.stored, tier=Tier.reference))
    assert advice(file) == [False, False, True, True] and len(scanned) == len(index)


def test_a_store_that_has_changed_or_gone_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "run"
    index = built(rows_in(home / "store"))
    save_index(index, home / "index")
    home.rename(tmp_path / "moved")  # both together
    home = tmp_path / "moved"
    check(load_index(home / "index"), np.concatenate(rows_in(tmp_path / "other")), np.arange(600))

    (home / "index").rename(tmp_path / "index")
    with pytest.raises(ConfigError, match=r"0.npy, which cannot be read \(No such file.*build it"):
        load_index(tmp_path / "index")
    (tmp_path / "index").rename(home / "index")

    file = home / "store" / "1.npy"
    before = file.stat()
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(ConfigError, match="1.npy, which has changed since; build it again"):
        load_index(home / "index")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    load_index(home / "index")
    file.write_bytes(file.read_bytes()[:-1])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ConfigError, match="has changed since"):
        load_index(home / "index")


@pytest.mark.parametrize("now", ["other", "short", "gone"])
def test_a_file_that_was_replaced_before_it_was_added_is_not_named(
    now: str, tmp_path: Path
) -> None:
    _, mapped = rows_in(tmp_path / "store")
    rows, file = np.array(mapped), tmp_path / "store" / "1.npy"
    file.rename(tmp_path / "old.npy")  # the map shows this one
    if now != "gone":
        np.save(file, rows[::-1] if now == "other" else rows[:5])
    index = built([mapped])
    check(index, rows, np.arange(400))
    save_index(index, tmp_path / "index")
    check(load_index(tmp_path / "index"), rows, np.arange(400))


def test_rows_that_may_be_written_to_are_copied_when_saved(tmp_path: Path) -> None:
    rows_in(tmp_path / "store")
    mapped = np.load(tmp_path / "store" / "1.npy", mmap_mode="c")
    mapped[0] = mapped[1]
    index = built([mapped])
    rows = np.array(mapped)
    save_index(index, tmp_path / "index")
    (tmp_path / "store" / "1.npy").unlink()
    check(load_index(tmp_path / "index"), rows, np.arange(400))


@pytest.mark.parametrize("memory", list(RowMemory))
def test_an_index_is_written_a_few_rows_at_a_time(
    memory: RowMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "WRITE_ROWS", 500)
    monkeypatch.setattr(certified_scan, "WRITE_ROWS", 500)
    index = built(
        [np.array(part) for part in rows_in(tmp_path, 60_000)], ExactConfig(memory=memory)
    )
    index.delete(np.arange(100, 60_000, 3))
    tracemalloc.start()
    try:
        index.write(tmp_path / "index")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    rows = 60_000 * DIM * (4 if memory is RowMemory.fp32 else 2)
    # Ids, norms and three columns are written whole: 28 bytes a row, and what picks them.
    assert peak < 60_000 * 48 < rows + 60_000 * DIM
